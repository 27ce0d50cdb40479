"""What libtpu on this host compiles today: the calibration programs, and the steps of serving on real slices.

No TPU is needed. Models have their real widths and two layers, so that the whole file takes a few minutes; the figures
at full depth are those of scripts/pods.py.
"""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import placement, sharding
from qwen3_jax.config import Qwen3Config
from qwen3_jax.engine.programs import Programs
from qwen3_jax.model import declare
from qwen3_jax.ops import for_platform
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.paged import paged
from qwen3_jax.plan import chips, compile, cost, hlo, programs, result
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.sharding import RULES, make_mesh, parse_mesh
from qwen3_jax.steps import Steps
from qwen3_jax.train import planning
from tests.tpu_programs import CASES, compile_case

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'qwen3-jax[tpu]'"
    ),
]
LAYERS = 2


@pytest.mark.parametrize("name", CASES)
def test_the_compiler_at_hand_costs_what_a_hand_counts(name):
    case = CASES[name]
    text, memory = compile_case(case)
    slice_ = chips.topology(case.topology)
    found = cost.walk(hlo.parse(text), slice_.chip, partitions=slice_.devices)
    assert (found.flops, found.ici_bytes, found.unpriced) == (case.flops, case.ici_bytes, [])
    if case.hbm_bytes is not None:
        assert found.hbm_bytes == pytest.approx(case.hbm_bytes, rel=0.01)
    if name == "append":
        assert memory.alias_size_in_bytes == 512 << 20


def shallow(name: str) -> Qwen3Config:
    return dataclasses.replace(Qwen3Config.from_name(name), num_hidden_layers=LAYERS)


def compiled(folder: Path, name: str, slice_name: str, mesh: str, phase: str, batch: int) -> tuple[result.Step, str]:
    config = shallow(name)
    sizes, found, text = parse_mesh(mesh), chips.topology(slice_name), folder / "program.hlo"
    step = compile.compile_step(config, found, sizes, phase, batch=batch, context=4096, dtype="bfloat16", hlo_file=text)
    return step, text.read_text()


def arrays_gathered(step: result.Step) -> float:
    """The mean bytes that a chip sends in an all-gather."""
    found = step.cost.collectives.get("all-gather")
    return found.bytes / found.count if found else 0.0


