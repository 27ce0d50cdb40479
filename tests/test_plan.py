"""Plans without a compiler: the walker on kept HLO texts against hand counts, the schedule, chips, meshes, errors."""

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import model as models
from qwen3_jax import sharding
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import plain
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.moe import UNLIKELY
from qwen3_jax.plan import chips, compile, cost, fleet, hlo, meshes, moves, programs, result, show
from qwen3_jax.sampling_params import SamplingParams
from tests.tpu_programs import CASES, FOLDER, MIB

V5E = chips.chip("v5e")
UNIT = dataclasses.replace(V5E, bf16_flops=1.0, hbm_bytes_s=1.0, link_bytes_s=0.5)
"""One second per FLOP, per byte, and per byte on a ring."""


def walk(text: str, chip: chips.Chip = V5E, partitions: int = 4) -> cost.Cost:
    return cost.walk(hlo.parse(text), chip, partitions=partitions)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_program_costs_what_a_hand_counts(name):
    case = CASES[name]
    found = walk((FOLDER / f"{name}.txt").read_text())
    assert not found.unpriced
    assert found.flops == case.flops
    assert found.ici_bytes == case.ici_bytes
    assert found.copied_bytes == case.copied_bytes
    if case.hbm_bytes is not None:
        assert found.hbm_bytes == pytest.approx(case.hbm_bytes, rel=0.01)


def test_an_update_in_place_costs_its_rows():
    assert walk((FOLDER / "append.txt").read_text()).hbm_bytes < 64 << 10


def test_collectives_are_counted_by_kind():
    kinds = {name: walk((FOLDER / f"{name}.txt").read_text()).collectives for name in CASES}
    assert {k: c.count for k, c in kinds["row_parallel"].items()} == {"all-reduce": 1}
    assert {k: c.count for k, c in kinds["gathered"].items()} == {"all-gather": 1}
    assert {k: c.count for k, c in kinds["exchanged"].items()} == {"all-to-all": 1}
    assert {k: c.count for k, c in kinds["shifted"].items()} == {"collective-permute": 1}
    assert kinds["row_parallel"]["all-reduce"].bytes == 12 * MIB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("f32[9,130]{1,0:T(8,128)}", 16 * 256 * 4),
        ("bf16[2,128]{1,0:T(2,128)(2,1)}", 512),
        ("bf16[3,4096,1,128]{3,2,1,0:T(2,128)(2,1)}", 3 * 4096 * 2 * 128 * 2),
        ("bf16[3,100,128]{1,2,0:T(8,128)(2,1)}", 3 * 128 * 128 * 2),
        ("bf16[5]{0:T(1024)(128)(2,1)}", 2048),
        ("s32[]{:T(128)}", 512),
        ("s4[64,128]{1,0:T(64,128)(8,1)E(4)}", 4096),
        ("pred[7]{0}", 7),
        ("f32[0,128]{1,0:T(8,128)}", 0),
    ],
)
def test_sizes_are_padded_to_tiles(text, size):
    shape = hlo.parse_type(text)
    assert isinstance(shape, hlo.Shape)
    assert shape.bytes == size


def test_types_nest_and_carry_their_memory_space():
    shape = hlo.parse_type("((bf16[8,128]{1,0:T(8,128)(2,1)}), /*index=1*/f32[4]{0:T(128)S(1)}, u32[]{:S(2)})")
    assert [(leaf.dtype, leaf.space) for leaf in hlo.leaves(shape)] == [("bf16", 0), ("f32", 1), ("u32", 2)]


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("[4,2]<=[8]", (0, 1)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
        ("{}", tuple(range(16))),
    ],
)
def test_groups(groups, members):
    line = f"  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert hlo.group(hlo._instruction(line), 16) == members


def test_the_floor_of_padding_and_text_that_is_not_hlo():
    with pytest.raises(hlo.HloError, match="HloModule"):
        hlo.parse("module @jit_f {}\n")
    with pytest.raises(hlo.HloError, match="ENTRY"):
        hlo.parse("HloModule m\n\n")


def program(body: str, *, others: str = "", parameters: str = "p: f32[25]") -> str:
    return f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main ({parameters}) -> f32[25] {{\n{body}\n}}\n"


ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
ADD += "  ROOT %s = f32[] add(%a, %b)\n}\n"


