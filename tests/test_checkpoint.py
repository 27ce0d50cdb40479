"""Loading and writing Hugging Face folders, against what torch reads from the same files and transformers reopens."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from qwen3_jax import checkpoint
from qwen3_jax.checkpoint import CheckpointError, hf, names
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import declare
from qwen3_jax.ops import plain
from tests import tiny

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a torch tensor's values as a numpy array of the same dtype."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder with the reference implementation."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Any) -> None:
    """Let `change` edit the dict of tensors of a single-file folder."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_redundant_head(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


def make(folder: Path, kind: str) -> Path:
    """Write one of the tiny folders of this file."""
    options: dict[str, Any] = {
        "dense": {},
        "moe": {"moe": True, "dtype": torch.bfloat16},
        "mixed": {"moe": True, "mlp_only_layers": [1], "tie_word_embeddings": True},
        "half": {"dtype": torch.float16},
        "redundant": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
        "bare": {"tie_word_embeddings": True},
        "sharded": {"dtype": torch.bfloat16},
    }[kind]
    model = tiny.build(num_hidden_layers=3, **options)
    if kind == "bare":
        model.model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, **({"max_shard_size": "20KB"} if kind == "sharded" else {}))
    if kind == "redundant":
        add_redundant_head(folder)
    return folder


KINDS = ("dense", "moe", "mixed", "half", "redundant", "bare", "sharded")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: make(root / kind, kind) for kind in KINDS}


