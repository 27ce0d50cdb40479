"""Orbax folders on a mesh: any number of processes writes one, any other number reads it onto another mesh.

The folder is `orbax_folder`'s. Reading, each process takes its slices straight from the stored arrays, and the check of
the digests is divided: process p of P hashes every P-th tensor, as it streams by. Writing, Orbax stores each device's
shard; the digests are then taken from what lies on the disk, divided in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen3_jax import distributed
from qwen3_jax.checkpoint import names, orbax_folder
from qwen3_jax.checkpoint.export import require_tree
from qwen3_jax.checkpoint.hf import (
    CONFIG,
    MANIFEST,
    CheckpointError,
    Params,
    Place,
    convert,
    empty_aligned,
    param_dtype_of,
    progress_bar,
    workers,
)
from qwen3_jax.checkpoint.names import Naming
from qwen3_jax.checkpoint.orbax_folder import ARRAYS, CHUNK_BYTES, FORMAT
from qwen3_jax.checkpoint.safetensors_file import PIECE_BYTES, clip
from qwen3_jax.config import Qwen3Config

DIGEST_BYTES = hashlib.sha256().digest_size


class Stored:
    """A parameter of an Orbax folder; `stored[index]` reads only the chunks under it, in the dtype asked for."""

    def __init__(self, folder: Path, path: str, dtype: np.dtype | None = None):
        import tensorstore

        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{(folder / ARRAYS).resolve()}/", "path": path},
        }
        self._store = tensorstore.open(spec, read=True, open=True).result()
        self.shape = tuple(self._store.shape)
        self.stored_dtype = np.dtype(self._store.dtype.numpy_dtype)
        self.dtype = self.stored_dtype if dtype is None else dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        values = np.asarray(self._store[index].read().result())
        out = empty_aligned(values.shape, self.dtype)
        convert(out, values)
        return out

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield the whole array in its own dtype, C-contiguous, a band of chunks at a time."""
        chunk_rows = int((self._store.chunk_layout.read_chunk.shape or self.shape)[0] or 1)
        band_bytes = chunk_rows * self.stored_dtype.itemsize * math.prod(self.shape[1:])
        rows = chunk_rows * max(1, PIECE_BYTES // band_bytes)
        for row in range(0, self.shape[0], rows):
            yield np.ascontiguousarray(self._store[row : min(row + rows, self.shape[0])].read().result())

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece.reshape(-1).view(np.uint8).data)
        return digest.digest()


def load(
    checkpoint: orbax_folder.Checkpoint, *, dtype: Any = None, place: Place, progress: bool = False, verify: bool = True
) -> Params:
    """Read every parameter through `place`, which takes the slices that it needs; all processes call this together.

    Args:
        checkpoint: of `orbax_folder.inspect`.
        dtype: "float32", "bfloat16", or None for each tensor's own.
        place: turns a path and a `Source` into an array.
        progress: show a bar on a terminal.
        verify: hash this process's share of the tensors first, which reads them once more.

    Raises:
        CheckpointError: on every process, with what any of them found.
    """
    target = param_dtype_of(dtype)
    entries = [entry for entry in checkpoint.entries if not (checkpoint.backbone and entry.dotted == "lm_head")]
    sizes = {e.dotted: checkpoint.dtypes[e.dotted].itemsize * math.prod(e.shape) for e in entries}
    mine = _share(entries) if verify else []
    total = sum(sizes.values()) + sum(sizes[entry.dotted] for entry in mine)
    params: Params = {}
    with progress_bar("loading", total, progress) as advance, workers() as pool:

        def check(entry: names.Entry) -> str | None:
            expected = (entry.shape, checkpoint.dtypes[entry.dotted])
            try:
                stored = Stored(checkpoint.folder, entry.dotted)
                if (stored.shape, stored.stored_dtype) != expected:
                    found = f"{stored.stored_dtype} {list(stored.shape)}"
                    return f"{ARRAYS}: {entry.dotted}: {found} stored, {expected[1]} {list(expected[0])} expected"
                if stored.digest().hex() != checkpoint.digests[entry.dotted]:
                    return f"{ARRAYS}: {entry.dotted}: damaged, its bytes do not have the digest of {MANIFEST}"
            except Exception as error:  # TensorStore raises many kinds for a damaged folder
                return f"{ARRAYS}: {entry.dotted}: {clip(' '.join(str(error).split()))}"
            finally:
                advance(sizes[entry.dotted])
            return None

        problems = [problem for problem in pool.map(check, mine) if problem]
        if problems := _everybodys(problems):
            raise CheckpointError(checkpoint.folder, problems)

        def read(entry: names.Entry) -> Any:
            array = place(entry.dotted, Stored(checkpoint.folder, entry.dotted, target))
            advance(sizes[entry.dotted])
            return array

        for entry, array in zip(entries, pool.map(read, entries), strict=True):
            names.put(params, entry.path, array)
    return params