def test_the_schedule_overlaps_what_the_program_lets_overlap():
    # 100 bytes into VMEM while 60 FLOPs run on what is there already: 100 s, then 10 FLOPs that need the copy.
    body = """\
  %p = f32[25]{0} parameter(0)
  %v = f32[5,6]{1,0:S(1)} parameter(1)
  %start = (f32[25]{0:S(1)}, f32[25]{0}, u32[]{:S(2)}) copy-start(%p)
  %busy = f32[5]{0:S(1)} dot(%v, %v), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %done = f32[25]{0:S(1)} copy-done(%start)
  ROOT %last = f32[1]{0:S(1)} dot(%done, %done), lhs_contracting_dims={0}, rhs_contracting_dims={0}"""
    found = walk(program(body), UNIT)
    assert (found.hbm_s, found.compute_s) == (100, 60 + 50)
    assert found.schedule_s == 150


def test_the_schedule_waits_for_one_pipe_at_a_time():
    # Two synchronous all-reduces of 100 bytes over 4: each sends 150; nothing runs beside them.
    body = """\
  %p = f32[25]{0:S(1)} parameter(0)
  %r = f32[25]{0:S(1)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %q = f32[25]{0:S(1)} all-reduce(%r), replica_groups={{0,1,2,3}}, to_apply=%add"""
    found = walk(program(body, others=ADD), UNIT)
    assert found.schedule_s == found.ici_s == found.ici_bytes == 300


def test_asynchronous_collectives_in_fusions_are_billed_once_and_overlap():
    # 100 bytes in HBM are gathered into 400 there, and both go from fusion to fusion until the last waits; beside that
    # one of them multiplies 120 bytes of VMEM. 300 bytes over the links, 500 in HBM, however long the chain.
    others = """\
%begin (p: f32[25]) -> (f32[25], f32[100]) {
  %p = f32[25]{0} parameter(0)
  %g = f32[100]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (f32[25]{0}, f32[100]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%carry (p: f32[25], q: f32[100], v: f32[5,6]) -> (f32[5], f32[25], f32[100], f32[100]) {
  %p = f32[25]{0} parameter(0)
  %q = f32[100]{0} parameter(1)
  %v = f32[5,6]{1,0:S(1)} parameter(2)
  %g = f32[100]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[5]{0:S(1)} dot(%v, %v), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (f32[5]{0:S(1)}, f32[25]{0}, f32[100]{0}, f32[100]{0}) tuple(%d, %p, %q, %g)
}
%end (p: f32[25], q: f32[100]) -> f32[100] {
  %p = f32[25]{0} parameter(0)
  %q = f32[100]{0} parameter(1)
  %g = f32[100]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = f32[100]{0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}
"""
    shapes = "(f32[5]{0:S(1)}, f32[25]{0}, f32[100]{0}, f32[100]{0})"
    body = """\
  %p = f32[25]{{0}} parameter(0)
  %v = f32[5,6]{{1,0:S(1)}} parameter(1)
  %s = (f32[25]{{0}}, f32[100]{{0}}) fusion(%p), kind=kCustom, calls=%begin
  %x = f32[25]{{0}} get-tuple-element(%s), index=0
  %y = f32[100]{{0}} get-tuple-element(%s), index=1{carried}
  ROOT %e = f32[100]{{0}} fusion(%x, %y), kind=kCustom, calls=%end"""
    for carriers in (0, 1, 3):
        carried = "".join(f"\n  %m{n} = {shapes} fusion(%x, %y, %v), calls=%carry" for n in range(carriers))
        found = walk(program(body.format(carried=carried), others=others), UNIT)
        assert found.ici_bytes == 300
        assert found.collectives["all-gather"].count == 1
        assert found.hbm_bytes == 500
        assert found.compute_s == 60 * carriers
        assert found.schedule_s == 500