@pytest.fixture
def dense(tmp_path: Path, folders: dict[str, Path]) -> Path:
    """A copy of the dense folder to break."""
    return Path(shutil.copytree(folders["dense"], tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path, folders: dict[str, Path]) -> Path:
    return Path(shutil.copytree(folders["sharded"], tmp_path / "model"))


# --- values -----------------------------------------------------------------------------------------------------------


def reference(folder: Path) -> dict[str, np.ndarray]:
    """Return {dotted parameter path: values} from the fused state dict that transformers makes of a folder."""
    config = json.loads((folder / "config.json").read_text())
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    result = {}
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict().items():
        value = numpy_of(tensor)
        path = name.removeprefix("model.").removesuffix(".weight")
        prefix, _, leaf = path.rpartition(".")
        match leaf:
            case "q_proj":
                value = value.reshape(heads, width, -1)
            case "k_proj" | "v_proj":
                value = value.reshape(groups, width, -1)
            case "o_proj":
                value = value.reshape(-1, heads, width)
            case "gate" if prefix.endswith("mlp"):
                path = f"{prefix}.router"
            case "gate_up_proj":
                gate, up = np.split(value, 2, axis=1)
                result |= {f"{prefix}.gate_proj": gate, f"{prefix}.up_proj": up}
                continue
            case "lm_head" if config["tie_word_embeddings"]:
                continue
        result[path] = value
    return result


def flatten(params: Any) -> dict[str, Any]:
    return {".".join(str(k.key) for k in path): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_equal_those_of_transformers(folders: dict[str, Path], kind: str):
    config, params = checkpoint.load(folders[kind], param_dtype="file", progress=False)
    loaded = flatten(params)
    expected = reference(folders[kind])
    assert loaded.keys() == expected.keys()
    for path, value in expected.items():
        assert loaded[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(loaded[path]), value, path)
    assert all(isinstance(leaf, jax.Array) for leaf in loaded.values())
    _, abstract = declare(config, dtype=jnp.float32, ops=plain.ORACLE)
    chex.assert_trees_all_equal_structs(params, abstract)
    chex.assert_trees_all_equal_shapes(params, abstract)


@pytest.mark.parametrize("name", Qwen3Config.names())
def test_table_declares_the_parameters_of_the_network(name: str):
    config = Qwen3Config.from_name(name)
    _, abstract = declare(config, dtype=jnp.bfloat16, ops=plain.ORACLE)
    assert {entry.dotted: entry.shape for entry in names.table(config)} == {
        path: leaf.shape for path, leaf in flatten(abstract).items()
    }


# Tensors of the released files, from their published headers.
COUNTS = {"Qwen3-0.6B": 310, "Qwen3-1.7B": 310, "Qwen3-4B": 398, "Qwen3-8B": 399, "Qwen3-14B": 443, "Qwen3-32B": 707}
BYTES = {"Qwen3-4B": 8_044_936_192, "Qwen3-8B": 16_381_470_720, "Qwen3-32B": 65_524_246_528}


@pytest.mark.parametrize(("name", "count"), [*COUNTS.items(), ("Qwen3-30B-A3B", 18_867)])
def test_table_counts_the_tensors_of_released_files(name: str, count: int):
    config = Qwen3Config.from_name(name)
    rows = list(names.table(config))
    assert sum(len(row.names) for row in rows) == names.count_tensors(config) == count
    if name in BYTES:
        assert sum(2 * len(row.names) * int(np.prod(row.file_shape)) for row in rows) == BYTES[name]


def test_dtypes_round_as_torch_rounds(tmp_path: Path):
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 2**-24, 3.4e38, 1e-40]
    wide = torch.cat([torch.tensor(special), torch.randn(1013, generator=torch.Generator().manual_seed(0)) * 100])
    for stored in (torch.float32, torch.bfloat16, torch.float16):
        values = wide.to(stored)
        for wanted in (torch.float32, torch.bfloat16):
            expected = numpy_of(values.to(wanted))
            out = hf.empty_aligned(expected.shape, expected.dtype)
            hf.convert(out, numpy_of(values))
            np.testing.assert_array_equal(out.astype(np.float64), expected.astype(np.float64))
            assert not np.signbit(out[0])
            assert np.signbit(out[1])


@pytest.mark.parametrize("kind", ["dense", "moe", "half"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_that_of_the_parameters_unless_told_otherwise(folders: dict[str, Path], kind: str, dtype: str):
    expected = reference(folders[kind])
    _, params = checkpoint.load(folders[kind], dtype=dtype, progress=False)
    for path, leaf in flatten(params).items():
        assert leaf.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(leaf), expected[path].astype(leaf.dtype), path)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    _, params = checkpoint.load(folders[kind], dtype=dtype, param_dtype=other, progress=False)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {other}
    _, params = checkpoint.load(folders[kind], dtype=dtype, param_dtype="file", progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {value.dtype for value in expected.values()}


def test_impossible_dtype_is_refused(folders: dict[str, Path]):
    choices: list[dict[str, Any]] = [{"dtype": "float16"}, {"dtype": "file"}, {"dtype": "int8"}, {"param_dtype": "fp8"}]
    for options in choices:
        with pytest.raises(ValueError, match=r"is not supported: give \"float32\", \"bfloat16\""):
            checkpoint.load(folders["dense"], **options)


def test_arrays_survive_a_rewrite_of_the_file(dense: Path):
    expected = {path: value.copy() for path, value in reference(dense).items()}  # torch's own alias the file
    _, params = checkpoint.load(dense, progress=False)
    with (dense / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * (dense / WEIGHTS).stat().st_size)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path], path)


def test_file_cut_short_after_inspection_is_an_error(dense: Path):
    opened = checkpoint.inspect(dense)
    os.truncate(dense / WEIGHTS, 5000)
    with pytest.raises(ValueError, match=r"model.safetensors: was cut short while it was being read"):
        opened.load()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_part_of_the_tree_is_loaded_by_its_path(folders: dict[str, Path], kind: str):
    opened = checkpoint.inspect(folders[kind])
    whole = opened.load()
    for i in range(opened.config.num_hidden_layers):
        chex.assert_trees_all_equal(opened.load(f"layers.{i}"), whole["layers"][i])
    chex.assert_trees_all_equal(opened.load("layers"), whole["layers"])
    chex.assert_trees_all_equal(opened.load("embed_tokens"), whole["embed_tokens"])
    chex.assert_trees_all_equal(opened.load("layers.1.self_attn.q_proj"), whole["layers"][1]["self_attn"]["q_proj"])
    for absent in ("layers.9", "layer", "layers.0.self", "model.norm"):
        with pytest.raises(KeyError, match="no parameter"):
            opened.load(absent)


def test_slices_read_what_numpy_slices(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf, "PIECE_BYTES", 100)  # several pieces per tensor
    rng = np.random.default_rng(0)
    for kind in ("dense", "moe"):
        opened = checkpoint.inspect(folders[kind])
        whole = flatten(opened.load(place=lambda path, source: source[...]))
        for entry in opened.entries:
            source = opened.source(entry)
            for _ in range(4):
                ends = [sorted(rng.integers(0, size + 1, 2)) for size in entry.shape]
                index = tuple(slice(int(a), int(b)) for a, b in ends)
                np.testing.assert_array_equal(source[index], whole[entry.dotted][index])
            np.testing.assert_array_equal(source[:1], whole[entry.dotted][:1])
            assert source[...].ctypes.data % 64 == 0
        with pytest.raises(IndexError, match="contiguous"):
            opened.source(opened.entries[0])[::2]


def test_each_device_reads_its_slice(folders: dict[str, Path]):
    mesh = jax.make_mesh((2, 4), ("expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    read: dict[str, int] = {}

    def place(path: str, source: hf.Source) -> jax.Array:
        spec = {3: ("expert", "model"), 2: (None, "model"), 1: ()}[len(source.shape)]
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

        def slice_of(index: Any) -> np.ndarray:
            part = source[index]
            read[path] = max(read.get(path, 0), part.nbytes)
            return part

        return jax.make_array_from_callback(source.shape, sharding, slice_of)

    _, whole = checkpoint.load(folders["moe"], progress=False)
    _, parts = checkpoint.load(folders["moe"], place=place, progress=False)
    chex.assert_trees_all_equal(jax.device_get(parts), jax.device_get(whole))
    assert read["layers.0.mlp.experts.gate_proj"] == whole["layers"][0]["mlp"]["experts"]["gate_proj"].nbytes / 8
    assert len(parts["layers"][0]["mlp"]["experts"]["gate_proj"].sharding.device_set) == 8


def test_experts_fused_as_in_memory_are_read_too(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["mixed"], tmp_path / "model")
    state = AutoModelForCausalLM.from_pretrained(folders["mixed"]).state_dict()
    del state["lm_head.weight"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
    _, expected = checkpoint.load(folders["mixed"], progress=False)
    _, params = checkpoint.load(tmp_path / "model", progress=False)
    chex.assert_trees_all_equal(params, expected)

    def both(tensors: dict) -> None:
        tensors["model.layers.0.mlp.experts.7.up_proj.weight"] = torch.zeros(24, 32)
        tensors["model.layers.2.mlp.experts.down_proj"] = torch.zeros(8, 24, 32)

    rewrite(tmp_path / "model", both)
    problems = problems_of(tmp_path / "model")
    assert any("experts.gate_up_proj: holds" in p or "experts.7.up_proj.weight: holds" in p for p in problems)
    assert any(
        "layers.2.mlp.experts.down_proj: shape [8, 24, 32], config.json gives [8, 32, 24]" in p for p in problems
    )


def test_nothing_is_printed_where_there_is_no_terminal(folders: dict[str, Path], capfd: pytest.CaptureFixture):
    checkpoint.load(folders["dense"], progress=True)
    assert capfd.readouterr() == ("", "")


# --- embedding models -------------------------------------------------------------------------------------------------


def test_untied_backbone_needs_to_be_asked_for(tmp_path: Path, folders: dict[str, Path]):
    model = tiny.build(num_hidden_layers=3)
    model.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing.*backbone=True"):
        checkpoint.load(tmp_path / "bare")
    config, params = checkpoint.load(tmp_path / "bare", backbone=True, progress=False)
    assert not config.tie_word_embeddings
    assert "lm_head" not in params
    with_head = reference(folders["dense"])
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf), with_head[path])
    _, from_whole = checkpoint.load(folders["dense"], backbone=True, progress=False)
    chex.assert_trees_all_equal(from_whole, params)

    checkpoint.save(tmp_path / "saved", config, params, progress=False)
    for name, tensor in AutoModel.from_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name])


