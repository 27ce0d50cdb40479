"""Conversion between Hugging Face and Orbax folders, names from the hub, and how much memory loading takes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import chex
import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qwen3_jax import checkpoint
from qwen3_jax.checkpoint import CheckpointError, hf, hub, orbax_folder, safetensors_file
from tests import tiny
from tests.test_checkpoint import KINDS, folders, make

__all__ = ["folders"]  # the fixture

ROOT = Path(__file__).parents[1]


def digests(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return {tensor: (dtype, shape, sha256)} of a folder, read by the reference implementation."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                result[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest())
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_hf_orbax_hf_gives_the_same_tensors(tmp_path: Path, folders: dict[str, Path], kind: str):
    source = folders[kind]
    checkpoint.convert(source, tmp_path / "orbax", "orbax", progress=False)
    checkpoint.convert(tmp_path / "orbax", tmp_path / "back", "hf", max_shard_bytes=40_000, progress=False)
    assert digests(tmp_path / "back") == digests(source)
    for name in ("config.json", "generation_config.json"):
        assert (source / name).exists() == (tmp_path / "back" / name).exists()
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    tokens = np.arange(8)[None]
    original, reopened = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (source, tmp_path / "back")
    )
    np.testing.assert_array_equal(tiny.logits(reopened, tokens), tiny.logits(original, tokens))

    choices: list[dict[str, Any]] = [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"param_dtype": "file"}]
    for options in choices:
        config, params = checkpoint.load(tmp_path / "orbax", progress=False, **options)
        expected_config, expected = checkpoint.load(source, progress=False, **options)
        assert config == expected_config
        chex.assert_trees_all_equal(params, expected)
        chex.assert_trees_all_equal_dtypes(params, expected)


def test_untied_backbone_converts_as_it_is(tmp_path: Path):
    tiny.build().model.save_pretrained(tmp_path / "bare")
    checkpoint.convert(tmp_path / "bare", tmp_path / "orbax", "orbax", progress=False)
    checkpoint.convert(tmp_path / "orbax", tmp_path / "back", "hf", progress=False)
    assert digests(tmp_path / "back") == digests(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing.*backbone=True"):
        checkpoint.load(tmp_path / "orbax")
    _, params = checkpoint.load(tmp_path / "orbax", backbone=True, progress=False)
    assert "lm_head" not in params


def test_backbone_of_a_whole_orbax_folder(tmp_path: Path, folders: dict[str, Path]):
    checkpoint.convert(folders["dense"], tmp_path / "orbax", "orbax", progress=False)
    _, params = checkpoint.load(tmp_path / "orbax", backbone=True, progress=False)
    _, expected = checkpoint.load(folders["dense"], backbone=True, progress=False)
    with pytest.raises(CheckpointError, match="this is an Orbax folder, convert it first"):
        checkpoint.inspect(tmp_path / "orbax")
    chex.assert_trees_all_equal(params, expected)


def test_companions_travel_and_nothing_else_does(tmp_path: Path):
    source, _ = tiny.save(tmp_path / "source")
    travels = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "1_Pooling/config.json")
    stays = ("modeling.py", "pytorch_model.bin", "optimizer.pt", "notes/secret.json", ".git/config")
    for name in (*travels, *stays):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"this is {name}")
    checkpoint.convert(source, tmp_path / "orbax", "orbax", progress=False)
    checkpoint.convert(tmp_path / "orbax", tmp_path / "hf", "hf", progress=False)
    found = {str(path.relative_to(tmp_path / "hf")) for path in (tmp_path / "hf").rglob("*") if path.is_file()}
    assert found == {*travels, "config.json", "generation_config.json", "model.safetensors"}
    assert all((tmp_path / "hf" / name).read_text() == f"this is {name}" for name in travels)


def test_convert_refuses_with_one_line_and_leaves_nothing(tmp_path: Path):
    source, _ = tiny.save(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"^[^\n]*full: cannot be written: exists already[^\n]*$"):
        checkpoint.convert(source, tmp_path / "full", "orbax")
    with pytest.raises(CheckpointError, match="source: cannot be written: exists already"):
        checkpoint.convert(source, source, "hf")
    with pytest.raises(ValueError, match="cannot convert to 'gguf'"):
        checkpoint.convert(source, tmp_path / "out", "gguf")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match=r"^[^\n]*nowhere: cannot be loaded: no such folder$"):
        checkpoint.convert(tmp_path / "nowhere", tmp_path / "out", "hf")
    with pytest.raises(CheckpointError, match=r"cannot be written: File exists: .*config.json$"):
        checkpoint.convert(source, source / "config.json" / "out", "hf")
    (source / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: points outside the folder"):
        checkpoint.convert(source, tmp_path / "out", "hf")
    (source / "tokenizer.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_current_folder_can_be_the_destination(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    checkpoint.convert(folders["dense"], ".", "hf", progress=False)
    assert digests(tmp_path / "out") == digests(folders["dense"])


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interruption_leaves_nothing(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, to: Any, interruption: BaseException
):
    def interrupted(*_: Any, **__: Any):
        raise interruption

    # Late: the weights are written, the manifest or the rest of the file is not.
    monkeypatch.setattr(orbax_folder.json, "dumps", interrupted) if to == "orbax" else monkeypatch.setattr(
        safetensors_file.os, "fsync", interrupted
    )
    expected = CheckpointError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is CheckpointError else None):
        checkpoint.convert(folders["dense"], tmp_path / "out", to, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_conversion_leaves_no_folder(tmp_path: Path, to: str):
    """SIGKILL while the weights are on their way: OUT is absent, and what is left beside it says that it is partial."""
    source = make(tmp_path / "source", "dense")
    program = f"""
        import os, sys
        from qwen3_jax import checkpoint
        def stop(descriptor):  # the first byte that must be on the disk
            print("writing", flush=True)
            sys.stdin.read()
        os.fsync = stop
        checkpoint.convert({str(source)!r}, {str(tmp_path / "out")!r}, {to!r}, progress=False)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "out").exists()
    leftovers = [path.name for path in tmp_path.iterdir() if path != source]
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".out.partial-")
    checkpoint.convert(source, tmp_path / "out", to, progress=False)  # pyright: ignore[reportArgumentType]
    checkpoint.load(tmp_path / "out", progress=False)