LOOP = """\
%body (t: (s32[], f32[25])) -> (s32[], f32[25]) {
  %t = (s32[], f32[25]{0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%t), index=0
  %x = f32[25]{0} get-tuple-element(%t), index=1
  %one = s32[]{:S(6)} constant(STEP)
  %next = s32[]{:S(6)} add(%i, %one)
  %y = f32[25]{0} negate(%x)
  ROOT %u = (s32[], f32[25]{0}) tuple(%next, %y)
}
%test (t: (s32[], f32[25])) -> pred[] {
  %t = (s32[], f32[25]{0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%t), index=0
  %n = s32[]{:S(6)} constant(10)
  ROOT %c = pred[]{:S(6)} compare(%i, %n), direction=DIRECTION
}
"""


@pytest.mark.parametrize(
    ("step", "direction", "trips"), [(1, "LT", 10), (1, "LE", 11), (3, "LT", 4), (2, "NE", 5), (-1, "GE", 0)]
)
def test_loops_cost_their_trip_count(step, direction, trips):
    body = """\
  %p = f32[25]{0} parameter(0)
  %zero = s32[]{:S(6)} constant(0)
  %t = (s32[], f32[25]{0}) tuple(%zero, %p)
  %w = (s32[], f32[25]{0}) while(%t), condition=%test, body=%body
  ROOT %out = f32[25]{0} get-tuple-element(%w), index=1"""
    text = program(body, others=LOOP.replace("STEP", str(step)).replace("DIRECTION", direction))
    found = walk(text, UNIT)
    assert found.hbm_bytes == 200 * trips
    assert not found.unpriced
    if trips:
        assert found.schedule_s == 200 * trips


def test_a_loop_of_unknown_length_is_billed_once_and_named_or_not_at_all_where_the_program_expects_none():
    body = """\
  %p = f32[25]{0} parameter(0)
  %start = s32[]{:S(6)} parameter(1)
  %t = (s32[], f32[25]{0}) tuple(%start, %p)
  %w = (s32[], f32[25]{0}) while(%t), condition=%test, body=%body
  ROOT %out = f32[25]{0} get-tuple-element(%w), index=1"""
    found = walk(program(body, others=LOOP.replace("STEP", "1").replace("DIRECTION", "LT")), UNIT)
    assert found.hbm_bytes == 200
    assert found.billed_once == ["w"]
    unlikely = body.replace("body=%body", f'body=%body, metadata={{op_name="jit(f)/{UNLIKELY}/while"}}')
    found = walk(program(unlikely, others=LOOP.replace("STEP", "1").replace("DIRECTION", "LT")), UNIT)
    assert found.hbm_bytes == found.schedule_s == 0
    assert not found.billed_once
    assert found.not_billed == [f"jit(f)/{UNLIKELY}/while"]


def test_a_conditional_costs_its_dearest_branch():
    others = """\
%cheap (x: f32[25]) -> f32[25] {
  ROOT %x = f32[25]{0} parameter(0)
}
%dear (x: f32[25]) -> f32[25] {
  %x = f32[25]{0} parameter(0)
  ROOT %y = f32[25]{0} negate(%x)
}
"""
    body = """\
  %p = f32[25]{0} parameter(0)
  %which = s32[]{:S(6)} parameter(1)
  ROOT %c = f32[25]{0} conditional(%which, %p, %p), branch_computations={%cheap, %dear}"""
    found = walk(program(body, others=others), UNIT)
    assert found.hbm_bytes == found.schedule_s == 200


def test_a_kernel_costs_its_estimate_less_what_lies_in_vmem():
    config = {"custom_call_config": {"cost_estimate": {"flops": "40", "bytes_accessed": "300"}}}
    body = f"""\
  %p = f32[25]{{0:S(1)}} parameter(0)
  ROOT %k = f32[25]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={json.dumps(config)}"""
    found = walk(program(body), UNIT)
    assert (found.flops, found.hbm_bytes, found.unpriced) == (40, 200, [])


def test_a_kernel_without_an_estimate_is_named():
    body = """\
  %p = f32[25]{0} parameter(0)
  ROOT %k = f32[25]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={}"""
    found = walk(program(body), UNIT)
    assert found.hbm_bytes == 200
    assert found.unpriced == ["k: Pallas kernel without CostEstimate"]