def test_redundant_head_must_be_the_embedding(tmp_path: Path, folders: dict[str, Path]):
    folder = Path(shutil.copytree(folders["redundant"], tmp_path / "model"))
    config, params = checkpoint.load(folder, progress=False)
    assert config.tie_word_embeddings
    assert "lm_head" not in params

    rewrite(folder, lambda t: t["lm_head.weight"][-1, -1].neg_())
    assert problems_of(folder) == [
        "model.safetensors: lm_head.weight: differs from model.embed_tokens.weight, "
        "but config.json says tie_word_embeddings true"
    ]


# --- problems ---------------------------------------------------------------------------------------------------------


def problems_of(folder: Path, **options: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, progress=False, **options)
    assert all("\n" not in problem and problem.isprintable() for problem in caught.value.problems)
    assert str(caught.value).startswith(f"{folder}: cannot be loaded:")
    return caught.value.problems


def test_all_problems_are_told_at_once(dense: Path):
    def damage(tensors: dict) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int32)
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].to(torch.float64)
        tensors["model.layers.2.mlp.gate_proj.weight"] = torch.zeros(48, 32).to(torch.float8_e4m3fn)
        tensors["model.layers.2.mlp.gate_proj.weight_scale_inv"] = torch.ones(1, 1)
        tensors["model.layers.3.input_layernorm.weight"] = torch.ones(32)

    rewrite(dense, damage)
    assert set(problems_of(dense)) == {
        "model.norm.weight: missing, config.json gives it [32]",
        "model.safetensors: model.layers.0.self_attn.q_norm.weight: shape [8], config.json gives [16]",
        "model.safetensors: model.layers.1.mlp.up_proj.weight: dtype I32, expected one of BF16, F16, F32 "
        "(quantised tensors are not supported)",
        "model.safetensors: model.layers.2.mlp.up_proj.weight: dtype F64, expected one of BF16, F16, F32 "
        "(quantised tensors are not supported)",
        "model.safetensors: model.layers.2.mlp.gate_proj.weight: dtype F8_E4M3, expected one of BF16, F16, F32 "
        "(quantised tensors are not supported)",
        "model.safetensors: model.layers.2.mlp.gate_proj.weight_scale_inv: unexpected: "
        "quantised checkpoints are not supported, use the unquantised one",
        "model.safetensors: model.layers.3.input_layernorm.weight: unexpected",
    }


