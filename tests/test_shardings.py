"""The shardings table against arrays on real (virtual) devices, published counts and exhaustive search."""

import io
import itertools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from qwen3_jax import cache, placement, shardings
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import AXES, RULES, ShardingError, check, make_mesh, parse_mesh
from qwen3_jax.sharding import shardings as to_shardings
from tests import tiny


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=2,expert=2,model=2", "expert=8", "data=8"])
def test_bytes_are_those_of_arrays_on_devices(mesh, rules, tmp_path):
    folder, _ = tiny.save(tmp_path, moe=True, mlp_only_layers=[1])
    sizes = parse_mesh(mesh)
    table = shardings.tabulate(Qwen3Config.from_file(folder), sizes, rules=rules, dtype="float32", context=32)
    devices = make_mesh(**sizes, devices=None)
    config, params = placement.load_sharded(folder, devices, RULES[rules], ops=XLA, dtype="float32", progress=False)
    assert not table.problems
    assert table.kv_heads == config.num_key_value_heads
    on_device = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(params))
    assert table.bytes_per_device("parameter") == on_device

    layers = cache.init(config, batch=table.batch, capacity=32, dtype=jnp.dtype("float32"), ops=XLA)
    where = to_shardings(XLA.cache_axes, devices, RULES[rules])
    placed = [jax.device_put(layer, where) for layer in layers]
    assert table.bytes_per_device("cache") == sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_released_models_need_neither_weights_nor_devices(name):
    config = Qwen3Config.from_name(name)
    table = shardings.tabulate(config, parse_mesh("model=4"), dtype="bfloat16", context=1024)
    parameters = [row for row in table.rows if row.kind == "parameter"]
    assert sum(row.nbytes for row in parameters) == 2 * config.num_parameters()
    whole = sum(row.nbytes for row in table.rows if row.kind == "cache")
    assert whole == table.batch * 1024 * config.kv_bytes_per_token(2)
    assert max(row.times for row in parameters) == config.num_hidden_layers
    assert len(parameters) < 20


def test_layers_of_two_kinds_have_a_row_each_and_every_layer_on_request():
    config = Qwen3Config.from_dict(Qwen3Config.from_name("Qwen3-30B-A3B").to_dict() | {"mlp_only_layers": [0, 5]})
    table = shardings.tabulate(config, parse_mesh("expert=4,model=2"), dtype="bfloat16", context=64)
    times = {row.name: row.times for row in table.rows}
    assert times["layers.*.mlp.gate_proj"] == 2
    assert times["layers.*.mlp.experts.gate_proj"] == 46
    every = shardings.tabulate(config, parse_mesh("expert=4,model=2"), dtype="bfloat16", context=64, every=True)
    assert {row.times for row in every.rows} == {1}
    assert len(every.rows) == sum(row.times for row in table.rows)
    assert every.bytes_per_device("parameter") == table.bytes_per_device("parameter")


def test_what_does_not_divide_and_what_would():
    config, sizes = Qwen3Config.from_name("Qwen3-14B"), parse_mesh("expert=2,model=16")
    table = shardings.tabulate(config, sizes, dtype="bfloat16", context=64, batch=3)
    assert any("num_attention_heads 40" in problem and "model 16" in problem for problem in table.problems)
    assert any("batch 3" in problem and "2" in problem for problem in table.problems)
    flagged = {row.name for row in table.rows if row.problems}
    assert flagged == {
        "layers.*.self_attn.q_proj",
        "layers.*.self_attn.o_proj",
        "layers.*.cache.k",
        "layers.*.cache.v",
    } | ({"layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"} if table.kv_heads % 16 else set())
    # Every mesh of 32 devices that divides, found the slow way, is no nearer than the nearest one told.
    fitting: list[dict[str, int]] = [
        dict(zip(AXES, lengths, strict=True))
        for lengths in itertools.product([1, 2, 4, 8, 16, 32], repeat=4)
        if math.prod(lengths) == 32 and lengths[1] == 1
    ]
    fitting = [m for m in fitting if not check(config, shardings.abstract_mesh(m), RULES["serve"])]
    steps = [sum(abs(math.log2(m[a] / sizes[a])) for a in AXES) for m in fitting]
    assert table.nearest[0] in fitting
    assert steps[fitting.index(table.nearest[0])] == min(steps)


def test_command(capsys):
    assert shardings.run("Qwen3-8B", "model=8", as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "Qwen3-8B"
    assert told["bytes_per_device"]["total"] == sum(row["bytes_per_device"] for row in told["rows"])
    out = io.StringIO()
    assert shardings.run("Qwen3-8B", "model=3", console=Console(file=out, width=140)) == 1
    assert "num_attention_heads 32 does not divide over model 3: use 2 or 4" in out.getvalue()
    assert "data=3" in out.getvalue()
    for wrong in ("modle=2", "model=0", "model=2,model=2", ""):
        with pytest.raises(ShardingError):
            shardings.run("Qwen3-8B", wrong)
    with pytest.raises(ShardingError, match="rules 'both' are unknown: use serve or "):
        shardings.run("Qwen3-8B", "model=2", rules="both")