@pytest.mark.parametrize(
    ("size", "links_s"),
    [(2, 2.0), (4, 1.5), (8, 1.75), (1, 0.0)],
)
def test_a_group_of_two_has_one_link(size, links_s):
    groups = ",".join(str(i) for i in range(size))
    body = f"""\
  %p = f32[25]{{0:S(1)}} parameter(0)
  ROOT %r = f32[25]{{0:S(1)}} all-reduce(%p), replica_groups={{{{{groups}}}}}, to_apply=%add"""
    assert walk(program(body, others=ADD), UNIT).ici_s == 100 * links_s


@pytest.mark.parametrize(
    ("second", "known", "seconds"),
    [
        ("{{0,2},{2,0},{1,3},{3,1}}", True, 200),  # along the other axis
        ("{{0,2},{2,0},{1,3},{3,1}}", False, 400),
        ("{{0,1},{1,0},{2,3},{3,2}}", True, 400),  # along the same
        ("{{0,3},{3,0},{1,2},{2,1}}", True, 400),  # along both
    ],
)
def test_axes_of_the_torus_are_different_wires(second, known, seconds):
    """Four chips in a square, a permute of 100 bytes along the first axis and one more, both under way together."""
    first, both = "{{0,1},{1,0},{2,3},{3,2}}", "(f32[25]{0:S(1)}, f32[25]{0:S(1)})"
    body = f"""\
  %p = f32[25]{{0:S(1)}} parameter(0)
  %a = {both} collective-permute-start(%p), source_target_pairs={first}
  %b = {both} collective-permute-start(%p), source_target_pairs={second}
  %c = f32[25]{{0:S(1)}} collective-permute-done(%a)
  ROOT %d = f32[25]{{0:S(1)}} collective-permute-done(%b)"""
    places = [(0, 0), (1, 0), (0, 1), (1, 1)] if known else ()
    found = cost.walk(hlo.parse(program(body)), UNIT, partitions=4, places=places)
    assert found.schedule_s == found.ici_s == seconds
    assert found.ici_bytes == 200


def test_gpus_send_through_a_switch():
    body = """\
  %p = f32[25]{0} parameter(0)
  ROOT %r = f32[25]{0} all-to-all(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"""
    found = walk(program(body), dataclasses.replace(UNIT, kind="gpu", links=18), partitions=8)
    assert found.ici_s == pytest.approx(100 * 7 / 8 / (18 * UNIT.link_bytes_s))


def test_a_ragged_exchange_sends_its_rows_only():
    body = """\
  %p = f32[25]{0:S(1)} parameter(0)
  %o = f32[25]{0:S(1)} parameter(1)
  %i = s32[4]{0:S(1)} parameter(2)
  ROOT %r = f32[25]{0:S(1)} ragged-all-to-all(%p, %o, %i, %i, %i, %i), replica_groups={{0,1,2,3}}"""
    assert walk(program(body), UNIT).ici_bytes == 75


def test_a_sparse_core_scatters():
    """It starts like a call: five places are read and written, their numbers and what is added are read."""
    kinds = "f32[25], s32[5], f32[5]"
    body = f"""\
  %p = f32[25]{{0}} parameter(0)
  %i = s32[5]{{0}} parameter(1)
  %u = f32[5]{{0}} parameter(2)
  %start = (({kinds}), f32[25]{{0}}, u32[]{{:S(8)}}) call-start(%p, %i, %u), to_apply=%scatter
  ROOT %done = f32[25]{{0}} call-done(%start)"""
    scatter = """\
%scatter (a: f32[25], b: s32[5], c: f32[5]) -> f32[25] {
  %a = f32[25]{0} parameter(0)
  %b = s32[5]{0} parameter(1)
  %c = f32[5]{0} parameter(2)
  ROOT %s = f32[25]{0} scatter(%a, %b, %c), to_apply=%add
}
"""
    found = walk(program(body, others=ADD + "\n" + scatter, parameters="p: f32[25], i: s32[5], u: f32[5]"), UNIT)
    assert found.hbm_bytes == 5 * 4 * (2 + 1 + 1)


def test_a_gathered_parameter_is_reported():
    body = """\
  %p = f32[32768]{0} parameter(0)
  ROOT %r = f32[131072]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}"""
    found = walk(program(body), UNIT)
    assert [(move.opcode, move.parameter) for move in found.gathered] == [("all-gather", 0)]


