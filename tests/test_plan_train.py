"""Plans of the training step: the step on eight CPU devices against counts by hand, meshes, policies, errors."""

import dataclasses
import json
import math

import jax
import pytest
from rich.console import Console

from qwen3_jax import cli
from qwen3_jax.config import Qwen3Config
from qwen3_jax.plan import chips, cost, hlo, result, show
from qwen3_jax.train import planning

V5E = chips.topology("v5e:2x4")
"""Eight devices, as many as the tests have."""
BATCH, LENGTH = 16, 64


def small(**changes) -> Qwen3Config:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "vocab_size": 512, "bos_token_id": None, "eos_token_id": 1, "intermediate_size": 192}
    return dataclasses.replace(Qwen3Config.from_name("Qwen3-8B"), **sizes | changes)


CONFIG = small()
SIZES = {"data": 1, "fsdp": 4, "expert": 1, "model": 2}


def on_cpu(policy: str, sizes=None, config=CONFIG) -> result.Step:
    shape = (policy, BATCH, LENGTH, "float32")
    return planning.compile_step(config, V5E, sizes or SIZES, *shape, devices=jax.devices())


@pytest.fixture(scope="module")
def steps() -> dict[str, result.Step]:
    return {policy: on_cpu(policy) for policy in ("none", "full")}


def test_a_step_costs_three_forward_passes_and_remat_a_fourth_of_the_layers(steps):
    """XLA's plain attention computes the scores above the diagonal too."""
    tokens = BATCH * LENGTH
    head = 2 * CONFIG.vocab_size * CONFIG.hidden_size
    layers = CONFIG.flops_per_token(LENGTH) - head
    plain = 3 * tokens * (layers + head) / 8
    assert steps["none"].cost.flops == pytest.approx(plain, rel=0.02)
    # Of what is computed again, a layer's last product is not needed: its result is.
    last = 2 * CONFIG.num_hidden_layers * CONFIG.intermediate_size * CONFIG.hidden_size
    assert steps["full"].cost.flops == pytest.approx(plain + tokens * (layers - last) / 8, rel=0.02)
    for step in steps.values():
        assert step.cost.billed_once == []
        assert step.tokens == tokens


def test_model_flops_are_six_for_each_weight_and_token_and_causal_attention(steps):
    tokens = BATCH * LENGTH
    norms = CONFIG.num_hidden_layers * 2 * (CONFIG.hidden_size + CONFIG.head_dim) + CONFIG.hidden_size
    products = CONFIG.num_parameters() - CONFIG.vocab_size * CONFIG.hidden_size - norms  # the embedding is looked up
    pairs = BATCH * LENGTH * (LENGTH + 1) // 2
    attention = 12 * CONFIG.num_hidden_layers * CONFIG.num_attention_heads * CONFIG.head_dim * pairs
    assert steps["none"].model_flops * 8 == 6 * products * tokens + attention
    assert 0 < steps["none"].mfu_bound(V5E.chip) < 1


def test_the_state_is_given_back_where_it_was(steps):
    counters = 4 + 8  # the step and the random key
    for step in steps.values():
        held = step.memory.weights + step.memory.optimizer
        assert held <= step.aliased_bytes <= held + counters + 64
        # Two float32 moments of float32 parameters, and Adam's count.
        assert step.memory.optimizer == 2 * step.memory.weights + 4
        whole = 4 * CONFIG.num_parameters()
        assert whole / 8 < step.memory.weights < 1.02 * whole / 8 + 4 * whole / CONFIG.hidden_size
        assert step.memory.cache == 0
        assert step.memory.temp > step.gradients


def test_parameters_go_over_fsdp(steps):
    kinds = steps["none"].cost.collectives
    assert kinds["all-gather"].bytes > 0
    assert steps["none"].cost.ici_bytes > 0


@pytest.mark.slow
def test_a_step_of_experts_is_priced(steps):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = dataclasses.replace(Qwen3Config.from_name("Qwen3-30B-A3B"), **SHAPE | experts)
    step = on_cpu("full", {"data": 1, "fsdp": 2, "expert": 4, "model": 1}, config)
    assert step.aliased_bytes >= step.memory.weights + step.memory.optimizer
    assert step.cost.collectives["all-to-all"].bytes > 0


