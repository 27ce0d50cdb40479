"""Read Hugging Face folders: inspect everything, then stream the weights in.

config.json + safetensors headers → `inspect`: every problem of the folder at once, nothing large allocated →
`Checkpoint.load`: tensor by tensor from the memory map, converted piece by piece into its final buffer, placed as a JAX
array. Nothing in a folder is executed and only safetensors weights are opened.

Loaded arrays own their memory. A CPU array made straight from the mapped file would alias it, cost nothing, and change
or crash when the file is rewritten. Instead the values are read once into a private 64-byte-aligned buffer, which the
CPU backend adopts without a second copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qwen3_jax.checkpoint import names, safetensors_file
from qwen3_jax.checkpoint.names import Entry, Naming
from qwen3_jax.checkpoint.safetensors_file import PIECE_BYTES, SafetensorsError, SafetensorsFile, TensorInfo, clip
from qwen3_jax.config import ConfigError, Qwen3Config

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "qwen3_jax.json"  # of an Orbax folder
MAX_INDEX_BYTES = 32 << 20
MAX_TENSORS = 200_000  # of a model; Qwen3-Coder-480B has 30,321

CACHED_BYTES = 1 << 20  # a piece that is converted goes through a buffer that stays in the processor's cache

# What the network can hold. Everything else is refused by name.
FLOATS = {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)}
PARAM_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MISSING_HEAD = (
    f"{names.LM_HEAD}: missing, and {CONFIG} says tie_word_embeddings false: "
    "if this is an embedding model, load it with backbone=True"
)
QUANTISED = re.compile(r".*\.(weight_scale_inv|weight_scale|input_scale|qweight|qzeros|scales|g_idx|weight_packed)")

# Weights in formats that are never opened: the first four execute code when they are.
FOREIGN = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx")

Params = dict[Any, Any]


class CheckpointError(ValueError):
    """A folder cannot be used; `problems` holds one line per problem, the message the first twenty of them."""

    def __init__(self, folder: Path | str, problems: list[str], *, verb: str = "loaded"):
        self.folder, self.problems = Path(folder), problems
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        separator = " " if len(shown) == 1 else "\n  "
        super().__init__(f"{folder}: {separator.join([f'cannot be {verb}:', *shown])}")


class Source(Protocol):
    """A parameter that has not been read yet: `source[index]` reads and returns only that part, as a new array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Any, /) -> np.ndarray: ...


Place = Callable[[str, Source], Any]  # an array of JAX's, or whatever the caller wants in the tree


def on_default_device(path: str, source: Source) -> jax.Array:
    """Read a whole parameter onto the default device. A sharded load replaces this function:

    `lambda path, source: jax.make_array_from_callback(source.shape, shardings[path], source.__getitem__)`
    """
    return jax.device_put(source[...]).block_until_ready()  # or host copies queue up behind a slow device


class Located(NamedTuple):
    """A tensor of the name table, found: the file and its bytes."""

    file: SafetensorsFile
    info: TensorInfo


