"""AdamW against torch's, schedules against their formulas, and what decays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import for_platform
from qwen3_jax.train import optim, stacked


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("clip", [0.0, 0.7], ids=["no clipping", "clipping"])
def test_adamw_equals_torch(clip):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 7)).astype(np.float32), "norm": rng.normal(size=(7,)).astype(np.float32)}
    mine = {name: jnp.array(value) for name, value in params.items()}
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    groups = [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, lr=3e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = optim.Optimizer(optim.OptimizerConfig(clip=clip), lambda done: jnp.float32(3e-2))
    state = optimizer.init(mine)
    update = jax.jit(optimizer.update)
    for i in range(20):
        grads = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
        mine, state, rate = update(grads, state, mine, done=jnp.int32(i), norm=norm_of(grads))
        assert float(rate) == np.float32(3e-2)
        for name, value in theirs.items():
            value.grad = torch.tensor(grads[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        other.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value.detach(), rtol=2e-6, atol=2e-6)


def test_master_weights_keep_what_bfloat16_would_lose():
    """A thousand updates of a hundredth of a bfloat16 step: with a float32 master they add up, without they vanish."""
    rate = lambda done: jnp.float32(3e-5)  # noqa: E731
    ends = {}
    for master in (True, False):
        config = optim.OptimizerConfig(weight_decay=0.0, clip=0.0, master=master)
        optimizer = optim.Optimizer(config, rate)
        params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
        state = optimizer.init(params)

        @jax.jit
        def steps(params, state, optimizer=optimizer):
            def one(carry, i):
                grads = {"w": jnp.ones((2, 2), jnp.bfloat16)}
                params, state, _ = optimizer.update(grads, carry[1], carry[0], done=i, norm=jnp.float32(2))
                return (params, state), None

            return jax.lax.scan(one, (params, state), jnp.arange(1000))[0]

        params, state = steps(params, state)
        assert params["w"].dtype == jnp.bfloat16
        assert jax.tree.leaves(state["adam"][0].mu)[0].dtype == jnp.float32
        ends[master] = float(params["w"][0, 0])
    assert ends[False] == 1.0
    assert ends[True] == pytest.approx(1 - 1000 * 3e-5, abs=0.004)  # a constant gradient: every update is the rate


def rates(config, updates, stages=None):
    rate = jax.jit(optim.schedule(config, updates))
    return np.array([float(rate(jnp.int32(i))) for i in range(updates + 1)])


def test_schedules_follow_their_formulas():
    i = np.arange(101)
    warm = 1e-4 + (1e-2 - 1e-4) * i / 10
    fall = np.clip((i - 10) / 90, 0, 1)
    shapes = {"cosine": (1 + np.cos(np.pi * fall)) / 2, "linear": 1 - fall, "constant": np.ones(101)}
    for kind, left in shapes.items():
        config = optim.ScheduleConfig(kind=kind, peak=1e-2, final=1e-3, start=1e-4, warmup=10)
        expected = np.where(i < 10, warm, 1e-3 + 9e-3 * left)
        np.testing.assert_allclose(rates(config, 100), expected, rtol=2e-5, err_msg=kind)
    config = optim.ScheduleConfig(kind="wsd", peak=1e-2, final=1e-3, start=1e-4, warmup=10, decay=20)
    expected = np.where(i < 10, warm, 1e-3 + 9e-3 * (1 - np.sqrt(np.clip((i - 80) / 20, 0, 1))))
    np.testing.assert_allclose(rates(config, 100), expected, rtol=2e-5)


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    other = torch.optim.SGD([parameter], lr=1e-2)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=40, eta_min=1e-3)
    found = rates(optim.ScheduleConfig(kind="cosine", peak=1e-2, final=1e-3), 40)
    for rate in found:
        assert rate == pytest.approx(other.param_groups[0]["lr"], rel=1e-5)
        other.step()
        annealing.step()


def test_stages_follow_one_another():
    first = optim.schedule(optim.ScheduleConfig(kind="constant", peak=1.0), 10)
    second = optim.schedule(optim.ScheduleConfig(kind="linear", peak=0.5), 5)
    run = optim.one_after_another([(first, 10), (second, 5)])
    found = [float(run(jnp.int32(i))) for i in (0, 9, 10, 11, 15, 20)]
    np.testing.assert_allclose(found, [1, 1, 0.5, 0.4, 0, 0], atol=1e-7)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"kind": "cosin", "peak": 1}, "schedule.kind 'cosin' is unknown: use constant, cosine, linear, wsd"),
        ({"peak": 1, "warmup": 11}, "schedule.warmup 11 + decay 0 = 11 updates, the stage has 10: shorten them"),
        ({"kind": "wsd", "peak": 1}, "schedule.decay is 0: kind wsd needs at least 1, wsd was given"),
        ({"peak": float("nan")}, "schedule.peak is nan: give a number of at least 0"),
    ],
)
def test_impossible_schedules_are_refused(config, says):
    with pytest.raises(optim.OptimizerError, match=re.escape(says)):
        optim.schedule(optim.ScheduleConfig(**config), 10)


def test_norms_do_not_decay():
    config = Qwen3Config.from_name("Qwen3-30B-A3B")
    network = stacked.Network(
        config, dtype=jnp.dtype("bfloat16"), param_dtype=jnp.dtype("bfloat16"), ops=for_platform("cpu")
    )
    flat = jax.tree.leaves_with_path(optim.decays(network.abstract(), embeddings=False))
    kept = {path[-1].key for path, decays in flat if not decays}
    assert kept == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm",
    }  # fmt: skip
    flat = jax.tree.leaves_with_path(optim.decays(network.abstract(), embeddings=True))
    assert {path[-1].key for path, decays in flat if not decays} == kept - {"embed_tokens", "lm_head"}