SHAPE = {name: getattr(CONFIG, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
SHAPE |= {name: getattr(CONFIG, name) for name in ("num_key_value_heads", "head_dim", "vocab_size")}
SHAPE |= {"bos_token_id": None, "eos_token_id": 1, "intermediate_size": 192}


# Choosing


@pytest.mark.parametrize(
    ("name", "slice_name", "batch", "mesh"),
    [
        ("Qwen3-8B", "v5p:2x2x4", 16, {"fsdp": 16}),
        ("Qwen3-8B", "v5p:2x2x4", 8, {"fsdp": 8, "model": 2}),
        ("Qwen3-0.6B", "v5e:2x2", 8, {"fsdp": 4}),
    ],
)
def test_a_dense_model_splits_rows_as_far_as_they_go(name, slice_name, batch, mesh):
    config, found = Qwen3Config.from_name(name), chips.topology(slice_name)
    ranked, refused = planning.rank(config, found, batch=batch, context=4096, dtype="bfloat16")
    assert {axis: size for axis, size in ranked[0].mesh.items() if size > 1} == mesh
    assert [c.seconds for c in ranked] == sorted(c.seconds for c in ranked)
    assert all(math.prod(c.mesh.values()) == found.devices for c in ranked)
    assert all(r.reason for r in refused)


def test_experts_are_worth_an_axis():
    config, found = Qwen3Config.from_name("Qwen3-30B-A3B"), chips.topology("v5p:4x4x4")
    ranked, _ = planning.rank(config, found, batch=64, context=4096, dtype="bfloat16")
    assert ranked[0].mesh["expert"] * ranked[0].mesh["model"] > 1
    alone = next(c for c in ranked if c.mesh["fsdp"] == 64)
    assert alone.seconds > 2 * ranked[0].seconds


# Asking and showing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remat": "some"}, "remat 'some' is unknown: use none, dots, full or all"),
        ({"mesh": "fsdp=4"}, "has 4 devices"),
        ({"mesh": "fsdp=16", "batch": 8}, "batch 8 does not divide over data × fsdp × expert 16"),
        ({"mesh": "model=16"}, "heads are not repeated in training"),
        ({"model": "Qwen3-235B-A22B", "slice_name": "v5e:4x4"}, "trains Qwen3-235B-A22B at batch 16"),
        ({"dtype": "int8"}, "bfloat16 or float32"),
        ({"context": 10**6}, "40960"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, message):
    settled = {"model": "Qwen3-8B", "slice_name": "v5p:2x2x4", "batch": 16, "context": 4096} | arguments
    with pytest.raises(result.PlanError, match=message) as caught:
        planning.plan(settled.pop("model"), settled.pop("slice_name"), **settled)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--phases", "train", "decode"], "--phases train has meshes of its own"),
        (["--remat", "full"], "--remat full is of training: add --phases train"),
        (["--phases", "train", "--remat", "some"], "--remat"),
        (["--phases", "train", "--mesh", "fsdp=4", "--batch", "15"], "batch 15 does not divide"),
    ],
)
def test_the_command_refuses_in_one_line(argv, says, capsys):
    assert cli.main(["plan", "Qwen3-8B", "--topology", "v5p:2x2x1", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_the_fastest_policy_that_fits_is_chosen_and_all_are_shown(steps, monkeypatch, tmp_path):
    """With a chip that holds one of two policies, and one that the compiler refuses."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    limit = steps["full"].memory.total + 1000
    assert steps["none"].memory.total > limit
    chip = dataclasses.replace(V5E.chip, hbm_bytes=limit)
    monkeypatch.setattr("qwen3_jax.plan.compile.topology", lambda name: dataclasses.replace(V5E, chip=chip))
    said: list[str] = []

    def compiled(config, found, sizes, policy, *shape, hlo_file):
        assert hlo_file is None
        if policy == "dots":
            raise result.PlanError("RESOURCE_EXHAUSTED: 3 GB more than there are")
        return steps[policy]

    monkeypatch.setattr(planning, "compile_step", compiled)
    shape = {"batch": BATCH, "context": LENGTH, "mesh": "fsdp=4,model=2", "dtype": "float32"}
    plan = planning.plan(str(tmp_path), "v5e:2x4", progress=said.append, **shape)
    assert len(said) == 3
    assert (plan.fits, plan.policy, plan.steps["train"]) == (True, "full", steps["full"])
    data = json.loads(show.to_json([plan]))
    assert data["fits"] is True
    assert set(data["step"]) == {"train"}
    wanted = "flops hbm_bytes ici_bytes collectives roofline_s bound copied_bytes aliased_bytes remat gradient_bytes"
    assert set(f"{wanted} model_flops mfu_bound".split()) <= set(data["step"]["train"])
    parts = data["hbm_bytes_per_chip"]
    assert parts["total"] == sum(parts[name] for name in ("weights", "optimizer", "cache", "temp", "code"))
    assert {name: row["fits"] for name, row in data["remat"].items()} == {"none": False, "dots": False, "full": True}
    assert "RESOURCE_EXHAUSTED" in data["remat"]["dots"]["error"]
    console = Console(width=200, record=True, file=(tmp_path / "shown").open("w"))
    console.print(show.table(plan))
    shown = console.export_text()
    for text in ("does not fit by", "does not compile: RESOURCE_EXHAUSTED", "spare", "optimizer", "remat full"):
        assert text in shown
    lines = show.train_markdown([plan]).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert show.page([plan]).count("<rect") == 2 * (1 + 5)


def test_a_plan_of_which_nothing_compiles_says_so(monkeypatch):
    def refuse(*arguments, hlo_file):
        raise result.PlanError("RESOURCE_EXHAUSTED: too large")

    monkeypatch.setattr(planning, "compile_step", refuse)
    plan = planning.plan("Qwen3-8B", "v5e:2x2", batch=4, context=64, mesh="fsdp=4", remat="none")
    assert not plan.fits
    assert plan.error == "train: RESOURCE_EXHAUSTED: too large"
    assert plan.to_json()["step"] == {}


# The walker on what a training step has and serving has not


METADATA = r'"xprof_metadata":"{\"block_q\": 1024, \"block_kv\": 512, \"block_q_dkv\": 512, \"block_kv_dkv\": 1024}"'


def attention(name: str) -> str:
    """A program of two query heads over one kv head of 2048 positions, as splash attention stands in HLO."""
    return f"""\
HloModule m, is_scheduled=true

ENTRY %main (q: bf16[1,2,2048,128], k: bf16[1,2048,128], v: bf16[1,2048,128]) -> bf16[1,2,2048,128] {{
  %slopes = bf16[1,2,2048,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(3)
  %q = bf16[1,2,2048,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(0)
  %k = bf16[1,2048,128]{{2,1,0:T(8,128)(2,1)}} parameter(1)
  %v = bf16[1,2048,128]{{2,1,0:T(8,128)(2,1)}} parameter(2)
  %{name} = bf16[1,2,2048,128]{{3,2,1,0:T(8,128)(2,1)S(1)}} custom-call(%q, %k, %v{", %slopes" * ("_d" in name)}), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
{METADATA}
}}}}, metadata={{op_name="attend"}}, backend_config={{}}
  ROOT %out = bf16[1,2,2048,128]{{3,2,1,0:T(8,128)(2,1)S(1)}} copy(%{name})
}}
"""


@pytest.mark.parametrize(
    ("name", "products", "pairs", "fetched"),
    [
        # 2 blocks of queries see 2 and 4 blocks of 512 keys; both heads fetch each of them, keys and values.
        ("splash_mqa_fwd_segmented_residuals.2", 2, (2 + 4) * 1024 * 512, 2 * 2 * (2 + 4) * 512),
        # 2 blocks of keys, 4 of queries: for the keys' gradient, queries and slopes are fetched for each.
        ("splash_mqa_dkv_segmented_no_residuals.1", 4, (1 + 1 + 2 + 2) * 512 * 1024, 2 * 2 * (1 + 1 + 2 + 2) * 512),
    ],
)
def test_splash_attention_costs_its_blocks(name, products, pairs, fetched):
    module = hlo.parse(attention(name))
    assert len(module.entry.instructions) == 6  # the lines that the metadata breaks are one
    found = cost.walk(module, V5E.chip, partitions=1)
    assert found.unpriced == []
    assert found.flops == products * 2 * 2 * pairs * 128
    rest = 2 * 2048  # the queries of both heads, or keys and values
    assert found.hbm_bytes == 2 * 128 * (fetched + rest)


def test_another_kernel_with_metadata_is_named():
    found = cost.walk(hlo.parse(attention("scatter_rows.1")), V5E.chip, partitions=1)
    assert found.unpriced == ["scatter_rows.1: Pallas kernel without CostEstimate"]