# Chips, meshes, arithmetic


def test_every_chip_names_its_source():
    for name, chip in chips.chips().items():
        assert chip.source, name
        assert chip.topologies, name
        assert min(chip.bf16_flops, chip.hbm_bytes, chip.hbm_bytes_s) > 0, name
        assert (chip.link_bytes_s > 0) == (chip.links > 0), name


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v7x:2x2", "H100:3", "v5e:4x4x4x4"])
def test_a_topology_that_does_not_exist_is_refused_in_one_line(name):
    with pytest.raises(chips.ChipError) as caught:
        chips.topology(name)
    assert "\n" not in str(caught.value)
    assert name.split(":")[0] in str(caught.value)


def test_devices_are_counted_per_chip():
    assert chips.topology("v5p:2x2x4").devices == 16
    assert chips.topology("tpu7x:2x2x1").devices == 8
    assert chips.topology("h100:8").devices == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "Qwen3-9B"}, "Qwen3-8B"),
        ({"slice_name": "v5e:5x5"}, "v5e:4x4"),
        ({"dtype": "int3"}, "bfloat16"),
        ({"mesh": "model=3,data=1"}, "3"),
        ({"mesh": "modle=4"}, "modle"),
        ({"mesh": "model=2"}, "has 4"),
        ({"mesh": "data=4", "batch": 6}, "batch 6"),
        ({"context": 10**6}, "40960"),
        ({"batch": 0}, "at least 1"),
        ({"phases": ("train",)}, "prefill, first, decode"),
        ({"model": "Qwen3-235B-A22B"}, "more than a chip's"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, message):
    settled = {"model": "Qwen3-8B", "slice_name": "v5e:2x2", "batch": 32, "context": 4096} | arguments
    with pytest.raises(result.PlanError, match=message) as caught:
        compile.plan(settled.pop("model"), settled.pop("slice_name"), **settled)
    assert "\n" not in str(caught.value)


def test_meshes_cover_the_devices():
    dense, moe = (Qwen3Config.from_name(name) for name in ("Qwen3-8B", "Qwen3-30B-A3B"))
    assert len(meshes.meshes(dense, 8)) == 4
    for mesh in meshes.meshes(moe, 16):
        assert math.prod(mesh.values()) == 16
    assert len(meshes.meshes(moe, 16)) == len({tuple(m.values()) for m in meshes.meshes(moe, 16)}) == 15


