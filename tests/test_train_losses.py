"""Chunked cross-entropy against torch and by its compiled memory; load balancing by the figures of its paper."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen3_jax.ops import for_platform
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import RULES, make_mesh, spec
from qwen3_jax.train import losses, objectives, optim, stacked
from qwen3_jax.train.step import RefusalConfig, TrainStep

OPS = for_platform("cpu")


@pytest.mark.parametrize(("chunk", "z"), [(4, 1e-2), (64, 0.0)], ids=["chunks that do not divide", "one chunk"])
def test_cross_entropy_and_its_gradients_equal_torch(chunk, z):
    rng = np.random.default_rng(0)
    B, T, D, V = 3, 10, 8, 50
    hidden, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    targets, weights = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)).astype(np.float32)
    weights[0, :3] = 0
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    logits = h @ w.T
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(targets).long(), reduction="none")
    square = torch.logsumexp(logits, -1) ** 2
    total = 3 * ((each + z * square) * torch.tensor(weights)).sum()
    total.backward()

    def loss(hidden, head):
        given = jnp.asarray(targets), jnp.asarray(weights)
        total, sums = losses.cross_entropy(OPS, hidden, head, *given, chunk=chunk, z_loss=z)
        return 3 * total, sums

    (ours, sums), slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
    assert float(ours) == pytest.approx(total.item(), rel=1e-6)
    assert float(sums.z) == pytest.approx((square * torch.tensor(weights)).sum().item(), rel=1e-6)
    right = (logits.argmax(-1).numpy() == targets) * weights
    assert float(sums.correct) == pytest.approx(right.sum(), rel=1e-6)
    assert float(jax.jit(loss)(hidden, head)[0]) == pytest.approx(total.item(), rel=1e-6)
    for mine, tensor in zip(slopes, (h, w), strict=True):
        theirs = np.asarray(tensor.grad)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_whole_logits_never_exist():
    """The compiled gradient's temporaries: a few chunks of logits and the gradients, far below [B, T, V]."""
    B, T, D, V = 2, 512, 16, 4096
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in [((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32")]]
    weights = jax.ShapeDtypeStruct((B, T), "float32")

    def temporary_bytes(chunk):
        def loss(hidden, head, targets, weights):
            return losses.cross_entropy(OPS, hidden, head, targets, weights, chunk=chunk, z_loss=1e-4)[0]

        memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, weights).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporary_bytes(T) >= logits
    assert temporary_bytes(16) < logits / 8


def test_no_weight_is_sent_per_chunk():
    """The compiled gradient on eight devices: the loop over chunks has no collective, the program one of each."""
    mesh, rules = make_mesh(data=2, fsdp=4), RULES["train"]
    ops = on_mesh(XLA, mesh, rules)
    B, T, D, V = 16, 64, 32, 256

    def abstract(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(axes, rules)))

    given = [
        abstract((B, T, D), "float32", "batch length hidden"), abstract((V, D), "float32", "vocab embed"),
        abstract((B, T), "int32", "batch"), abstract((B, T), "float32", "batch"),
    ]  # fmt: skip

    def loss(hidden, head, targets, weights):
        return losses.cross_entropy(ops, hidden, head, targets, weights, chunk=8, z_loss=1e-4)[0]

    placed = tuple(one.sharding for one in given[:2])
    program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=placed).lower(*given).compile().as_text()
    assert program is not None
    assert " while(" in program
    inside, _, entry = program.partition("ENTRY ")
    sent = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
    assert sent.findall(inside) == []
    gathered, *added = sent.findall(entry)
    assert gathered == "all-gather"
    assert len(added) == 1