@pytest.mark.parametrize(
    ("name", "slice_name", "mesh", "batch"),
    [
        ("Qwen3-8B", "v5e:2x2", "model=4", 32),
        ("Qwen3-8B", "v5e:2x4", "model=8", 32),  # a device's four heads do not fill a tile of o_proj
        ("Qwen3-30B-A3B", "v6e:2x4", "expert=2,model=4", 64),
        ("Qwen3-Coder-480B-A35B-Instruct", "v6e:8x8", "fsdp=2,expert=4,model=8", 64),  # half of every expert
        ("Qwen3-235B-A22B", "v5p:2x2x4", "expert=2,model=8", 64),  # twice as many devices on `model` as kv heads
    ],
)
def test_decode_moves_what_it_must_and_nothing_else(name, slice_name, mesh, batch, tmp_path):
    step, text = compiled(tmp_path, name, slice_name, mesh, "decode", batch)
    config, devices = shallow(name), chips.topology(slice_name).devices
    assert step.cost.copied_bytes == 0
    assert not step.cost.gathered  # no weight and no cache goes over the links
    assert not step.cost.unpriced
    # The cache is donated, updated in place, and split over every chip.
    sizes = parse_mesh(mesh)
    copies = max(1, sizes["model"] // config.num_key_value_heads)
    assert step.memory.cache == batch * 4096 * config.kv_bytes_per_token(2) * copies // devices
    assert step.aliased_bytes >= step.memory.cache
    # Weights (but for the embedding's rows) and cache are read once; all else is small.
    embedding = 2 * config.vocab_size * config.hidden_size // (sizes["expert"] * sizes["model"])
    must = step.memory.weights - embedding + step.memory.cache
    assert must < step.cost.hbm_bytes < 1.1 * must
    # Logits stay where the vocabulary is: only candidates are collected.
    assert arrays_gathered(step) < batch * config.vocab_size * 4 / 16
    if config.num_experts:  # whole experts: their width is cut by `fsdp` alone
        local = config.num_experts // (sizes["expert"] * sizes["model"])
        width = config.moe_intermediate_size // sizes["fsdp"]
        assert f"bf16[{local},{width},{config.hidden_size}]" in entry(text)


@pytest.mark.parametrize(
    ("name", "slice_name", "mesh"),
    [("Qwen3-8B", "v5e:2x2", "model=4"), ("Qwen3-30B-A3B", "v5e:4x4", "expert=4,model=4")],
)
def test_a_prefill_of_one_prompt_uses_all_chips_and_no_head(name, slice_name, mesh, tmp_path):
    step, _ = compiled(tmp_path, name, slice_name, mesh, "prefill", 1)
    config, devices = shallow(name), chips.topology(slice_name).devices
    assert step.cost.copied_bytes == 0
    assert not step.cost.gathered
    assert not step.cost.unpriced
    # The head on 4096 positions alone would be 2 · V · D · 4096 / devices FLOPs, a layer or more.
    layers = 4096 * (config.flops_per_token(4096) - 2 * config.vocab_size * config.hidden_size) / devices
    assert step.cost.flops < 1.35 * layers


def test_a_servers_chunk_is_split_over_all_chips_and_written_in_place():
    """The engine's prefill call, 512 tokens of one prompt behind what its pages hold."""
    config, found = shallow("Qwen3-30B-A3B"), chips.topology("v5e:4x4")
    mesh, rules = make_mesh(expert=4, model=4, devices=compile.devices_of(found)), RULES["prefill"]
    chunk, page, pages, dtype = 512, 16, 8192, jnp.dtype(jnp.bfloat16)
    config = placement.for_mesh(config, mesh, rules)
    ops = paged(on_mesh(for_platform("tpu"), mesh, rules), platform="tpu", mesh=mesh, rules=rules)
    graphdef, params = declare(config, dtype=dtype, ops=ops)
    whole = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype=jnp.int32, at=whole):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

    params = placement.abstract(params, config, mesh, rules, ops=ops)
    empty = jax.eval_shape(lambda: ops.init_cache(pages, page, config.num_key_value_heads, config.head_dim, dtype))
    places = sharding.shardings([ops.cache_axes] * LAYERS, mesh, rules)
    cache = [{name: array(empty[name].shape, dtype, layer[name]) for name in empty} for layer in places]
    steps = Programs(Steps(graphdef, config, dtype, ops, (), -1), graphdef, 8, chunk)
    prefill = jax.jit(steps.prefill, donate_argnums=1, out_shardings=(places, whole, whole))
    arguments = params, cache, array((1, 4096 // page)), array((1, chunk)), array((1,)), array((1,))
    with jax.set_mesh(mesh):
        cost, memory, _ = compile.compiled(lambda: prefill.lower(*arguments), found, mesh)
    assert cost.copied_bytes == 0
    assert not cost.gathered
    assert not cost.unpriced
    assert (
        memory.alias_size_in_bytes >= 2 * LAYERS * config.num_key_value_heads // 4 * pages * page * config.head_dim * 2
    )
    # The residual stream stays split: what is summed over all chips is statistics of the router, not activations.
    assert cost.collectives["all-reduce"].bytes < chunk * config.hidden_size


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_a_training_step_keeps_its_moments_where_they_are(policy):
    config, found, batch, length = shallow("Qwen3-0.6B"), chips.topology("v5e:2x2"), 4, 2048
    step = planning.compile_step(config, found, parse_mesh("fsdp=4"), policy, batch, length, "bfloat16")
    assert step.cost.unpriced == step.cost.billed_once == []
    assert step.aliased_bytes >= step.memory.weights + step.memory.optimizer
    # Parameters are gathered, layer by layer; what comes first among the arguments, the optimiser's state, is not.
    mesh = make_mesh(fsdp=4, devices=compile.devices_of(found))
    moments = len(jax.tree.leaves(planning.step_on(config, mesh, policy, "bfloat16").abstract_state()["opt"]))
    assert step.cost.gathered
    assert all(move.parameter >= moments for move in step.cost.gathered)
    # Two products forward, three and four backward, over the blocks on or below the diagonal; full computes the forward
    # pass of the layers again but for its last product, dots nothing of it but attention.
    head = 2 * config.vocab_size * config.hidden_size
    layers = config.flops_per_token(0) - head
    pairs = length * (length + 1024) // 2
    attention = 2 * (2 + 2 + 3 + 4) * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    again = layers - 2 * config.num_hidden_layers * config.intermediate_size * config.hidden_size
    tokens = batch * length
    products = tokens * (3 * (layers + head) + (again if policy == "full" else 0)) + batch * attention
    assert step.cost.flops == pytest.approx(products / found.devices, rel=0.01)


def entry(text: str) -> str:
    """Return the header, which holds the layouts of the program's arguments."""
    return text[: text.index("\n")]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=1.0, logprobs=5),
    ],
    ids=["greedy", "whole vocabulary, penalties, logprobs"],
)
def test_sampling_does_not_collect_logits(sampling):
    config, found = shallow("Qwen3-8B"), chips.topology("v5e:2x2")
    mesh = make_mesh(model=4, devices=compile.devices_of(found))
    ops = for_platform("tpu")
    (lowered,) = programs.programs(
        config, mesh, ops=ops, dtype="bfloat16", batch=1, context=64, phases=("first",), sampling=sampling
    ).values()
    text = lowered.compile().as_text()
    assert text is not None
    for shape in re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-gather-start|all-to-all)\(", text):
        assert math.prod(int(n) for n in shape.split(",")) < config.vocab_size // 4, shape


def test_a_mesh_may_cut_an_axis_of_the_torus():
    devices = compile.devices_of(chips.topology("v6e:8x8"))
    assert make_mesh(expert=16, model=4, devices=devices).shape["expert"] == 16


def test_auto_compiles_few_layers_to_choose_and_says_why_the_others_lose(tmp_path):
    data = Qwen3Config.from_name("Qwen3-0.6B").to_dict() | {"num_hidden_layers": 6, "max_window_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(data))
    lines: list[str] = []
    plan = compile.plan(str(tmp_path), "v5e:2x2", batch=8, context=1024, phases=("decode",), progress=lines.append)
    assert plan.error is None
    assert plan.fits
    assert len(plan.refused) == 2  # data=4, data=2 × model=2, model=4: one is chosen
    assert all("ms" in r.reason or "µs" in r.reason for r in plan.refused)
    assert "6 layers" in lines[-1]


def test_a_program_that_does_not_fit_is_a_plan_that_says_so():
    # Weights and cache alone are 15.99 of 16 GB.
    plan = compile.plan("Qwen3-0.6B", "v5e:2x2", batch=16, context=32256, mesh="data=4", phases=("decode",))
    assert plan.steps["decode"].memory.weights + plan.steps["decode"].memory.cache < 16e9
    assert not plan.fits
