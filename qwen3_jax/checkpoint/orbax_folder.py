"""Parameters as one Orbax checkpoint, beside the config and a manifest with a digest of every tensor.

    config.json, tokenizer.json, …    as in the Hugging Face folder
    params/                           Orbax: the nested parameter tree, each array in its own dtype
    qwen3_jax.json                    the manifest; its presence is what makes a folder one of ours

Orbax restores most flipped bits of its files without an error, as other values. Here every tensor is hashed when it is
written and again after it has been restored (0.6 s per GB and core).
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3_jax.checkpoint import names
from qwen3_jax.checkpoint.export import require_tree
from qwen3_jax.checkpoint.hf import (
    CONFIG,
    FLOATS,
    MANIFEST,
    MAX_TENSORS,
    MISSING_HEAD,
    CheckpointError,
    Params,
    Place,
    convert,
    empty_aligned,
    on_default_device,
    param_dtype_of,
    progress_bar,
    read_config,
    workers,
)
from qwen3_jax.checkpoint.names import Naming
from qwen3_jax.checkpoint.safetensors_file import clip, unique_pairs
from qwen3_jax.config import Qwen3Config

ARRAYS = "params"
FORMAT = "qwen3_jax parameters 1"
MAX_MANIFEST_BYTES = 32 << 20
CHUNK_BYTES = 64 << 20  # a slice is read in whole chunks: small enough to waste little, large enough for few files


def is_one(folder: Path) -> bool:
    """Say whether a folder was written by `write`."""
    return (folder / MANIFEST).is_file()


def write(
    folder: Path, config: Qwen3Config, params: Params, *, naming: Naming = names.PLAIN, progress: bool = True
) -> None:
    """Write parameters and manifest into a folder that has its config.json already."""
    import orbax.checkpoint as ocp  # 1.3 s to import

    entries = require_tree(folder, config, params)
    leaves = [names.get(params, entry.path) for entry in entries]
    with workers() as pool:
        digests = list(pool.map(_digest, map(np.asarray, leaves)))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with progress_bar("writing", None, progress), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save((folder / ARRAYS).resolve(), args=ocp.args.PyTreeSave(params, save_args=chunks))
    manifest = {
        "format": FORMAT,
        "naming": naming._asdict(),
        "tensors": {
            entry.dotted: {"dtype": np.dtype(leaf.dtype).name, "shape": list(entry.shape), "sha256": digest}
            for entry, leaf, digest in zip(entries, leaves, digests, strict=True)
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An Orbax folder whose manifest agrees with its config: what `inspect` returns."""

    folder: Path
    config: Qwen3Config
    entries: tuple[names.Entry, ...]
    naming: Naming
    backbone: bool  # leave out lm_head
    dtypes: dict[str, np.dtype]
    digests: dict[str, str]

    def load(self, *, dtype: Any = None, place: Place = on_default_device, progress: bool = False) -> Params:
        """Restore all parameters and check every digest. Raises CheckpointError."""
        import orbax.checkpoint as ocp

        target = param_dtype_of(dtype)
        shapes: Params = {}
        for entry in self.entries:
            names.put(shapes, entry.path, jax.ShapeDtypeStruct(entry.shape, self.dtypes[entry.dotted]))
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restore = ocp.args.PyTreeRestore(item=shapes, restore_args=as_numpy)
                restored = checkpointer.restore((self.folder / ARRAYS).resolve(), args=restore)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
            reason = clip(" ".join(str(error).split()) or type(error).__name__)
            raise CheckpointError(self.folder, [f"{ARRAYS}: {reason}"]) from error

        problems: list[str] = []
        params: Params = {}
        total = sum(self.dtypes[entry.dotted].itemsize * math.prod(entry.shape) for entry in self.entries)
        with progress_bar("loading", total, progress) as advance, workers() as pool:

            def check(entry: names.Entry) -> None:
                array = names.get(restored, entry.path)
                if array.shape != entry.shape or array.dtype != self.dtypes[entry.dotted]:
                    found = f"{array.dtype} {list(array.shape)}"
                    problems.append(f"{ARRAYS}: {entry.dotted}: {found} restored, {list(entry.shape)} expected")
                elif _digest(array) != self.digests[entry.dotted]:
                    problems.append(
                        f"{ARRAYS}: {entry.dotted}: damaged, its bytes do not have the digest of {MANIFEST}"
                    )
                advance(array.nbytes)

            list(pool.map(check, self.entries))
        if problems:
            raise CheckpointError(self.folder, sorted(problems))
        for entry in self.entries:
            if self.backbone and entry.dotted == "lm_head":
                continue
            array = names.get(restored, entry.path)
            names.put(restored, entry.path, None)
            if target is not None and target != array.dtype:
                wanted = empty_aligned(array.shape, target)
                convert(wanted, array)
                array = wanted
            names.put(params, entry.path, place(entry.dotted, array))
        return params


def inspect(folder: Path, *, backbone: bool | None = False) -> Checkpoint:
    """Check the manifest of an Orbax folder against its config. Raises CheckpointError with all problems."""
    problems: list[str] = []
    config = read_config(folder, problems, MANIFEST, ARRAYS)
    manifest: Any = None
    try:
        if (folder / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"larger than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads((folder / MANIFEST).read_bytes().decode("utf-8"), object_pairs_hook=unique_pairs)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {clip(repr(manifest['format']))}, this library reads {FORMAT!r}")
        naming = Naming(**{key: bool(manifest["naming"][key]) for key in Naming._fields})
        floats = {dtype.name: dtype for dtype in FLOATS}
        dtypes = {path: floats[row["dtype"]] for path, row in manifest["tensors"].items()}
        digests = {path: str(row["sha256"]) for path, row in manifest["tensors"].items()}
        shapes = {path: tuple(row["shape"]) for path, row in manifest["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else str(error)
        raise CheckpointError(folder, [*problems, f"{MANIFEST}: cannot be read: {clip(reason)}"]) from None
    if config is None:
        raise CheckpointError(folder, problems)

    if backbone is None:
        backbone = "lm_head" not in dtypes
    if names.count_tensors(config) > MAX_TENSORS:
        raise CheckpointError(folder, [f"{CONFIG}: describes a model of more than {MAX_TENSORS} tensors"])
    entries = tuple(names.table(config, backbone=backbone and "lm_head" not in dtypes))
    expected = {entry.dotted for entry in entries}
    for path in sorted(expected - dtypes.keys()):
        problems.append(f"{MANIFEST}: {MISSING_HEAD if path == 'lm_head' else f'{path}: missing'}")
    problems += [f"{MANIFEST}: {clip(path)}: unexpected" for path in sorted(dtypes.keys() - expected)]
    for entry in entries:
        if shapes.get(entry.dotted, entry.shape) != entry.shape:
            found = list(shapes[entry.dotted])
            problems.append(f"{MANIFEST}: {entry.dotted}: shape {found}, {CONFIG} gives {list(entry.shape)}")
    if problems:
        raise CheckpointError(folder, problems)
    return Checkpoint(folder, config, entries, naming, backbone, dtypes, digests)
