"""The experts: every algorithm against the dense oracle, the oracle against live transformers, for hostile routings."""

import functools
import importlib.util
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qwen3_jax.ops import mesh as ops_mesh
from qwen3_jax.ops import moe, moe_gpu, moe_parallel, moe_tpu, moe_tpu_grad, moe_tpu_tiles
from qwen3_jax.ops.plain import ORACLE, XLA
from qwen3_jax.plan import chips, cost, hlo
from qwen3_jax.plan.compile import devices_of
from qwen3_jax.plan.gpu import TARGETS
from qwen3_jax.sharding import RULES, make_mesh

E, C, D, F = 16, 3, 8, 12


def routing(name: str, R: int, key: jax.Array) -> jax.Array:
    """Return [R, C] expert ids, distinct within a row unless the name says otherwise; `E` means none."""
    scores = jax.random.uniform(key, (R, E))
    ids = {
        "random": lax.top_k(scores, C)[1],
        "one expert": jnp.full((R, C), E - 1).at[:, 1:].set(E),
        "one expert, thrice": jnp.full((R, C), 5),
        "one shard": lax.top_k(scores.at[:, 4:].set(-1), C)[1],
        "last shard": lax.top_k(scores.at[:, :-4].set(-1), C)[1],
        "even experts only": lax.top_k(scores.at[:, 1::2].set(-1), C)[1],
        "duplicates": jnp.repeat(lax.top_k(scores, 1)[1], C, axis=1).at[::2, 0].set(2),
        "some are none": jnp.where(jax.random.bernoulli(key, 0.4, (R, C)), E, lax.top_k(scores, C)[1]),
        "all none": jnp.full((R, C), E + 7),
    }
    return ids[name].astype(jnp.int32)


ROUTINGS = (
    "random",
    "one expert",
    "one expert, thrice",
    "one shard",
    "last shard",
    "even experts only",
    "duplicates",
    "some are none",
    "all none",
)


def arrays(R: int, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
    """Return x, weights, gate_proj, up_proj, down_proj."""
    shapes = ((R, D), (R, C), (E, F, D), (E, F, D), (E, D, F))
    keys = jax.random.split(jax.random.key(7), len(shapes))
    return tuple(jax.random.normal(k, s, jnp.float32).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def with_gradients(function):
    """Jit a moe function into one that returns its result and the gradients of all arrays for a given slope."""

    @jax.jit
    def both(experts, slope, values):
        out, pull = jax.vjp(lambda v: function(v[0], v[1], experts, *v[2:]), values)
        return out, pull(slope)[0]

    return both


@functools.cache
def expected(name: str, R: int):
    experts = routing(name, R, jax.random.key(R))
    slope = jax.random.normal(jax.random.key(1), (R, D))
    return experts, slope, oracle()(experts, slope, arrays(R))


@functools.cache
def oracle():
    return with_gradients(moe.dense)


def assert_equals_oracle(function, R: int, names=ROUTINGS) -> None:
    run = with_gradients(function)
    for name in names:
        experts, slope, want = expected(name, R)
        got = run(experts, slope, arrays(R))
        for part, a, b in zip(
            ("out", "d_x", "d_weights", "d_gate_proj", "d_up_proj", "d_down_proj"),
            (got[0], *got[1]),
            (want[0], *want[1]),
            strict=True,
        ):
            scale = max(1.0, float(jnp.max(jnp.abs(b))))
            error = float(jnp.max(jnp.abs(a - b))) / scale
            assert error <= 1e-5, f"{name}: {part} differs by {error:.1e} of its largest value"


def test_oracle_equals_transformers():
    """`Qwen3MoeExperts` in float32, values and torch's gradients."""
    R = 11
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=C, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    theirs: Any = Qwen3MoeExperts(config)
    x, weights, gate, up, down = (np.asarray(a) for a in arrays(R))
    experts, slope, (out, gradients) = expected("random", R)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.tensor(np.concatenate([gate, up], axis=1)))
        theirs.down_proj.copy_(torch.tensor(down))
    torch_x, torch_weights = (torch.tensor(a, requires_grad=True) for a in (x, weights))
    torch_out = theirs(torch_x, torch.tensor(np.asarray(experts), dtype=torch.int64), torch_weights)
    torch_out.backward(torch.tensor(np.asarray(slope)))
    gate_up = np.asarray(theirs.gate_up_proj.grad)
    chex.assert_trees_all_close(
        [np.asarray(a) for a in (out, *gradients)],
        [
            torch_out.detach().numpy(),
            np.asarray(torch_x.grad),
            np.asarray(torch_weights.grad),
            gate_up[:, :F],
            gate_up[:, F:],
            np.asarray(theirs.down_proj.grad),
        ],
        rtol=1e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(moe.every, id="every"),
        pytest.param(moe.grouped, id="grouped"),
        pytest.param(functools.partial(moe.grouped, align=4), id="grouped, aligned"),
        pytest.param(functools.partial(moe.grouped, expected=4), id="grouped, many rounds"),
        pytest.param(functools.partial(moe.grouped, expected=4, align=4), id="grouped, aligned, many rounds"),
    ],
)
def test_one_device(function):
    assert_equals_oracle(function, 13)