def test_long_lists_are_cut_in_the_message_only(dense: Path):
    edit_json(dense / "config.json", num_hidden_layers=20, layer_types=["full_attention"] * 20)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(dense)
    assert len(caught.value.problems) == 17 * 11
    assert str(caught.value).endswith("and 167 more")


def test_problems_of_config_and_weights_are_told_together(dense: Path):
    edit_json(dense / "config.json", hidden_act="gelu")
    (dense / WEIGHTS).write_bytes((dense / WEIGHTS).read_bytes()[:-5])
    first, second = problems_of(dense)
    assert "hidden_act" in first
    assert second.startswith("model.safetensors: model.")
    assert "truncated" in second


def test_wrong_folders_get_one_line(tmp_path: Path, dense: Path):
    assert problems_of(tmp_path / "nowhere") == ["no such folder"]
    assert problems_of(dense / "config.json") == ["not a folder"]
    (tmp_path / "empty").mkdir()
    config, weights = problems_of(tmp_path / "empty")
    assert config.startswith("config.json: ")
    assert weights == "model.safetensors: missing, and there is no model.safetensors.index.json either"
    shutil.move(dense / WEIGHTS, dense / "adapter_model.safetensors")
    assert "adapter_model.safetensors have no order" in problems_of(dense)[0]


def test_experts_of_a_layer_share_a_dtype(tmp_path: Path, folders: dict[str, Path]):
    folder = Path(shutil.copytree(folders["moe"], tmp_path / "model"))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].float()}))
    told = f"model.safetensors: {name}: dtype float32, but model.layers.1.mlp.experts.0.up_proj.weight is bfloat16"
    assert [p.removesuffix(": the experts of a layer share one") for p in problems_of(folder)] == [told]