def test_experts_are_cut_only_where_whole_ones_do_not_fit():
    shape = {"phases": ("decode",), "batch": 64, "context": 8192, "dtype": "bfloat16"}
    coder = Qwen3Config.from_name("Qwen3-Coder-480B-A35B-Instruct")
    ranked, refused = meshes.rank(coder, chips.topology("v6e:8x8"), **shape)
    assert all(2560 % (c.mesh["fsdp"] * 128) == 0 and c.mesh["fsdp"] > 1 for c in ranked)
    assert any(r.mesh["fsdp"] == 1 and "more than a chip's" in r.reason for r in refused)
    best = ranked[0].mesh
    assert best == {"data": 1, "fsdp": 2, "expert": 4, "model": 8}
    experts = {rest: 62 * 3 * 160 * 6144 * 2560 * 2 // 32 // rest for rest in (1, 2)}  # 160 are 32 times 5
    weights = {
        n: programs.bytes_per_device(coder, best | {"fsdp": n}, ops=plain.XLA, dtype="bfloat16", batch=64, context=8)[0]
        for n in (1, 2)
    }
    assert weights[1] - weights[2] == experts[1] - experts[2]
    for whole in ("Qwen3-30B-A3B", "Qwen3-235B-A22B"):
        ranked, _ = meshes.rank(Qwen3Config.from_name(whole), chips.topology("v6e:8x8"), **shape)
        assert {c.mesh["fsdp"] for c in ranked} == {1}


def test_the_ranking_takes_a_mesh_that_splits_the_cache():
    config = Qwen3Config.from_name("Qwen3-30B-A3B")
    shape = {"phases": ("decode",), "batch": 64, "context": 4096, "dtype": "bfloat16"}
    ranked, refused = meshes.rank(config, chips.topology("v5e:4x4"), **shape)
    best = ranked[0].mesh
    assert math.prod(best.values()) == 16
    assert best["model"] <= config.num_key_value_heads
    assert [c.score for c in ranked] == sorted(c.score for c in ranked)
    assert ranked[0].score == 1
    assert all(r.reason for r in refused)
    assert len(ranked) + len(refused) == 15


def test_one_long_prompt_wants_all_devices_on_it():
    """A batch of one divides over no `expert`, and still that is where its length is split."""
    shape = {"phases": ("prefill",), "batch": 1, "context": 4096, "dtype": "bfloat16"}
    moe, dense = (Qwen3Config.from_name(name) for name in ("Qwen3-30B-A3B", "Qwen3-8B"))
    best = meshes.rank(moe, chips.topology("v5e:4x4"), **shape)[0][0].mesh
    assert best["data"] == 1
    assert best["expert"] > 1
    assert meshes.rank(dense, chips.topology("v5e:2x2"), **shape)[0][0].mesh["model"] == 4


def test_both_phases_weigh_the_same():
    config = Qwen3Config.from_name("Qwen3-8B")
    shape = {"batch": 32, "context": 4096, "dtype": "bfloat16"}
    both, _ = meshes.rank(config, chips.topology("v5e:2x2"), phases=("prefill", "decode"), **shape)
    for candidate in both:
        assert candidate.score >= 2
    assert set(both[0].seconds) == {"prefill", "decode"}


@pytest.mark.parametrize(
    ("name", "slice_name", "phase", "rows", "context", "milliseconds"),
    [
        ("Qwen3-8B", "v5e:2x2", "decode", 32, 4096, 10.52),
        ("Qwen3-8B", "v6e:2x2", "decode", 32, 4096, 5.25),
        ("Qwen3-8B", "v5e:2x2", "prefill", 1, 4096, 78.5),
        ("Qwen3-30B-A3B", "v5e:4x4", "decode", 64, 4096, 6.51),
        ("Qwen3-30B-A3B", "v6e:2x4", "decode", 64, 4096, 6.50),
        ("Qwen3-30B-A3B", "v5e:4x4", "prefill", 1, 4096, 9.19),
        ("Qwen3-235B-A22B", "v5p:2x2x4", "decode", 128, 8192, 15.2),
    ],
)
def test_the_floor_is_the_one_counted_by_hand(name, slice_name, phase, rows, context, milliseconds):
    config = Qwen3Config.from_name(name)
    found = meshes.floor_s(config, chips.topology(slice_name), phase, rows=rows, context=context)
    assert found * 1e3 == pytest.approx(milliseconds, rel=0.003)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B"])
def test_bytes_per_device_add_up(name):
    from qwen3_jax.plan.programs import bytes_per_device

    config = Qwen3Config.from_name(name)
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "model": 1}
    weights, cache = bytes_per_device(config, sizes, ops=plain.XLA, dtype="bfloat16", batch=2, context=1024)
    assert weights == 2 * config.num_parameters()
    assert cache == 2 * 1024 * config.kv_bytes_per_token(2)
    halves, _ = bytes_per_device(config, sizes | {"model": 2}, ops=plain.XLA, dtype="bfloat16", batch=2, context=1024)
    assert weights / 2 < halves < weights / 2 * 1.02  # the norms and the router are whole