# --- a damaged Orbax folder -------------------------------------------------------------------------------------------


def test_every_flipped_bit_that_matters_is_found(tmp_path: Path, folders: dict[str, Path]):
    """Orbax alone restores most flips as other values; here the result is the truth or an error, never other values."""
    folder = tmp_path / "orbax"
    checkpoint.convert(folders["moe"], folder, "orbax", progress=False)
    _, truth = checkpoint.load(folder, progress=False)
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    weights = [path.stat().st_size for path in files]
    rng = random.Random(0)
    found = 0
    for trial in range(25):
        (path,) = rng.choices(files, weights)
        content = path.read_bytes()
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        # TensorStore caches by path.
        moved = folder.rename(tmp_path / f"orbax-{trial}")
        try:
            _, params = checkpoint.load(moved, progress=False)
            chex.assert_trees_all_equal(params, truth)
        except CheckpointError:
            found += 1
        folder = moved.rename(tmp_path / "orbax")
        path.write_bytes(content)
    assert found > 15


def test_broken_manifest_is_refused(tmp_path: Path, folders: dict[str, Path]):
    folder = tmp_path / "orbax"
    checkpoint.convert(folders["dense"], folder, "orbax", progress=False)
    manifest = json.loads((folder / "qwen3_jax.json").read_text())

    def problems(text: str) -> list[str]:
        (folder / "qwen3_jax.json").write_text(text)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(folder, progress=False)
        return caught.value.problems

    for text in ("", "[]", "{}", "null", '{"format": "qwen3_jax parameters 2"}', '{"a": 1, "a": 2}', "[" * 10**5):
        (problem,) = problems(text)
        assert problem.startswith("qwen3_jax.json: cannot be read: ")
    tensors = dict(manifest["tensors"])
    tensors["layers.7.norm"] = tensors.pop("norm")
    assert problems(json.dumps(manifest | {"tensors": tensors})) == [
        "qwen3_jax.json: norm: missing",
        "qwen3_jax.json: layers.7.norm: unexpected",
    ]
    tensors = dict(manifest["tensors"], norm={"dtype": "int8", "sha256": ""})
    assert "int8" in problems(json.dumps(manifest | {"tensors": tensors}))[0]


