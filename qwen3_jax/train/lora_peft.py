"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

Adapters → one lora_A and lora_B per linear layer, under "base_model.model." and the Hugging Face name → folder, and
back. The adapters of experts are written one by one, as PEFT wrote them for Qwen3-MoE while every expert was a linear
layer; PEFT fuses them itself when it loads them onto the stacked experts of transformers 5. What PEFT saves for those
stacked parameters (`target_parameters`) is read too. `merge_folder` adds adapters to a model folder's weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.checkpoint import names
from qwen3_jax.checkpoint.export import new_folder, write_weights
from qwen3_jax.checkpoint.folder import COMPANIONS, open_folder
from qwen3_jax.checkpoint.names import Entry
from qwen3_jax.checkpoint.safetensors_file import SafetensorsError, SafetensorsFile, unique_pairs
from qwen3_jax.checkpoint.safetensors_file import write as write_safetensors
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.train import lora
from qwen3_jax.train.lora import FEED_FORWARD, OUT_AXES, Lora, LoraConfig, LoraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings of PEFT that change what an adapter computes, with the values under which it is the plain formula.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}


def save(folder: Path | str, adapters: Params, of: Lora, *, base: str) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        folder: is made; it must not exist or be empty. It appears complete or not at all.
        adapters: by layer, not stacked: {"layers": {i: …}}, each written in its own dtype.
        of: their description.
        base: what the configuration calls the model that they belong to.
    """
    tensors: dict[str, np.ndarray] = {}
    for entry in _adapted(of):
        leaf = {side: np.asarray(array) for side, array in names.get(adapters, entry.path).items()}
        own = entry.stacked and of.config.experts == "each"
        for e, name in enumerate(entry.names):
            for side in ("a", "b"):
                array = leaf[side][e] if own else leaf[side]
                tensors[_in_file(name, side)] = array.reshape(_flat(entry, side, of.config.rank))
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": of.config.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": of.config.rank,
        "target_modules": sorted({str(site.path[-1]) for site in of.sites}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": of.config.rank_stabilized,
    }
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        infos = {name: (array.dtype, array.shape) for name, array in tensors.items()}
        write_safetensors(partial / WEIGHTS, {name: (lambda a=array: a) for name, array in tensors.items()}, infos)


def load(folder: Path | str, of: Qwen3Config) -> tuple[Lora, Params]:
    """Read a folder of PEFT's: the adapters' description, and the adapters by layer as numpy arrays.

    Raises:
        LoraError: settings that are not the plain formula, or tensors that do not fit the model; all at once.
    """
    folder = Path(folder)
    settings = _settings(folder)
    try:
        file = SafetensorsFile(folder / WEIGHTS)
    except SafetensorsError as error:
        raise LoraError(f"{folder}: {error}") from None
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise LoraError(f"{folder}/{CONFIG}: r is {rank!r} and lora_alpha {alpha!r}, expected two positive numbers")
    tensors: dict[str, np.ndarray] = {name: np.array(file[name]) for name in file.tensors}
    tensors |= _unfused(of, tensors, rank)
    found = {name.rsplit(".", 3)[1] for name in tensors}
    expert = any(".mlp.experts." in name for name in tensors)
    dense = {name.rsplit(".", 3)[1] for name in tensors if ".mlp.experts." not in name}
    targets = tuple(name for name in lora.TARGETS if name in found)
    if not targets:
        raise LoraError(f"{folder}/{WEIGHTS}: holds no adapter of {', '.join(lora.TARGETS)}")
    config = LoraConfig(
        rank=rank,
        alpha=float(alpha),
        targets=targets,
        experts="each" if expert or not dense & set(FEED_FORWARD) else "none",
        rank_stabilized=bool(settings.get("use_rslora")),
    )
    description = Lora(config, of)
    tree: Params = {}
    problems: list[str] = []
    for entry in _adapted(description):
        sides = {}
        for side in ("a", "b"):
            parts = [_take(tensors, _in_file(n, side), _flat(entry, side, rank), problems) for n in entry.names]
            shape = _shape(entry, side, rank)
            sides[side] = np.stack(parts).reshape(shape) if not problems else np.zeros(shape)
        names.put(tree, entry.path, sides)
    problems += [f"{name}: the model has no such layer" for name in sorted(tensors)[:8]]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise LoraError("\n".join(f"{folder}/{WEIGHTS}: {problem}" for problem in problems[:8]) + more)
    return description, tree


def merge_folder(base: Path | str, adapter: Path | str, out: Path | str) -> None:
    """Write the model folder `base` with the adapters of `adapter` added for good, in the dtypes of its files.

    Raises:
        CheckpointError: `base` has problems, or `out` holds something.
        LoraError: the adapters are not of this model.
    """
    base = Path(base)
    checkpoint = open_folder(base, backbone=None)
    description, adapters = load(adapter, checkpoint.config)
    params = checkpoint.load(place=lambda path, tensor: tensor[...], progress=False)
    merged = lora.merge(description.assemble(adapters, params))
    with new_folder(out) as partial:
        (partial / "config.json").write_bytes((base / "config.json").read_bytes())
        for name in COMPANIONS:
            if name != "README.md" and (base / name).is_file():  # the card speaks of other weights
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes((base / name).read_bytes())
        write_weights(partial, checkpoint.config, merged, naming=checkpoint.naming, progress=False)


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_bytes(), object_pairs_hook=unique_pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(f"{folder}/{CONFIG}: cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise LoraError(f"{folder}/{CONFIG}: holds no JSON object")
    for key, plain in PLAIN.items():
        if key in settings and settings[key] not in plain:
            raise LoraError(f"{folder}/{CONFIG}: {key} is {settings[key]!r}, supported is {plain[0]!r}: export it anew")
    return settings


def _adapted(of: Lora) -> list[Entry]:
    paths = {site.path for site in of.sites}
    return [entry for entry in names.table(of.of) if entry.path in paths]


def _in_file(name: str, side: str) -> str:
    return f"{PREFIX}{name.removesuffix('.weight')}.lora_{side.upper()}.weight"


def _flat(entry: Entry, side: str, rank: int) -> tuple[int, int]:
    """Return a tensor's shape in the file, of one expert."""
    out, inputs = entry.file_shape
    return (rank, inputs) if side == "a" else (out, rank)