def test_impossibly_large_config_is_refused_before_its_table_is_built(tmp_path: Path, folders: dict[str, Path]):
    folder = Path(shutil.copytree(folders["moe"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    experts = "num_experts" if "num_experts" in config else "num_local_experts"
    edit_json(folder / "config.json", **{experts: 60_000, "num_hidden_layers": 4000, "layer_types": None})
    assert problems_of(folder) == ["config.json: describes a model of 720036003 tensors, the limit is 200000"]


class Bomb:
    """Executes on unpickling."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_nothing_of_a_folder_is_executed(dense: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    (dense / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (dense / name).write_bytes(pickle.dumps(Bomb(canary)))
    (dense / "modeling_qwen3.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    problems = problems_of(dense)
    assert [problem.split(":")[0] for problem in problems] == ["model.ckpt", "model.pt", "pytorch_model.bin"]
    assert all("never opened" in problem for problem in problems)
    edit_json(dense / "config.json", auto_map={"AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"})
    assert any("auto_map" in problem for problem in problems_of(dense))
    assert not canary.exists()


# --- an index that lies -----------------------------------------------------------------------------------------------


def lie(folder: Path, change: Any) -> list[str]:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return problems_of(folder)


@pytest.mark.parametrize(
    "target",
    [
        "../secret/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "model.bin",
        "C:\\model.safetensors",
        "a\0.safetensors",
        "x\n.safetensors",
        ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_index_may_only_name_files_of_its_folder(sharded: Path, target: Any):
    shutil.copytree(sharded, sharded.parent / "secret")
    problems = lie(sharded, lambda weight_map: weight_map.update({"model.norm.weight": target}))
    assert "is not the name of a file in this folder" in problems[0]
    assert "model.norm.weight" in problems[0]


def test_index_and_shards_must_agree(sharded: Path):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    where = json.loads((sharded / INDEX).read_text())["weight_map"]["model.norm.weight"]
    wrong = next(shard for shard in shards if shard != where)

    def change(weight_map: dict) -> None:
        weight_map["model.norm.weight"] = wrong
        weight_map["model.extra.weight"] = wrong
        del weight_map[unlisted]

    unlisted = "model.layers.0.input_layernorm.weight"
    home = json.loads((sharded / INDEX).read_text())["weight_map"][unlisted]
    assert set(lie(sharded, change)) == {
        f"{where}: model.norm.weight: {INDEX} says that it is in {wrong}",
        f"{wrong}: model.extra.weight: missing, {INDEX} says that it is here",
        f"{home}: {unlisted}: {INDEX} says that it is nowhere",
    }


def test_tensor_in_two_shards(sharded: Path):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    tensors[name] = load_file(first)[name]
    save_file(tensors, second, metadata={"format": "pt"})
    assert problems_of(sharded) == [f"{second.name}: {name}: also in {first.name}"]


def test_missing_shard_is_one_problem(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert problems_of(sharded) == [f"{shard.name}: cannot be read: No such file or directory"]


def test_stray_shard_is_a_problem(sharded: Path):
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], sharded / "model-00099-of-00099.safetensors")
    assert problems_of(sharded) == [
        f"model-00099-of-00099.safetensors: lies in the folder, but {INDEX} does not name it"
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read"),
        ("[]", "weight_map must be"),
        ('{"weight_map": {}}', "weight_map must be"),
        ('{"weight_map": [1]}', "weight_map must be"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a: occurs twice"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_broken_index(sharded: Path, text: str, told: str):
    (sharded / INDEX).write_text(text)
    problems = problems_of(sharded)
    assert len(problems) == 1
    assert told in problems[0]


# --- symlinks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_symlink_out_of_the_folder_is_refused(dense: Path, tmp_path: Path, name: str):
    shutil.move(dense / name, tmp_path / "elsewhere")
    (dense / name).symlink_to(tmp_path / "elsewhere")
    (problem,) = problems_of(dense)
    assert problem.startswith(f"{name}: points outside the folder")


def test_loop_of_symlinks_is_refused(dense: Path):
    (dense / WEIGHTS).unlink()
    (dense / WEIGHTS).symlink_to(dense / WEIGHTS)
    (problem,) = problems_of(dense)
    assert problem.startswith(f"{WEIGHTS}: cannot be")


def test_symlinked_folder_is_accepted(dense: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(dense)
    checkpoint.load(tmp_path / "link", progress=False)


def test_cache_of_the_hub_is_accepted(dense: Path, tmp_path: Path):
    """Both of its layouts: a link into the model's blobs, and from there into the blobs that all models share."""
    repo = tmp_path / "models--Qwen--tiny"
    snapshot = repo / "snapshots" / "abc"
    for folder in (snapshot, repo / "blobs", tmp_path / "blobs" / "ff"):
        folder.mkdir(parents=True)
    shutil.copy(dense / "config.json", repo / "blobs" / "config")
    shutil.copy(dense / WEIGHTS, tmp_path / "blobs" / "ff" / "weights")
    (repo / "blobs" / "weights").symlink_to("../../blobs/ff/weights")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    (snapshot / WEIGHTS).symlink_to("../../blobs/weights")
    checkpoint.load(snapshot, progress=False)

    (repo / "blobs" / "weights").unlink()
    (repo / "blobs" / "weights").symlink_to(dense / WEIGHTS)
    (problem,) = problems_of(snapshot)
    assert problem.startswith(f"{WEIGHTS}: points outside the folder")


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe", "mixed", "half"])
def test_transformers_reopens_an_export(tmp_path: Path, folders: dict[str, Path], kind: str):
    config, params = checkpoint.load(folders[kind], progress=False)
    checkpoint.save(tmp_path / "one", config, params, progress=False)
    checkpoint.save(tmp_path / "many", config, params, max_shard_bytes=30_000, progress=False)
    assert (tmp_path / "one" / WEIGHTS).exists()
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    original = AutoModelForCausalLM.from_pretrained(folders[kind], dtype="auto")
    tokens = np.arange(12).reshape(2, 6)
    for folder in (tmp_path / "one", tmp_path / "many"):
        found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        reopened, info = found
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert reopened.dtype == original.dtype
        np.testing.assert_array_equal(tiny.logits(reopened, tokens), tiny.logits(original, tokens))
        assert {name: tensor.dtype for name, tensor in tensors_of(folder).items()} == {
            name: tensor.dtype for name, tensor in tensors_of(folders[kind]).items()
        }


def test_export_says_the_dtype_that_it_writes(tmp_path: Path, folders: dict[str, Path]):
    config, params = checkpoint.load(folders["dense"], dtype="bfloat16", progress=False)
    checkpoint.save(tmp_path / "out", config, params, progress=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_export_refuses_a_tree_that_is_not_the_config(tmp_path: Path, folders: dict[str, Path]):
    config, params = checkpoint.load(folders["dense"], progress=False)
    del params["layers"][0]["mlp"]["up_proj"]
    params["layers"][1]["mlp"]["up_proj"] = jnp.zeros((3, 4))
    params["layers"][2]["mlp"]["up_proj"] = jnp.zeros((48, 32), jnp.int32)
    params["extra"] = jnp.zeros((1,))
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        checkpoint.save(tmp_path / "out", config, params)
    assert set(caught.value.problems) == {
        "extra: unexpected parameter",
        "layers.0.mlp.up_proj: parameter missing, config gives it [48, 32]",
        "layers.1.mlp.up_proj: shape [3, 4], config gives [48, 32]",
        "layers.2.mlp.up_proj: dtype int32 cannot be exported",
    }
    assert not any(tmp_path.iterdir())


def test_export_writes_into_no_folder_that_holds_something(tmp_path: Path, folders: dict[str, Path]):
    config, params = checkpoint.load(folders["dense"], progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "dangling"):
        with pytest.raises(CheckpointError, match="exists already: give a new or an empty folder"):
            checkpoint.save(tmp_path / name, config, params)
    assert (tmp_path / "full" / "note").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", config, params, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "file", "full"]