class FileSource:
    """A parameter as it lies in its files, in the dtype that was asked for."""

    def __init__(self, entry: Entry, located: list[Located], dtype: np.dtype):
        self.shape, self.dtype = entry.shape, dtype
        self.nbytes = dtype.itemsize * math.prod(entry.shape)
        self._parts, self._stacked = located, entry.stacked

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(i for i in index if i is not Ellipsis)
        index += (slice(None),) * (len(self.shape) - len(index))
        spans = [range(*i.indices(size)) for i, size in zip(index, self.shape, strict=True)]
        out = empty_aligned(tuple(map(len, spans)), self.dtype)
        if self._stacked:
            for row, expert in enumerate(spans[0]):
                _read(out[row], self._parts[expert], self.shape[1:], index[1:])
        else:
            _read(out, self._parts[0], self.shape, index)
        return out


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array that starts on 64 bytes, which the CPU backend adopts without a copy."""
    nbytes = dtype.itemsize * math.prod(shape)
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read(out: np.ndarray, located: Located, shape: tuple[int, ...], index: tuple[slice, ...]) -> None:
    """Copy `tensor.reshape(shape)[index]` into `out`, converting, with at most a piece of the file resident."""
    file, info = located
    if not out.size:
        return
    begin, end, step = index[0].indices(shape[0])
    if step != 1:
        raise IndexError(f"only contiguous slices can be read, got a step of {step}")
    row_bytes = info.nbytes // shape[0]
    whole_rows = all(i.indices(size) == (0, size, 1) for i, size in zip(index[1:], shape[1:], strict=True))
    if whole_rows and out.dtype == info.dtype:
        file.read_into(out, info.start + begin * row_bytes)
        return
    rows = max(1, (CACHED_BYTES if whole_rows else PIECE_BYTES) // max(1, row_bytes))
    piece = np.empty((min(rows, end - begin), *shape[1:]) if whole_rows else 0, info.dtype)
    mapped = file.view(info._replace(shape=shape))
    for row in range(begin, end, rows):
        count, start = min(rows, end - row), info.start + row * row_bytes
        target = out[row - begin : row - begin + count]
        if whole_rows:
            file.read_into(piece[:count], start)
            convert(target, piece[:count])
        else:
            convert(target, mapped[(slice(row, row + count), *index[1:])])
            file.release(start, count * row_bytes)


def convert(out: np.ndarray, values: np.ndarray) -> None:
    """Copy values into `out`, rounding to nearest even where `out` is narrower."""
    if out.dtype == values.dtype:  # as plain bits: numpy copies them with memcpy
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out.view(bits)[...] = values.view(bits)
    elif out.dtype == np.float32 and values.dtype == ml_dtypes.bfloat16:  # 9 times faster than astype
        np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(all="ignore"):  # a NaN stays a NaN
            out[...] = values.astype(out.dtype)


# --- inspect ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder without problems, opened: what `inspect` returns. Reading goes through `load`."""

    folder: Path
    config: Qwen3Config
    entries: tuple[Entry, ...]
    naming: Naming
    tensors: Mapping[str, Located]  # by the table's name

    def file_dtype(self, entry: Entry) -> np.dtype:
        return self.tensors[entry.names[0]].info.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in their file dtypes."""
        return sum(self.file_dtype(entry).itemsize * math.prod(entry.shape) for entry in self.entries)

    def source(self, entry: Entry, dtype: np.dtype | None = None) -> FileSource:
        """Return the reader of one parameter, in the file's dtype or another."""
        located = [self.tensors[name] for name in entry.names]
        return FileSource(entry, located, self.file_dtype(entry) if dtype is None else dtype)

    def load(
        self,
        prefix: str = "",
        *,
        dtype: Any = None,
        place: Place = on_default_device,
        progress: bool = False,
    ) -> Any:
        """Read the parameters below a dotted path ("" for all, "layers.3", "embed_tokens") and return that subtree.

        Args:
            prefix: which parameters; a layer at a time keeps one layer in memory.
            dtype: "float32", "bfloat16", or None for each tensor's own.
            place: turns a path and a `Source` into an array.
            progress: show a bar on a terminal.

        Raises:
            KeyError: nothing is called `prefix`.
        """
        target = param_dtype_of(dtype)
        chosen = [e for e in self.entries if prefix in ("", e.dotted) or e.dotted.startswith(prefix + ".")]
        if not chosen:
            raise KeyError(f"no parameter of {self.folder.name} lies at {prefix!r}")
        total = sum(self.source(entry, target).nbytes for entry in chosen)
        tree: Params = {}
        with progress_bar("loading", total, progress) as advance, workers() as pool:

            def read(entry: Entry) -> Any:
                source = self.source(entry, target)
                array = place(entry.dotted, source)
                advance(source.nbytes)
                return array

            for entry, array in zip(chosen, pool.map(read, chosen), strict=True):
                names.put(tree, entry.path, array)
        depth = len(prefix.split(".")) if prefix else 0
        return names.get(tree, chosen[0].path[:depth])


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Run a pool that drops its queue when the body fails or is interrupted."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # copying releases the interpreter lock
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def param_dtype_of(dtype: Any) -> np.dtype | None:
    """Return the numpy dtype of "float32" or "bfloat16" (None stays None). Raises ValueError for any other."""
    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        if np.dtype(dtype) in PARAM_DTYPES.values():
            return np.dtype(dtype)
    raise ValueError(f'dtype {dtype!r} is not supported: give "float32", "bfloat16", or None for the dtype of the file')


def inspect(folder: Path | str, *, backbone: bool | None = False) -> Checkpoint:
    """Check a Hugging Face folder from its config and headers, and return it opened.

    `backbone` says that no lm_head is wanted, as for an embedding model: it may then be missing. None means: if the
    folder is a backbone saved by itself.
    Raises CheckpointError with all problems of the folder, each naming its file and tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, ["no such folder" if not folder.exists() else "not a folder"])
    problems: list[str] = []
    config = read_config(folder, problems)
    try:
        files, index = _weight_files(folder, problems)
    except OSError as error:
        raise CheckpointError(folder, [*problems, f"cannot be listed: {error.strerror or error}"]) from None
    opened: dict[str, SafetensorsFile] = {}
    for name in files:
        try:
            require_inside(folder, name)
            opened[name] = SafetensorsFile(folder / name)
        except (SafetensorsError, OutsideError) as error:
            problems.append(str(error))
    unread = files.keys() - opened.keys()
    located = _locate(opened, index, unread, problems)
    if config is None or not opened:
        raise CheckpointError(folder, problems)

    naming, entries, tensors = _match(config, located, backbone, bool(unread), problems)
    if problems:
        raise CheckpointError(folder, problems)
    return Checkpoint(folder, config, entries, naming, tensors)


def read_config(folder: Path, problems: list[str], *others: str) -> Qwen3Config | None:
    """Read a folder's config.json, which like the `others` must lie inside; None if not, then `problems` say why."""
    try:
        for name in (CONFIG, *others):
            require_inside(folder, name)
        return Qwen3Config.from_file(folder)
    except ConfigError as error:
        problems += [f"{CONFIG}: {problem}" for problem in error.problems]
    except OutsideError as error:
        problems.append(str(error))
    return None