def test_config_that_was_swapped_is_found(tmp_path: Path, folders: dict[str, Path]):
    checkpoint.convert(folders["dense"], tmp_path / "orbax", "orbax", progress=False)
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"up_proj: shape \[48, 32\], config.json gives \[40, 32\]"):
        checkpoint.load(tmp_path / "orbax", progress=False)


# --- names from the hub -----------------------------------------------------------------------------------------------


def test_local_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert hub.resolve("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


def test_hub_id_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("Qwen/Qwen3-0.6B", revision="main") == tmp_path
    assert asked == {
        "name": "Qwen/Qwen3-0.6B",
        "revision": "main",
        "allow_patterns": ["*.json", "*.jinja", "*.safetensors", "*.txt"],
    }


@pytest.mark.parametrize(
    "name", ["nowhere", "./Qwen/Qwen3", "/no/such", "a/b/c", "../x", "a b/c", "", "http://x/y", "-/a"]
)
def test_what_is_neither_folder_nor_id(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert hub.resolve(name) == Path()  # the current folder
        return
    with pytest.raises(CheckpointError, match="no such folder, and not the id of a model"):
        hub.resolve(name)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a folder: give the folder that holds"):
        hub.resolve("file")


def test_no_network_and_no_package_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^Qwen/none: [^\n]*cannot be downloaded: [^\n]*$"):
        hub.resolve("Qwen/none")  # the test session is offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "qwen3-jax\[hub\]"'):
        hub.resolve("Qwen/none")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_little_more_than_the_parameters(tmp_path: Path, dtype: str):
    """Peak resident memory, mapped pages of the file included, of a 365 MB folder; a second copy would show."""
    source, _ = tiny.save(tmp_path / "source", moe=True, tie_word_embeddings=True, dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 512, "vocab_size": 160_000, "moe_intermediate_size": 4096}
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rows = list(hf.names.table(hf.Qwen3Config.from_file(folder)))
    infos = {name: (np.dtype(hf.ml_dtypes.bfloat16), row.file_shape) for row in rows for name in row.names}
    infos["lm_head.weight"] = infos["model.embed_tokens.weight"]  # compared, not kept
    zeros = {name: lambda info=info: np.zeros(info[1], info[0]) for name, info in infos.items()}
    safetensors_file.write(folder / "model.safetensors", zeros, infos)

    program = f"""
        import jax
        from pathlib import Path
        from qwen3_jax import checkpoint
        jax.block_until_ready(jax.device_put(1.0))
        def status(key):
            return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").open() if l.startswith(key))
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        _, params = checkpoint.load({str(folder)!r}, dtype={dtype!r}, progress=False)
        print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), status("VmHWM") - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    parameters, peak = map(int, result.stdout.split())
    assert parameters > 350e6 * (2 if dtype == "float32" else 1)
    assert peak < parameters + 130e6, f"{peak / 1e6:.0f} MB for {parameters / 1e6:.0f} MB of parameters"


def test_jax_is_given_the_buffer_that_was_filled(folders: dict[str, Path]):
    """No second copy: the CPU backend adopts the aligned buffer."""

    def adopted(path: str, source: hf.Source) -> bool:
        buffer = source[...]
        return jax.device_put(buffer).unsafe_buffer_pointer() == buffer.ctypes.data

    _, answers = checkpoint.load(folders["dense"], place=adopted, progress=False)
    assert all(jax.tree.leaves(answers))
