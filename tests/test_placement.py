"""The sharded load against the plain one: same numbers, only the bytes that the devices need, bounded memory."""

import json
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from qwen3_jax import checkpoint, model, placement
from qwen3_jax.checkpoint import CheckpointError, orbax_sharded
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import RULES, ShardingError, make_mesh
from tests import counting, tiny

MESHES: dict[str, dict[str, int]] = {
    "model 4 > 2 kv heads": {"model": 4, "data": 2},
    "expert 4, model 2": {"expert": 4, "model": 2},
    "every axis": {"data": 1, "fsdp": 2, "expert": 2, "model": 2},
    "copies only": {"data": 8},
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("moe"), moe=True, mlp_only_layers=[1])[0]


@pytest.fixture(name="bytes_read")
def count_bytes_read():
    with counting.bytes_read() as counts:
        yield counts


def repeat_kv_heads(params, repeats):
    def repeat(path, leaf):
        return np.repeat(leaf, repeats, 0) if path[-1].key in ("k_proj", "v_proj") else leaf

    return jax.tree.map_with_path(repeat, params)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_values_and_bytes(moe, sizes, rules, bytes_read):
    config, whole = checkpoint.load(moe, place=lambda path, source: source[...], progress=False)
    bytes_read.clear()
    mesh = make_mesh(**sizes)
    on_mesh, params = placement.load_sharded(moe, mesh, RULES[rules], ops=XLA, progress=False)

    repeats = 2 if sizes.get("model") == 4 else 1
    assert on_mesh.num_key_value_heads == config.num_key_value_heads * repeats
    chex.assert_trees_all_equal(jax.device_get(params), repeat_kv_heads(whole, repeats))
    chex.assert_trees_all_equal(jax.device_get(placement.without_repeats(params, config)), whole)

    _, declared = model.declare(on_mesh, dtype=np.dtype(np.float32), ops=XLA)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, declared)
    where = placement.formats(on_mesh, mesh, RULES[rules], ops=XLA)
    for path, leaf in placement.dotted(params).items():
        assert leaf.sharding == where[path]
    # The whole mesh is this process's, so every byte is read, and read once.
    assert sum(bytes_read) == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))


OTHER_ORDER = {"embed heads head_dim": (1, 0, 2)}


def test_what_a_load_returns_is_what_a_plan_compiles_for(moe):
    mesh, ops = make_mesh(data=2, expert=2, model=2), XLA._replace(weight_order=OTHER_ORDER)
    on_mesh, params = placement.load_sharded(moe, mesh, RULES["serve"], ops=ops, progress=False)
    _, declared = model.declare(on_mesh, dtype=np.dtype(np.float32), ops=ops)
    described = placement.abstract(declared, on_mesh, mesh, RULES["serve"], ops=ops)
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding), path
        order = tuple(range(leaf.ndim)) if wanted.format.layout is None else wanted.format.layout.major_to_minor
        assert leaf.format.layout.major_to_minor == order


def test_dtypes(moe):
    mesh = make_mesh(model=2, expert=4)
    for options, expected in [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "param_dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16", "param_dtype": "file"}, "float32"),
        ({}, "float32"),
    ]:
        _, params = placement.load_sharded(moe, mesh, RULES["serve"], ops=XLA, progress=False, **options)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {expected}
    with pytest.raises(ValueError, match="int8"):
        placement.load_sharded(moe, mesh, RULES["serve"], ops=XLA, dtype="int8")


def test_orbax_folder(moe, tmp_path):
    checkpoint.convert(moe, tmp_path / "orbax", "orbax", progress=False)
    for mesh in (make_mesh(model=4, data=2), make_mesh(expert=8)):
        expected = placement.load_sharded(moe, mesh, RULES["serve"], ops=XLA, progress=False)
        actual = placement.load_sharded(tmp_path / "orbax", mesh, RULES["serve"], ops=XLA, progress=False)
        assert actual[0] == expected[0]
        chex.assert_trees_all_equal(jax.device_get(actual[1]), jax.device_get(expected[1]))
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, actual[1], expected[1])
        assert all(jax.tree.leaves(same))


def test_a_damaged_orbax_folder_is_refused_by_tensor(moe, tmp_path):
    config, params = checkpoint.load(moe, progress=False)
    orbax_sharded.save(tmp_path / "orbax", config, params, progress=False)
    with pytest.raises(CheckpointError, match="exists already"):
        orbax_sharded.save(tmp_path / "orbax", config, params, progress=False)
    manifest = tmp_path / "orbax" / "qwen3_jax.json"
    told = json.loads(manifest.read_text())
    told["tensors"]["layers.1.mlp.gate_proj"]["sha256"] = "0" * 64  # as if other bytes were stored
    manifest.write_text(json.dumps(told))
    with pytest.raises(CheckpointError) as caught:
        placement.load_sharded(tmp_path / "orbax", make_mesh(expert=8), RULES["serve"], ops=XLA, progress=False)
    assert len(caught.value.problems) == 1
    assert "layers.1.mlp.gate_proj: damaged" in caught.value.problems[0]
    for path in (tmp_path / "orbax" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError):
        placement.load_sharded(tmp_path / "orbax", make_mesh(expert=8), RULES["serve"], ops=XLA, progress=False)


def test_everything_that_does_not_divide_is_told_before_a_byte_is_read(tmp_path, bytes_read):
    folder, _ = tiny.save(tmp_path, moe=True, num_experts=6, vocab_size=99, num_attention_heads=6, mlp_only_layers=[0])
    with pytest.raises(ShardingError) as caught:
        placement.load_sharded(folder, make_mesh(model=8), RULES["serve"], ops=XLA, progress=False)
    assert not bytes_read
    told = "\n".join(caught.value.problems)
    for key in ("num_attention_heads 6", "vocab_size 99", "num_experts 6"):
        assert key in told


def test_without_repeats_wants_the_config_of_the_file(moe):
    _, params = placement.load_sharded(moe, make_mesh(data=8), RULES["serve"], ops=XLA, progress=False)
    other = Qwen3Config.from_name("Qwen3-0.6B")  # 8 kv heads
    with pytest.raises(ShardingError, match="8 does not divide the 2 heads"):
        placement.without_repeats(params, other)


MEASURE = """
import json, resource, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
from qwen3_jax import placement
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import RULES, make_mesh

_, params = placement.load_sharded(sys.argv[1], make_mesh(model=8), RULES["serve"], ops=XLA)
addressable = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
print(json.dumps({"addressable": addressable, "peak": peak * 1024}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
def test_host_memory_stays_within_the_parameters_and_600_mib(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    settings = tiny.DENSE | shape | {"vocab_size": 65536, "num_hidden_layers": 4, "head_dim": 128}
    config = Qwen3Config.from_dict(
        settings
        | {"model_type": "qwen3", "dtype": "float32", "rms_norm_eps": 1e-6, "rope_scaling": None}
        | {"hidden_act": "silu", "initializer_range": 0.02}
    )
    _, abstract = model.declare(config, dtype=np.dtype(np.float32), ops=XLA)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract)
    checkpoint.save(tmp_path / "model", config, params, progress=False)
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["addressable"] > 300e6
    assert measured["peak"] <= measured["addressable"] + 0.6 * 2**30