class Toy:
    """A network whose router says what the tokens say: token 0 prefers expert 0, token 1 expert 1, by 0.7."""

    def __init__(self, ops, groups):
        self.ops, self.groups = ops, groups

        class config:
            num_hidden_layers = 1
            is_moe_layer = staticmethod(lambda layer: True)

        self.config = config

    def abstract(self):
        return {"scale": jax.ShapeDtypeStruct((1, 1), "float32"), "head": jax.ShapeDtypeStruct((8, 8), "float32")}

    def hidden(self, params, tokens, positions, segment_ids):
        logits = jnp.log(jnp.where(jax.nn.one_hot(tokens, 4) > 0, 0.7, 0.1)) * params["scale"][0, 0]
        logits = self.ops.constrain(logits, "batch length hidden")
        real = (segment_ids != 0).astype(jnp.float32)
        found = stacked.routing(logits, jnp.argmax(logits, -1)[..., None], real, self.groups)
        return jnp.zeros((*tokens.shape, 8)), jax.tree.map(lambda x: x[None], found)

    def head(self, params):
        return params["head"]


@pytest.mark.parametrize(
    ("balance", "groups", "micro_batches", "mesh", "expected"),
    [
        pytest.param("micro", 2, 1, None, 2.8, marks=pytest.mark.slow),
        pytest.param("global", 1, 1, None, 1.6, marks=pytest.mark.slow),
        ("micro", 1, 2, None, 2.8),
        ("global", 1, 2, None, 1.6),
        pytest.param("micro", 2, 1, {"data": 2, "fsdp": 4}, 2.8, marks=pytest.mark.slow),
        pytest.param("global", 1, 1, {"data": 2, "fsdp": 4}, 1.6, marks=pytest.mark.slow),
        ("global", 1, 2, {"expert": 4, "fsdp": 2}, 1.6),
    ],
)
def test_balance_of_the_paper(balance, groups, micro_batches, mesh, expected):
    """arXiv 2501.11873's case: group A all to expert 0 with P = (.7, .1, .1, .1), group B all to expert 1."""
    placed = None if mesh is None else make_mesh(**mesh)
    rules = None if placed is None else RULES["train"]
    toy = Toy(XLA if placed is None or rules is None else on_mesh(XLA, placed, rules), groups)
    settings = objectives.ObjectiveConfig(balance=balance, balance_groups=groups, balance_loss=1.0)
    whole = None if placed is None else jax.tree.map(lambda _: jax.NamedSharding(placed, jax.P()), toy.abstract())
    step = TrainStep(
        objectives.NextToken(toy, settings),  # pyright: ignore[reportArgumentType]
        optim.Optimizer(optim.OptimizerConfig(), lambda done: jnp.float32(0)),
        RefusalConfig(),
        abstract=toy.abstract(),
        shardings=whole,
        mesh=placed,
        rules=rules,
    )
    rows = 16
    tokens = np.repeat(np.array([0, 1], np.int32), rows // 2)[:, None] * np.ones((rows, 8), np.int32)
    segments = np.ones_like(tokens)
    segments[:, -2:], tokens[:, -2:] = 0, 3  # padding does not count
    batch = step.put(
        {"tokens": tokens, "positions": tokens, "segment_ids": segments, "targets": tokens,
         "weights": np.zeros((rows, 8), np.float32)}, micro_batches,
    )  # fmt: skip
    _, metrics = step(step.init({"scale": jnp.ones((1, 1)), "head": jnp.zeros((8, 8))}, 0), {}, batch)
    assert float(metrics["balance"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(metrics["expert_load"], [[2, 2, 0, 0]], atol=1e-6)
    entropy = -(0.7 * np.log(0.7) + 0.3 * np.log(0.1))
    assert float(metrics["router_entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(metrics["router_z"]) == pytest.approx(0, abs=1e-6)


def test_gradients_flow_through_the_probabilities_only():
    def loss(logits, counts_of):
        experts = jnp.argmax(counts_of, -1)[..., None]
        found = jax.tree.map(lambda x: x[None], stacked.routing(logits, experts, jnp.ones((2, 3)), 1))
        return losses.load_balance(found, jnp.float32(6), counts=None)

    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    through_p, through_f = jax.grad(loss, (0, 1))(logits, logits)
    x = torch.tensor(np.asarray(logits).reshape(6, 4), requires_grad=True)
    p = torch.softmax(x, -1)
    share = torch.nn.functional.one_hot(x.argmax(-1), 4).float().mean(0)
    (4 * (share * p.mean(0)).sum()).backward()
    np.testing.assert_allclose(through_p.reshape(6, 4), np.asarray(x.grad), atol=1e-7)
    assert not np.any(through_f)