class OutsideError(ValueError):
    """A file of a folder lies somewhere else."""


def require_inside(folder: Path, name: str) -> None:
    """Refuse a file that a symlink takes out of its folder. Raises OutsideError.

    The cache of huggingface_hub is the exception: models--<id>/snapshots/<revision>/<file> links into
    models--<id>/blobs there, and since version 2.4 from there into the blobs of the whole cache.
    """
    try:
        home, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of symlinks
        raise OutsideError(f"{clip(name)}: cannot be followed: {error}") from None
    homes = [home]
    repo = home.parent.parent
    if home.parent.name == "snapshots" and repo.name.startswith("models--"):
        homes += [repo / "blobs", repo.parent / "blobs"]
    if not any(target.is_relative_to(place) for place in homes):
        raise OutsideError(f"{clip(name)}: points outside the folder, to {target}: put the file itself there")


def _weight_files(folder: Path, problems: list[str]) -> tuple[dict[str, None], dict[str, str] | None]:
    """Return the names of the weight files and the index (tensor → file), if there is one."""
    has_single, has_index = ((folder / name).exists() or (folder / name).is_symlink() for name in (SINGLE, INDEX))
    index = _read_index(folder, problems) if has_index else None
    if has_index:
        files = dict.fromkeys((index or {}).values())
        listed = {path.name for path in folder.glob("model*.safetensors")} - files.keys()
        if index is not None and listed:
            problems += [f"{clip(name)}: lies in the folder, but {INDEX} does not name it" for name in sorted(listed)]
        return files, index
    if has_single:
        return {SINGLE: None}, None
    foreign = sorted({path.name for pattern in FOREIGN for path in folder.glob(pattern)})
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        problems.append(f"{INDEX}: missing, so {len(loose)} file(s) like {clip(loose[0])} have no order")
    elif foreign:
        remedy = "not a safetensors file, never opened: save the model with safetensors"
        problems += [f"{clip(name)}: {remedy}" for name in foreign]
    elif (folder / MANIFEST).exists():
        problems.append(f"{MANIFEST}: this is an Orbax folder, convert it first: qwen3-jax convert IN OUT --to hf")
    else:
        problems.append(f"{SINGLE}: missing, and there is no {INDEX} either")
    return {}, None


def _read_index(folder: Path, problems: list[str]) -> dict[str, str] | None:
    path = folder / INDEX
    try:
        require_inside(folder, INDEX)
        if not path.is_file():
            raise ValueError("is not a regular file")
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, the limit is {MAX_INDEX_BYTES}")
        index = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=safetensors_file.unique_pairs)
    except OutsideError as error:
        problems.append(str(error))
        return None
    except safetensors_file.DuplicateKey as error:
        problems.append(f"{INDEX}: {clip(str(error))}: occurs twice")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{INDEX}: cannot be read: {clip(str(error))}")
        return None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{INDEX}: weight_map must be an object from tensor names to file names")
        return None
    good: dict[str, str] = {}
    bad: set[str] = set()
    for tensor, file in weight_map.items():
        if isinstance(file, str) and re.fullmatch(r"[\w][\w.\-]*\.safetensors", file, re.ASCII):
            good[tensor] = file
        elif repr(file) not in bad:  # once per file, not once per tensor
            bad.add(repr(file))
            problems.append(f"{INDEX}: {clip(tensor)}: {clip(repr(file))} is not the name of a file in this folder")
    return good


def _locate(
    opened: Mapping[str, SafetensorsFile], index: Mapping[str, str] | None, unread: set[str], problems: list[str]
) -> dict[str, Located]:
    """Merge the shards, checking them against each other and against the index."""
    located: dict[str, Located] = {}
    for shard, file in opened.items():
        for name, info in file.tensors.items():
            if name in located:
                problems.append(f"{shard}: {clip(name)}: also in {located[name].file.path.name}")
                continue
            located[name] = Located(file, info)
            if index is not None and index.get(name) != shard:
                told = f"in {index[name]}" if name in index else "nowhere"
                problems.append(f"{shard}: {clip(name)}: {INDEX} says that it is {told}")
    for name, shard in (index or {}).items():
        if name not in located and shard not in unread:  # an unreadable shard has been reported by itself
            problems.append(f"{shard}: {clip(name)}: missing, {INDEX} says that it is here")
    return located