def small(name: str) -> Qwen3Config:
    """A released config with everything but its kind made small."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "vocab_size": 512, "bos_token_id": None, "eos_token_id": 1, "intermediate_size": 64}
    config = Qwen3Config.from_name(name)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if config.num_experts else {}
    return dataclasses.replace(config, **sizes | experts)


def test_the_programs_are_the_steps_of_serving():
    """Lowered for virtual CPU devices: every phase traces, kv heads are copied, and decode takes its cache over."""
    config = small("Qwen3-30B-A3B")
    sizes = sharding.parse_mesh("expert=2,model=4")
    devices = sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    lowered = programs.programs(config, devices, ops=plain.XLA, dtype="float32", batch=4, context=32)
    assert list(lowered) == ["prefill", "first", "decode"]
    analysis = lowered["decode"].compile().memory_analysis()
    _, cache = programs.bytes_per_device(config, sizes, ops=plain.XLA, dtype="float32", batch=4, context=32)
    assert analysis is not None
    assert analysis.alias_size_in_bytes >= cache


def test_sampling_collects_candidates_and_no_logits():
    """Penalties, log-probabilities and top_k on a vocabulary that is split over devices."""
    config, mesh = small("Qwen3-8B"), sharding.make_mesh(data=2, model=4)
    asked = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, presence_penalty=1.0, logprobs=5)
    shape = {"dtype": "float32", "batch": 4, "context": 32, "phases": ("first",), "sampling": asked}
    text = programs.programs(config, mesh, ops=plain.XLA, **shape)["first"].compile().as_text()
    assert text is not None
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(", text)
    assert "1,256" in gathered  # 64 candidates of each of four devices, for the one row that a device has
    assert all(math.prod(int(n) for n in shape.split(",")) <= 256 for shape in gathered)


@pytest.mark.parametrize("k", [1, 5, 64])
def test_the_largest_of_a_split_vocabulary(k):
    """The same ids as on one device, the first of equals first."""
    mesh = sharding.make_mesh(data=2, model=4)
    split = on_mesh(plain.XLA, mesh, sharding.RULES["serve"])
    logits = jnp.round(4 * jax.random.normal(jax.random.key(k), (4, 128))) + 0.0  # many are equal, and none -0.0
    chex.assert_trees_all_equal(jax.jit(split.top, static_argnums=1)(logits, k), plain.XLA.top(logits, k))
    values, ids = jax.jit(split.top, static_argnums=(1, 2))(logits, k, 100)
    order = np.argsort(-np.asarray(logits[:, :100] + 0.0), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(np.asarray(logits), order, axis=1))
    some = jnp.array([0, 31, 32, 127])
    np.testing.assert_array_equal(jax.jit(split.pick)(logits, some)[:, 0], np.asarray(logits)[range(4), some])


# Showing


def some_plan(**changes) -> result.Plan:
    found = cost.Cost(flops=4e9, hbm_bytes=8.19e9, ici_bytes=1e6, compute_s=1e-3, hbm_s=1e-2, ici_s=1e-4)
    found = dataclasses.replace(found, schedule_s=1.1e-2, collectives={"all-reduce": cost.Collectives(72, 1e6)})
    step = result.Step(32, result.Memory(4 << 30, 5 << 30, 1 << 20, 1 << 20), found, 5 << 30, 12.0)
    fields = {"model": "Qwen3-8B", "topology": chips.topology("v5e:2x2"), "mesh": {"data": 1, "model": 4}}
    fields |= {"batch": 32, "context": 4096, "dtype": "bfloat16", "steps": {"decode": step}}
    return result.Plan(**fields | changes)


def test_the_json_has_its_stable_keys():
    data = json.loads(show.to_json([some_plan()]))
    wanted = "model topology mesh chips batch context fits hbm_bytes_per_chip hbm_limit_bytes step compile_s"
    assert set(wanted.split()) <= set(data)
    assert set(data["hbm_bytes_per_chip"]) == {"weights", "cache", "temp", "code", "total"}
    decode = data["step"]["decode"]
    wanted = "flops hbm_bytes ici_bytes collectives roofline_s bound copied_bytes aliased_bytes"
    assert set(wanted.split()) <= set(decode)
    assert decode["roofline_s"] == {"compute": 1e-3, "hbm": 1e-2, "ici": 1e-4}
    assert decode["bound"] == "hbm"
    assert data["fits"] is True
    assert data["hbm_bytes_per_chip"]["total"] == sum(
        data["hbm_bytes_per_chip"][part] for part in ("weights", "cache", "temp", "code")
    )


def test_what_a_step_does_to_weights_and_cache_has_their_names():
    def step(params, cache, rows):
        cache = [{"k": layer["k"].at[:, 0].set(rows)} for layer in cache]
        return sum(jnp.sum(layer["k"] * params["layers"][0]["o_proj"]) for layer in cache), cache

    big = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    rows = jax.ShapeDtypeStruct((256,), jnp.float32)
    arguments = ({"layers": [{"o_proj": big}]}, [{"k": big}] * 3, rows)
    for donated, wanted in (((1,), []), ((), [("not donated", "cache.*.k", 3, 3 * 256 * 256 * 4)])):
        module = hlo.parse(jax.jit(step, donate_argnums=donated).lower(*arguments).compile().as_text() or "")
        assert moves.by_array(moves.not_donated(module)) == wanted
        names = {moves.array_name(module, number) for number in range(5)}
        assert names == {"params.layers.0.o_proj", "cache.0.k", "cache.1.k", "cache.2.k", "rows"}


def test_copies_and_gathers_are_shown_by_array():
    from rich.console import Console

    def move(opcode, layer):
        return moves.Move("x", opcode, layer, f"params.layers.{layer}.self_attn.o_proj", 1 << 20, 2, "")

    plain = some_plan()
    step = plain.steps["decode"]
    found = dataclasses.replace(step.cost, moves=[move("copy", 0), move("copy", 7)], gathered=[move("all-gather", 1)])
    plan = some_plan(steps={"decode": dataclasses.replace(step, cost=found)})
    array = "params.layers.*.self_attn.o_proj"
    assert json.loads(show.to_json([plan]))["step"]["decode"]["touched"] == [
        {"what": "copy", "array": array, "count": 4, "bytes": 4 << 20},
        {"what": "all-gather", "array": array, "count": 2, "bytes": 2 << 20},
    ]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show.table(plan))
    assert array in console.export_text()
    assert array in show.page([plan])
    clean = "no weight and no part of the cache is copied, sent or left undonated"
    assert clean not in show.page([plan])
    assert clean in show.page([plain])


def test_a_plan_that_does_not_fit_says_by_how_much():
    from rich.console import Console

    step = some_plan().steps["decode"]
    heavy = dataclasses.replace(step, memory=dataclasses.replace(step.memory, cache=20 << 30))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show.table(some_plan(steps={"decode": heavy})))
    shown = console.export_text()
    assert "does not fit by 9.77 GB" in shown
    assert "all-reduce" in shown


def test_the_page_draws_every_phase():
    page = show.page([some_plan(), some_plan(model="<b>")])
    assert page.count("<svg") == 2
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_the_script_leaves_out_what_has_no_compiler(monkeypatch, capsys):
    path = Path(__file__).parents[1] / "scripts" / "pods.py"
    spec = importlib.util.spec_from_file_location("pods", path)
    assert spec is not None
    assert spec.loader is not None
    pods = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pods", pods)
    spec.loader.exec_module(pods)
    monkeypatch.setattr(importlib.util, "find_spec", found_by_path)
    monkeypatch.setattr(sys, "argv", ["pods.py", "--only", "Qwen3-8B_H100"])
    pods.main()
    said = capsys.readouterr()
    assert "left out, needs pip install 'qwen3-jax[cuda]'" in said.err
    assert not said.out


def found_by_path(name, package=None):
    """`importlib.util.find_spec` where nothing of `jax_plugins` is installed."""
    if name.startswith("jax_plugins."):
        raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}")
    return None


# The fleet


def test_the_fleet_holds_weights_and_cache():
    config = Qwen3Config.from_name("Qwen3-8B")
    weights = fleet.weight_bytes(config, "bfloat16")
    assert weights == 2 * config.num_parameters()
    rows = {(r.model, r.dtype, r.context): r for r in fleet.table(["Qwen3-8B"])}
    short = rows["Qwen3-8B", "bfloat16", 4096].smallest
    assert short["L4"] == 1  # 16.4 GB of weights and 0.6 GB of cache on 24 GB
    assert short["T4"] == 4
    assert rows["Qwen3-8B", "int4", 4096].smallest["T4"] == 1


def test_int4_keeps_what_is_not_a_matrix_product_in_bfloat16():
    config = Qwen3Config.from_name("Qwen3-0.6B")
    _, abstract = models.declare(config, dtype=jnp.bfloat16, ops=plain.XLA)
    products = sum(leaf.size for leaf in jax.tree.leaves(abstract["layers"]) if leaf.ndim > 1)
    rest = config.num_parameters() - products
    scales = products / fleet.GROUP * 2
    assert fleet.weight_bytes(config, "int4") == pytest.approx(products / 2 + scales + 2 * rest)