def _share(entries: list[names.Entry]) -> list[names.Entry]:
    return entries[jax.process_index() :: jax.process_count()]


def _everybodys(problems: list[str]) -> list[str]:
    """Return the problems of all processes, sorted, on all of them."""
    if jax.process_count() == 1:
        return sorted(problems)
    text = "\n".join(problems)[: 1 << 16].encode()
    padded = np.zeros(1 << 16, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return sorted(line for row in rows for line in row.tobytes().rstrip(b"\0").decode(errors="replace").splitlines())


def save(
    folder: Path | str, config: Qwen3Config, params: Params, *, naming: Naming = names.PLAIN, progress: bool = True
) -> None:
    """Write an Orbax folder from arrays on a mesh; all processes call this together and see the same file system.

    Args:
        folder: is made; it must not exist or be empty. It appears complete or not at all.
        config: of the file, see `placement.without_repeats`; its dtype is written as that of the embedding.
        params: nested dict of global arrays.
        naming: liberties of a source file to repeat.
        progress: show a bar on the first process's terminal.

    Raises:
        CheckpointError: `folder` holds something, or the parameters are not those of `config`.
    """
    import orbax.checkpoint as ocp  # 1.3 s to import

    folder = Path(folder)
    entries = list(require_tree(folder, config, params))
    leaves = {entry.dotted: names.get(params, entry.path) for entry in entries}
    config = dataclasses.replace(config, dtype=np.dtype(params["embed_tokens"].dtype).name)
    partial = folder.parent / f".{folder.name}.partial"

    def begin() -> None:
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
            raise CheckpointError(folder, ["exists already: give a new or an empty folder"], verb="written")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")

    def end() -> None:
        manifest = {
            "format": FORMAT,
            "naming": naming._asdict(),
            "tensors": {
                entry.dotted: {
                    "dtype": np.dtype(leaves[entry.dotted].dtype).name,
                    "shape": list(entry.shape),
                    "sha256": digests[entry.dotted],
                }
                for entry in entries
            },
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        partial.rename(folder)

    distributed.once(begin)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    main = progress and distributed.is_main()
    with progress_bar("writing", None, main), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save((partial / ARRAYS).resolve(), args=ocp.args.PyTreeSave(params, save_args=chunks))
    with workers() as pool:
        table = np.zeros((len(entries), DIGEST_BYTES), np.uint8)
        mine = pool.map(lambda entry: Stored(partial, entry.dotted).digest(), _share(entries))
        for row, digest in zip(range(jax.process_index(), len(entries), jax.process_count()), mine, strict=True):
            table[row] = np.frombuffer(digest, np.uint8)
    if jax.process_count() > 1:
        table = multihost_utils.process_allgather(table).max(axis=0)
    digests = {entry.dotted: row.tobytes().hex() for entry, row in zip(entries, table, strict=True)}
    distributed.once(end)