def test_one_row():
    assert_equals_oracle(functools.partial(moe.grouped, align=4), 1)
    kernel = functools.partial(moe_tpu.swiglu, 8, (1, 1), True, None)
    assert_equals_oracle(functools.partial(moe.grouped, swiglu=kernel, align=8), 1)


@pytest.mark.parametrize("expected_routes", [None, 8])
def test_tpu_kernel(expected_routes):
    """The Pallas kernels, interpreted, in tiles of 8 rows."""
    kernel = functools.partial(moe_tpu.swiglu, 8, (4, E), True, None)
    assert_equals_oracle(functools.partial(moe.grouped, swiglu=kernel, align=8, expected=expected_routes), 13)


def test_tpu_kernel_runs_some_experts_only():
    sizes = jnp.array([16, 0, 8, 24], jnp.int32)
    rows = jax.random.normal(jax.random.key(0), (56, D))
    _, _, gate, up, down = (a[:4] for a in arrays(8))
    all_rows = jnp.asarray(moe.ragged_swiglu(rows, sizes, gate, up, down))
    for only, begin, end in (((0, 2), 0, 16), ((1, 3), 16, 24), ((2, 4), 16, 48), ((1, 2), 16, 16)):
        got = jnp.asarray(moe_tpu.swiglu(8, (2, 2), True, only, rows, sizes, gate, up, down))
        chex.assert_trees_all_close(got[begin:end], all_rows[begin:end], rtol=1e-5, atol=1e-5)


def test_gpu_kernel():
    """The Pallas kernel, interpreted, in tiles of 16 rows."""
    kernel = functools.partial(moe_gpu.swiglu, 16, True)
    assert_equals_oracle(functools.partial(moe.grouped, swiglu=kernel, align=16), 13)


