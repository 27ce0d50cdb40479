"""The parity tool with our side spread over devices: green on every mesh, red where one device holds a fault."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwen3_jax import cli, parity
from qwen3_jax.checkpoint import Checkpoint
from qwen3_jax.ops import moe_parallel
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import ShardingError
from tests import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    cases: dict[str, dict[str, Any]] = {
        "dense": {"num_attention_heads": 8},
        "moe": {"moe": True, "num_attention_heads": 8},
        "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
    }
    return {name: tiny.save(tmp_path_factory.mktemp(name), **options)[0] for name, options in cases.items()}


def check(folder: Path, mesh: str) -> parity.Report:
    return parity.run(folder, length=8, mesh=mesh, ops=XLA, progress=False)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dense", "model=4"),  # twice the 2 kv heads
        ("dense", "data=2,fsdp=2,model=2"),
        ("moe", "expert=8"),
        ("moe", "data=2,expert=2,model=2"),
        ("tied", "data=3,model=2"),  # six rows over three, six devices of eight
    ],
)
def test_green_on_a_mesh(name, mesh, folders):
    report = check(folders[name], mesh)
    assert report.ok, report.verdict
    assert report.logits.difference.max_abs <= 2e-5
    assert f"on mesh {mesh}" in report.model


def on_one_device(monkeypatch: pytest.MonkeyPatch, prefix: str, module: str, weight: str) -> None:
    """Let our loader deliver one weight whose part on the last device is wrong."""

    def load(self: Checkpoint, asked: str = "", **options: Any) -> Any:
        params = original(self, asked, **options)
        if asked == prefix:
            array = params[module][weight]
            parts = [shard.data for shard in array.addressable_shards]
            parts[-1] = jax.device_put(jnp.roll(parts[-1], 1, axis=-1), parts[-1].device)
            params[module][weight] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
        return params

    original = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", load)


def test_red_where_one_device_holds_a_wrong_part(folders, monkeypatch):
    on_one_device(monkeypatch, "layers.1", "self_attn", "q_proj")
    report = check(folders["dense"], "model=4")
    assert report.first_failure == "layers.1.self_attn.q"
    assert all(measure.ok for measure in report.measures if measure.place.startswith("layers.0."))


def test_red_where_one_copy_of_a_value_head_is_wrong(folders, monkeypatch):
    on_one_device(monkeypatch, "layers.1", "self_attn", "v_proj")
    assert check(folders["dense"], "model=4").first_failure == "layers.1.self_attn.output"


def test_red_where_experts_are_not_summed_over_devices(folders, monkeypatch):
    def half(algorithm: str, moe: Any, place: moe_parallel.Island, *args: Any) -> jax.Array:
        return run(algorithm, moe, place._replace(rows=(), experts=place.experts[:1]), *args)

    run = moe_parallel.run
    monkeypatch.setattr(moe_parallel, "run", half)
    assert check(folders["moe"], "expert=2,model=2").first_failure == "layers.0.mlp.output"


@pytest.mark.parametrize(
    ("mesh", "error", "message"),
    [
        ("model=3", ShardingError, "num_attention_heads 8 does not divide over model 3"),
        ("model=16", parity.ParityError, "the mesh has 16 devices, this process 8"),
        ("tensor=2", ShardingError, "mesh axis 'tensor' is unknown"),
    ],
)
def test_a_mesh_that_cannot_be(mesh, error, message, folders):
    with pytest.raises(error, match=message):
        check(folders["dense"], mesh)


def test_from_the_command_line(folders, capsys):
    assert cli.main(["parity", str(folders["tied"]), "--length", "8", "--mesh", "model=2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"].endswith("on mesh model=2")
