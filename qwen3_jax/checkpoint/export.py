"""Write Hugging Face folders that transformers opens, complete or not at all.

Parameters → the name table, read backwards → one safetensors file or shards with an index, config.json → a temporary
sibling of the folder, on the disk → renamed into place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3_jax.checkpoint import names, safetensors_file
from qwen3_jax.checkpoint.hf import CONFIG, FLOATS, INDEX, SINGLE, CheckpointError, Params, progress_bar
from qwen3_jax.checkpoint.names import PLAIN, Entry, Naming
from qwen3_jax.config import Qwen3Config

MAX_SHARD_BYTES = 5_000_000_000


def save(
    folder: Path | str,
    config: Qwen3Config,
    params: Params,
    *,
    naming: Naming = PLAIN,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write a Hugging Face folder: config.json and safetensors weights that transformers opens.

    Args:
        folder: is made; it must not exist or be empty. It appears complete or not at all.
        config: its dtype is written as that of the embedding.
        params: nested dict of arrays, each written in its own dtype. Without lm_head, a backbone is written.
        naming: liberties of a source file to repeat.
        max_shard_bytes: above this the weights are split, with an index.
        progress: show a bar on a terminal.

    Raises:
        CheckpointError: `folder` holds something, or the parameters are not those of `config`.
    """
    config = dataclasses.replace(config, dtype=np.dtype(params["embed_tokens"].dtype).name)
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        write_weights(partial, config, params, naming=naming, max_shard_bytes=max_shard_bytes, progress=progress)


@contextlib.contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `folder` when the body succeeds and vanishes when it does not.

    Raises CheckpointError if `folder` exists and is not an empty folder.
    """
    folder = Path(folder).absolute()  # "." has no name
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise CheckpointError(folder, ["exists already: give a new or an empty folder"], verb="written")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                to_disk(path)
        partial.rename(folder)
        to_disk(folder.parent)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise CheckpointError(folder, [f"{error.strerror or error}{where}"], verb="written") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def to_disk(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_weights(
    folder: Path,
    config: Qwen3Config,
    params: Params,
    *,
    naming: Naming = PLAIN,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write the weights of a Hugging Face folder: one file, or shards and their index."""
    entries = require_tree(folder, config, params)
    infos: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for entry in entries:
        leaf = names.get(params, entry.path)
        for row, name in enumerate(entry.names):
            infos[naming.in_file(name)] = (np.dtype(leaf.dtype), entry.file_shape)
            readers[naming.in_file(name)] = _reader(leaf, row if entry.stacked else None, entry.file_shape)
    if naming.redundant_head:
        infos[names.LM_HEAD] = infos[naming.in_file(names.EMBED_TOKENS)]
        readers[names.LM_HEAD] = readers[naming.in_file(names.EMBED_TOKENS)]

    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in infos.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    with progress_bar("writing", sum(sizes.values()), progress) as advance:
        for file, shard in zip(files, shards, strict=True):
            chosen = {name: infos[name] for name in shard}
            safetensors_file.write(folder / file, readers, chosen, advance)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _reader(leaf: Any, row: int | None, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """Return a function that fetches a parameter, or one expert of it, in the shape of the file."""
    return lambda: np.asarray(leaf if row is None else leaf[row]).reshape(shape)


def require_tree(folder: Path, config: Qwen3Config, params: Params) -> tuple[Entry, ...]:
    """Return the table's rows for a parameter tree that has exactly those; lm_head may be left out.

    Raises CheckpointError, about writing `folder`, with every difference.
    """
    entries = tuple(names.table(config, backbone="lm_head" not in params))
    leaves = {".".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]}
    problems = [f"{path}: unexpected parameter" for path in leaves.keys() - {entry.dotted for entry in entries}]
    for entry in entries:
        if (leaf := leaves.get(entry.dotted)) is None:
            problems.append(f"{entry.dotted}: parameter missing, config gives it {list(entry.shape)}")
        elif tuple(leaf.shape) != entry.shape:
            problems.append(f"{entry.dotted}: shape {list(leaf.shape)}, config gives {list(entry.shape)}")
        elif np.dtype(leaf.dtype) not in FLOATS:
            problems.append(f"{entry.dotted}: dtype {leaf.dtype} cannot be exported")
    if problems:
        raise CheckpointError(folder, problems, verb="written")
    return entries