def test_tpu_kernel_splits_a_wide_expert(monkeypatch):
    """An expert too wide for the chip's memory is read, and its gradient written, in slices of 128 lanes."""
    D, F = 256, 384
    monkeypatch.setattr(moe_tpu_tiles, "WEIGHTS_VMEM_BYTES", 128 * 6 * D * 4)
    monkeypatch.setattr(moe_tpu_grad, "SUM_VMEM_BYTES", 128 * F * 12)
    shapes = (24, D), (3, F, D), (3, F, D), (3, D, F), (24, D)
    *values, slope = (0.1 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    sizes = jnp.array([16, 0, 8], jnp.int32)

    def both(swiglu):
        out, pull = jax.vjp(lambda rows, *stacks: swiglu(rows, sizes, *stacks), *values)
        return out, *pull(slope)

    kernel = functools.partial(moe_tpu.swiglu, 8, (3, 2), True, None)
    chex.assert_trees_all_close(both(kernel), both(moe.ragged_swiglu), rtol=1e-5, atol=1e-5)


def test_tpu_gradients_leave_out_what_pads_a_group():
    """A row whose slope is zero adds nothing to an expert's gradient even if it is NaN; nor does one of no group."""
    counts, tile, tiles = [11, 0, 16, 1, 0], 8, 6  # the last tile is nobody's
    sizes = jnp.array([-(-n // tile) * tile for n in counts], jnp.int32)
    _, _, *stacks = (a[: len(counts)] for a in arrays(8))
    real = np.concatenate([np.arange(int(size)) < n for size, n in zip(sizes, counts, strict=True)] + [[False] * tile])
    rows, slope = (jax.random.normal(jax.random.key(i), (tile * tiles, D)) for i in (0, 1))
    hostile = jnp.where(real[:, None], rows, jnp.nan)
    slope = jnp.where(real[:, None], slope, jnp.where(jnp.arange(tile * tiles) < sum(sizes), 0, jnp.nan)[:, None])
    gradients = jax.jit(functools.partial(moe_tpu_grad.gradients, tile, (5, 3), True))
    d_rows, *d_stacks = gradients(hostile, sizes, *stacks, slope)

    alone = jnp.array(counts, jnp.int32)
    pull = jax.vjp(lambda rows, *stacks: moe.ragged_swiglu(rows, alone, *stacks), rows[real], *stacks)[1]
    want, *want_stacks = pull(slope[real])
    chex.assert_trees_all_close((d_rows[real], *d_stacks), (want, *want_stacks), rtol=1e-5, atol=1e-4)
    for stack in d_stacks:
        chex.assert_trees_all_equal(stack[jnp.array([1, 4])], jnp.zeros((2, *stack.shape[1:])))


def test_tpu_gradients_of_a_row_that_no_expert_has():
    """It is NaN, and lies in the padding of others, which is filled with any rows."""
    R = 13
    experts = routing("some are none", R, jax.random.key(R)).at[5].set(E)
    slope = jax.random.normal(jax.random.key(1), (R, D))
    x, *others = arrays(R)
    kernel = functools.partial(moe_tpu.swiglu, 8, (4, E), True, None)
    run = with_gradients(functools.partial(moe.grouped, swiglu=kernel, align=8))
    got = run(experts, slope, (x.at[5].set(jnp.nan), *others))
    want = oracle()(experts, slope, (x, *others))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-4)


def test_tpu_gradients_in_bfloat16():
    """Against the oracle in float32, relative to the largest of each gradient."""
    R = 13
    experts, slope = routing("random", R, jax.random.key(3)), jax.random.normal(jax.random.key(1), (R, D))
    values = arrays(R, jnp.bfloat16)
    kernel = functools.partial(moe_tpu.swiglu, 16, (8, E), True, None)
    run = with_gradients(functools.partial(moe.grouped, swiglu=kernel, align=16))
    _, got = run(experts, slope.astype(jnp.bfloat16), values)
    _, want = oracle()(experts, slope, tuple(a.astype(jnp.float32) for a in values))
    for a, b, of in zip(got, want, values, strict=True):
        chex.assert_type(a, of.dtype)
        assert float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))) < 0.02


def test_undefined_rows_do_not_leak():
    """Rows that no group holds may come back as anything, NaN included, and so may their gradients."""

    @jax.custom_vjp
    def hostile(rows, sizes, gate_proj, up_proj, down_proj):
        out = moe.ragged_swiglu(rows, sizes, gate_proj, up_proj, down_proj)
        return jnp.where(jnp.arange(rows.shape[0])[:, None] < jnp.sum(sizes), out, jnp.nan)

    def backward(saved, slope):
        rows, sizes, *stacks = saved
        d_rows, *d_stacks = jax.vjp(lambda rows, *stacks: moe.ragged_swiglu(rows, sizes, *stacks), rows, *stacks)[1](
            slope
        )
        undefined = jnp.arange(rows.shape[0])[:, None] >= jnp.sum(sizes)
        return jnp.where(undefined, jnp.nan, d_rows), None, *d_stacks

    hostile.defvjp(lambda *args: (hostile(*args), args), backward)
    for align in (1, 4):
        assert_equals_oracle(functools.partial(moe.grouped, swiglu=hostile, align=align), 13, ("some are none",))