def _shape(entry: Entry, side: str, rank: int) -> tuple[int, ...]:
    """Return a leaf's shape, of all experts together."""
    experts, shape = entry.shape[: int(entry.stacked)], entry.shape[int(entry.stacked) :]
    out = OUT_AXES[str(entry.path[-1])]
    return (*experts, rank, *shape[out:]) if side == "a" else (*experts, *shape[:out], rank)


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int], problems: list[str]) -> np.ndarray:
    """Remove a tensor and return it; a missing one or another shape is a problem."""
    array = tensors.pop(name, None)
    if array is None:
        problems.append(f"{name} is missing: adapters of some layers only are not supported")
    elif array.shape != shape:
        problems.append(f"{name}: shape {list(array.shape)}, the model and r give {list(shape)}")
    else:
        return array
    return np.zeros(shape, np.float32)


def _unfused(of: Qwen3Config, tensors: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """Take PEFT's adapters of stacked experts out of `tensors`; return them one by one.

    lora_A is [r·E, in] with experts first, lora_B [out, r·E] with experts last (PEFT, `lora.layer.ParamWrapper`). The
    adapters of two parameters of one module differ in their depth only, so they are told apart by their shapes.
    """
    found: dict[str, np.ndarray] = {}
    E, D, F = of.num_experts, of.hidden_size, of.moe_intermediate_size
    for name in [
        n for n in tensors if n.rsplit(".", 3)[1] in ("experts", "base_layer") and n.endswith("lora_A.weight")
    ]:
        stem = name.removesuffix("lora_A.weight")
        a, b = tensors.get(name), tensors.get(stem + "lora_B.weight")
        if a is None or b is None:
            continue
        kind = {(D, 2 * F): ("gate_proj", "up_proj"), (F, D): ("down_proj",)}.get((a.shape[-1], b.shape[0]))
        if kind is None or not E or a.shape[0] != rank * E or b.shape[1] != rank * E:
            continue
        del tensors[name], tensors[stem + "lora_B.weight"]
        a, b = a.reshape(E, rank, -1), b.reshape(b.shape[0], rank, E).transpose(2, 0, 1)
        layer = stem.partition(".experts.")[0]
        for member, part in zip(kind, np.split(b, len(kind), axis=1), strict=True):
            for e in range(E):
                found |= {f"{layer}.experts.{e}.{member}.lora_{s}.weight": x[e] for s, x in (("A", a), ("B", part))}
    return found