def _match(
    config: Qwen3Config, located: dict[str, Located], backbone: bool | None, partial: bool, problems: list[str]
) -> tuple[Naming, tuple[Entry, ...], dict[str, Located]]:
    """Hold the tensors that were found against the name table. `partial`: some files could not be read."""
    bare = names.uses_bare_names(located)
    if backbone is None:
        backbone = bare and names.LM_HEAD not in located
    in_table = Naming(bare=bare).in_table
    tensors: dict[str, Located] = {}
    called: dict[str, str] = {}  # the table's name → file and name as they stand in the folder
    for name, place in located.items():
        where = f"{place.file.path.name}: {clip(name)}"
        try:
            members = names.unfuse(config, in_table(name), place.info.shape)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        parts = {in_table(name): (place.info.shape, 0)} if members is None else members
        for member, (shape, first) in parts.items():
            if member in tensors:
                problems.append(f"{where}: holds {member}, which {called[member]} holds too")
            info = TensorInfo(place.info.dtype, shape, place.info.start + first * place.info.dtype.itemsize)
            tensors[member], called[member] = Located(place.file, info), where

    expected = names.count_tensors(config)
    if expected > MAX_TENSORS:
        problems.append(f"{CONFIG}: describes a model of {expected} tensors, the limit is {MAX_TENSORS}")
        return Naming(), (), {}
    entries = tuple(names.table(config, backbone=backbone))
    shapes = {name: entry.file_shape for entry in entries for name in entry.names}
    tied_head = config.tie_word_embeddings and names.LM_HEAD in tensors
    if config.tie_word_embeddings or backbone:  # an untied head may be there, and stays unread
        shapes |= {names.LM_HEAD: (config.vocab_size, config.hidden_size)} if names.LM_HEAD in tensors else {}

    for name, shape in shapes.items():
        if name not in tensors:
            if name == names.LM_HEAD and not partial:
                problems.append(MISSING_HEAD)
            elif not partial:
                problems.append(f"{Naming(bare=bare).in_file(name)}: missing, {CONFIG} gives it {list(shape)}")
        elif tensors[name].info.shape != shape:
            found = list(tensors[name].info.shape)
            problems.append(f"{called[name]}: shape {found}, {CONFIG} gives {list(shape)}")
    problems += _dtype_problems(entries, tensors, called, shapes)
    if tied_head and not _same_bytes(tensors[names.LM_HEAD], tensors.get(names.EMBED_TOKENS)):
        told = f"{CONFIG} says tie_word_embeddings true"
        problems.append(f"{called[names.LM_HEAD]}: differs from {names.EMBED_TOKENS}, but {told}")
    return Naming(bare, tied_head), entries, tensors


def _dtype_problems(
    entries: tuple[Entry, ...], tensors: Mapping[str, Located], called: Mapping[str, str], shapes: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what is wrong with tensors that the table does not know or cannot hold."""
    for name in sorted(tensors.keys() - shapes.keys()):
        hint = ": quantised checkpoints are not supported, use the unquantised one" if QUANTISED.fullmatch(name) else ""
        yield f"{called[name]}: unexpected{hint}"
    for name in sorted(tensors.keys() & shapes.keys()):
        dtype = tensors[name].info.dtype
        if dtype not in FLOATS:
            allowed = ", ".join(sorted(safetensors_file.NAMES[each] for each in FLOATS))
            told = safetensors_file.NAMES[dtype]
            yield f"{called[name]}: dtype {told}, expected one of {allowed} (quantised tensors are not supported)"
    for entry in entries:
        found = [name for name in entry.names if name in tensors]
        for name in found[1:]:
            first, this = tensors[found[0]].info.dtype, tensors[name].info.dtype
            if this != first and {this, first} <= FLOATS:
                yield f"{called[name]}: dtype {this}, but {found[0]} is {first}: the experts of a layer share one"


def _same_bytes(one: Located, other: Located | None) -> bool:
    """Compare two tensors bit for bit, piece by piece."""
    if other is None or one.info[:2] != other.info[:2]:
        return other is None  # a missing tensor is a problem of its own
    for begin in range(0, one.info.nbytes, PIECE_BYTES):
        count = min(PIECE_BYTES, one.info.nbytes - begin)
        views = []
        for file, info in (one, other):
            views.append(file.view(TensorInfo(np.dtype(np.uint8), (count,), info.start + begin)))
        same = np.array_equal(*views)
        for file, info in (one, other):
            file.release(info.start + begin, count)
        if not same:
            return False
    return True


@contextlib.contextmanager
def progress_bar(verb: str, total: int | None, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` bytes (None: unknown) on a terminal's stderr and yield the function that advances it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = enabled and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)