def test_bfloat16_rounds_like_the_oracle():
    x, weights, *stacks = arrays(32, jnp.bfloat16)
    experts = routing("random", 32, jax.random.key(3))
    exact = jax.jit(moe.dense)(
        *(a.astype(jnp.float32) for a in (x, weights)), experts, *(a.astype(jnp.float32) for a in stacks)
    )
    scale = jnp.max(jnp.abs(exact))
    for function in (moe.dense, moe.every, moe.grouped):
        got = jax.jit(function)(x, weights, experts, *stacks)
        chex.assert_type(got, jnp.bfloat16)
        assert float(jnp.max(jnp.abs(got.astype(jnp.float32) - exact)) / scale) < 0.02


# On a mesh: sizes of data, fsdp, expert, model.
ON_MESHES = [
    pytest.param(sizes, algorithm, id=f"{algorithm} {sizes}", marks=() if quick else pytest.mark.slow)
    for algorithm, quickly in {
        "replicated": [(2, 1, 2, 2), (1, 1, 1, 8)],
        "gather": [(2, 1, 2, 2), (1, 1, 8, 1)],
        "all_to_all": [(2, 1, 2, 2), (1, 1, 4, 2)],
        "ragged_all_to_all": [(1, 1, 4, 2)],
    }.items()
    for sizes in [(1, 1, 8, 1), (1, 1, 4, 2), (2, 1, 2, 2), (1, 2, 2, 2), (1, 1, 1, 8), (2, 2, 2, 1)]
    for quick in [sizes in quickly]
]


def emulated_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` from its documentation, for a backend that lacks it: peer i's slice goes to row
    output_offsets[i] of peer i's output."""
    me = lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    for peer in range(operands.shape[0]):
        start, size, target = starts[peer, me], sizes[peer, me], targets[peer, me]
        inside = (row >= target) & (row < target + size)
        source = operands[peer][jnp.clip(row - target + start, 0, operand.shape[0] - 1)]
        output = jnp.where(inside[:, None], source, output)
    return output


@pytest.mark.parametrize(("sizes", "algorithm"), ON_MESHES)
def test_mesh(sizes, algorithm, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    mesh = make_mesh(**dict(zip(("data", "fsdp", "expert", "model"), sizes, strict=True)))
    ops = ops_mesh.on_mesh(XLA, mesh, RULES["serve"], experts=algorithm)
    assert_equals_oracle(ops.moe, 101)  # enough for the exchanges and the local blocks to need several rounds


@pytest.mark.parametrize("algorithm", moe_parallel.ALGORITHMS[:3])
def test_mesh_with_one_row(algorithm):
    """Fewer rows than devices: the padding must choose no expert."""
    ops = ops_mesh.on_mesh(XLA, make_mesh(expert=4, model=2), RULES["serve"], experts=algorithm)
    assert_equals_oracle(ops.moe, 1, ("random", "all none"))


def test_mesh_splits_the_rows_by_all_axes(monkeypatch):
    """One long prompt: every axis splits the rows, and an exchange may collect one of them first."""
    rows = ("data", "fsdp", "expert", "model")
    mesh = make_mesh(expert=4, model=2)
    place = moe_parallel.island(mesh.shape, {**RULES["serve"], "batch": rows})
    assert place.shared == ("expert", "model")
    for algorithm, over in (("gather", None), ("all_to_all", ("expert",)), ("all_to_all", ("expert", "model"))):
        if over is not None:
            monkeypatch.setattr(moe_parallel, "exchange_axes", lambda *_, over=over: over)
        island = jax.shard_map(
            functools.partial(moe_parallel.run, algorithm, moe.grouped, place, "cpu"),
            mesh=mesh,
            in_specs=(*[PartitionSpec(rows)] * 3, *[PartitionSpec(place.experts)] * 3),
            out_specs=PartitionSpec(rows),
            check_vma=False,
        )
        assert_equals_oracle(island, 104, ("random", "one shard"))


@pytest.mark.parametrize(
    ("data", "expert", "model", "over", "R"),
    [
        (1, 4, 2, "expert", 112),
        (1, 2, 4, "expert", 112),
        (2, 2, 2, "expert", 128),  # a square: half of the rows over each axis
        pytest.param(1, 2, 4, "model", 112, marks=pytest.mark.slow),
        pytest.param(1, 4, 2, "expert", 104, marks=pytest.mark.slow),  # a device's own rows are odd
        pytest.param(2, 2, 2, "model", 96, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, "expert", 112, marks=pytest.mark.slow),  # a square whose rows do not split evenly
    ],
)
def test_ring(data, expert, model, over, R, monkeypatch):
    """The same in two halves, the second under way beside the first one's kernels: results, and gradients."""
    monkeypatch.setattr(moe_parallel, "exchange_axes", lambda *_: (over,))
    rows = ("data", "fsdp", "expert", "model")
    mesh = make_mesh(data=data, expert=expert, model=model)
    place = moe_parallel.island(mesh.shape, {**RULES["serve"], "batch": rows})
    island = jax.shard_map(
        functools.partial(moe_parallel.run, "ring", moe.grouped, place, "tpu"),
        mesh=mesh,
        in_specs=(*[PartitionSpec(rows)] * 3, *[PartitionSpec(place.experts)] * 3),
        out_specs=PartitionSpec(rows),
        check_vma=False,
    )
    assert_equals_oracle(island, R)


def test_ring_between_slices_of_experts(monkeypatch):
    """Every expert's width is split over `fsdp`, whose rows are collected before the ring and summed behind it."""
    monkeypatch.setattr(moe_parallel, "exchange_axes", lambda *_: ("expert",))
    mesh = make_mesh(fsdp=2, expert=2, model=2)
    place = moe_parallel.island(mesh.shape, {**RULES["prefill"], "length": RULES["prefill"]["stream"]})
    assert (place.shared, place.slices) == (("expert", "model"), ("fsdp",))
    rows = PartitionSpec(place.rows)
    wide, tall = PartitionSpec(place.experts, "fsdp"), PartitionSpec(place.experts, None, "fsdp")
    island = jax.shard_map(
        functools.partial(moe_parallel.run, "ring", moe.grouped, place, "tpu"),
        mesh=mesh,
        in_specs=(rows, rows, rows, wide, wide, tall),
        out_specs=rows,
        check_vma=False,
    )
    assert_equals_oracle(island, 128, ("random", "one shard"))


def test_experts_apart_from_rows():
    """No axis splits both rows and experts, so everybody has the rows already."""
    rules = {**RULES["serve"], "batch": ("data",)}
    for algorithm in ("replicated", "gather"):
        ops = ops_mesh.on_mesh(ORACLE, make_mesh(data=2, expert=2, model=2), rules, experts=algorithm)
        assert_equals_oracle(ops.moe, 13, ("random",))


@pytest.mark.parametrize(
    ("shape", "rows", "choices", "platform", "name"),
    [
        ({"expert": 1, "model": 8}, 4096, 8, "tpu", "replicated"),  # nothing to collect
        ({"expert": 4, "model": 4}, 16, 8, "tpu", "replicated"),  # decoding
        ({"expert": 4, "model": 1}, 512, 8, "cpu", "gather"),  # 3 rows collected against 4 * 0.90 exchanged
        ({"expert": 4, "model": 4}, 1024, 8, "cpu", "all_to_all"),  # 3 against 4 * 0.40
        ({"expert": 4, "model": 4}, 1024, 8, "tpu", "all_to_all"),
        ({"expert": 4, "model": 4}, 1024, 8, "cuda", "ragged_all_to_all"),
        ({"expert": 16, "model": 1}, 256, 8, "tpu", "gather"),  # 15 against 16 * 0.40 over 4 links of a ring each
        ({"expert": 16, "model": 1}, 256, 8, "cuda", "ragged_all_to_all"),  # through a switch
    ],
)
def test_choice(shape, rows, choices, platform, name):
    place = moe_parallel.island({"data": 1, "fsdp": 1, **shape}, RULES["serve"])
    assert moe_parallel.choose(place, rows=rows, choices=choices, platform=platform) == name


def test_exchange_axes():
    """4 x 4 on a TPU: collect over one, exchange over the other, 3 + 16 * 0.40 rows, beats 15 and 4 * 16 * 0.40."""
    rules = {**RULES["serve"], "batch": ("data", "expert", "model")}
    place = moe_parallel.island({"data": 1, "fsdp": 1, "expert": 4, "model": 4}, rules)
    assert len(moe_parallel.exchange_axes(place, 8, "tpu")) == 1
    assert moe_parallel.exchange_axes(place, 8, "gpu") == ("expert", "model")
    assert moe_parallel.choose(place, rows=256, choices=8, platform="tpu") == "ring"


def test_unknown_algorithm():
    ops = ops_mesh.on_mesh(XLA, make_mesh(expert=8), RULES["serve"], experts="magic")
    x, weights, *stacks = arrays(8)
    with pytest.raises(ValueError, match="'magic' is unknown: use replicated, gather"):
        ops.moe(x, weights, routing("random", 8, jax.random.key(0)), *stacks)


@pytest.mark.parametrize(
    ("shape", "platform", "told"),
    [
        ({"expert": 1, "model": 8}, "tpu", "expert=1,model=8 would collect over none and exchange over none"),
        ({"expert": 8, "model": 1}, "tpu", "expert=8,model=1 would collect over none and exchange over expert"),
        (
            {"expert": 4, "model": 4},
            "gpu",
            "expert=4,model=4 would collect over none and exchange over expert and model",
        ),
    ],
)
def test_no_ring(shape, platform, told):
    rules = {**RULES["serve"], "batch": ("data", "expert", *["model"] * (platform == "gpu"))}
    place = moe_parallel.island({"data": 1, "fsdp": 1, **shape}, rules)
    x, weights, *stacks = arrays(8)
    with pytest.raises(ValueError, match=f"'ring' collects .*{told}; use all_to_all"):
        moe_parallel.run(
            "ring", moe.grouped, place, platform, x, weights, routing("random", 8, jax.random.key(0)), *stacks
        )


# Compiled for accelerators that are not here.


def abstract(R: int, sharding, *, E: int, D: int, F: int, stacks=None):
    """Return a layer's arguments in bfloat16, with C = 8."""
    rows, experts = sharding, sharding if stacks is None else stacks
    shapes = [((R, D), rows), ((R, 8), rows), ((R, 8), rows), *(((E, *s), experts) for s in ((F, D), (F, D), (D, F)))]
    dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16]
    return [jax.ShapeDtypeStruct(s, d, sharding=at) for (s, at), d in zip(shapes, dtypes, strict=True)]


@pytest.fixture(scope="module")
def v5e():
    """The 16 chips of a v5e:4x4, described by libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPU needs libtpu: pip install 'qwen3-jax[tpu]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield list(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices)


@pytest.mark.tpu
@pytest.mark.parametrize("R", [64, 2048])
def test_tpu_takes_the_weights_as_they_are(v5e, R):
    """No copy of an expert stack into another layout, and no ragged-dot, which makes one; temporaries stay small."""
    function = functools.partial(moe_tpu.moe, expected=R // 2)
    place = jax.sharding.SingleDeviceSharding(v5e[0])
    compiled = jax.jit(function).lower(*abstract(R, place, E=8, D=1024, F=768)).compile()
    text = str(compiled.as_text())
    layouts = set(re.findall(r"bf16\[8,(?:768,1024|1024,768)\]\{([\d,]+)", text))
    assert layouts == {"2,1,0"}
    assert "ragged-dot" not in text
    assert ("grouped_swiglu" in text) == (R == 2048)
    assert temporaries(compiled) < 16 * R * 1024


@pytest.mark.tpu
@pytest.mark.parametrize("slice_name", ["v5e:2x2", "v5p:2x2x1"])
def test_tpu_gradients_are_as_large_as_their_rows(slice_name):
    """A layer of 30B-A3B, 32 experts here: no product of all rows with all experts, no other layout of a stack."""
    R, E, D, F = 4096, 32, 2048, 768
    slice_ = chips.topology(slice_name)
    place = jax.sharding.SingleDeviceSharding(devices_of(slice_)[0])

    def slopes(slope, x, weights, experts, *stacks):
        run = functools.partial(moe_tpu.moe, expected=2 * R)
        return jax.vjp(lambda x, weights, *stacks: run(x, weights, experts, *stacks), x, weights, *stacks)[1](slope)

    arguments = abstract(R, place, E=E, D=D, F=F)
    compiled = jax.jit(slopes).lower(arguments[0], *arguments).compile()
    text = str(compiled.as_text())
    found = cost.walk(hlo.parse(text), slice_.chip, partitions=1)
    kernels = [line.op_name for line in found.lines for _ in range(int(line.times)) if line.opcode == "custom-call"]
    names = ("grouped_swiglu)", "grouped_swiglu_slopes)", "grouped_outer_product)")
    assert [sum(name in kernel for kernel in kernels) for name in names] == [1, 1, 3]
    assert "ragged" not in text
    # Nothing beside the kernels multiplies: three products of the result, five of its slopes, three of the experts'.
    done = 128 * (2 * R // 128 + E // 2)
    assert found.flops == (3 + 5 + 3) * 2 * done * D * F
    stack = E * D * F * 2
    assert not [move for move in found.moves if move.bytes >= stack]
    assert set(re.findall(rf"\w+\[{E},(?:{D},{F}|{F},{D})\]\{{([\d,]+)", text)) == {"2,1,0"}
    assert temporaries(compiled) < 3 * stack + 16 * R * D * 2


@pytest.mark.tpu
def test_tpu_decodes_with_one_reduction(v5e):
    """Few rows: one transfer collects rows and routes, one reduction sums the experts' outputs."""
    text = compile_on_mesh(v5e, 64, None)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1
    assert not re.search(r" (?:all-to-all|ragged-all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("algorithm", "collective"),
    [(None, "all-to-all"), ("ragged_all_to_all", "ragged-all-to-all")],
)
def test_tpu_exchanges(v5e, algorithm, collective):
    text = compile_on_mesh(v5e, 4096, algorithm)
    assert re.search(rf" {collective}(?:-start)?\(", text)
    assert not re.search(r" all-gather(?:-start)?\(", text)


def compile_on_mesh(devices, R: int, algorithm: str | None) -> str:
    mesh = make_mesh(expert=4, model=4, devices=devices)
    ops = ops_mesh.on_mesh(XLA._replace(moe=moe_tpu.moe), mesh, RULES["serve"], experts=algorithm)
    rows, stacks = (NamedSharding(mesh, PartitionSpec(axes)) for axes in ("expert", ("expert", "model")))
    compiled = jax.jit(ops.moe).lower(*abstract(R, rows, E=64, D=512, F=256, stacks=stacks)).compile()
    return str(compiled.as_text())


def temporaries(compiled: Any) -> int:
    """Return the bytes of a compiled program's temporaries on one device."""
    return compiled.memory_analysis().temp_size_in_bytes


def test_gpu_compiles_for_h100():
    """Temporaries of a layer: rows and results, not the gigabytes of XLA's own ragged_dot."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("compiling for GPU needs jax's CUDA plugin: pip install 'qwen3-jax[cuda]'")
    described = topologies.get_topology_desc("x", platform="cuda", topology="1x1x8", target_config=TARGETS["H100"])
    place = jax.sharding.SingleDeviceSharding(described.devices[0])
    arguments = abstract(1024, place, E=64, D=2048, F=768)

    def slopes(x, weights, experts, *stacks):
        return jax.grad(lambda x, *stacks: jnp.sum(moe_gpu.moe(x, weights, experts, *stacks)))(x, *stacks)

    jax.jit(slopes).lower(*arguments).compile()
    ours, xlas = (jax.jit(f).lower(*arguments).compile() for f in (moe_gpu.moe, moe.grouped))
    assert temporaries(ours) < 128 * 2**20 < 1024 * 2**20 < temporaries(xlas)


@pytest.mark.parametrize("rows", [64, 512, 3200, 4096, 6400])
def test_tiles_are_as_many_as_a_fair_router_fills_and_as_high_as_wastes_least(rows):
    """Against routers drawn by lot: each row is one of an expert's with a chance of 8 in 128."""
    drawn = np.random.default_rng(rows).binomial(rows, 8 / 128, 100_000)
    multiplied = {}
    for height in range(128, 257, 16):
        tiles = np.mean(-(-drawn // height))
        assert moe_tpu_tiles.expected_tiles(rows * 8 / 128, height) == pytest.approx(tiles, rel=0.03)
        multiplied[height] = height * tiles
    assert multiplied[moe_tpu_tiles.best_height(rows * 8 / 128)] <= 1.02 * min(multiplied.values())
