"""Read and write one safetensors file without trusting a byte of it.

A file is an 8-byte little-endian header length, a JSON header and the tensor bytes. `SafetensorsFile` checks the whole
header against the file's size before anything else is looked at, then hands out read-only numpy views of a memory map:
nothing is copied until somebody copies it. `write` produces the same format. Stricter than the reference
implementation in three places: duplicate names are refused (it keeps the last), unknown fields of a tensor are refused
(it drops them), and a header is bounded to 16 MiB and 100,000 tensors (all of Qwen3-Coder-480B needs 4 MiB and 30,000).

Format: https://huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_RANK = 32  # numpy stops at 64
PIECE_BYTES = 16 << 20  # large copies and scans go in pieces of this size, so that few mapped pages are resident

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsError(ValueError):
    """One file cannot be read: names the file and, where there is one, the tensor."""

    def __init__(self, path: Path | str, reason: str, tensor: str | None = None):
        self.path, self.reason, self.tensor = Path(path), reason, tensor
        where = f"{Path(path).name}: {clip(tensor)}" if tensor is not None else Path(path).name
        super().__init__(f"{where}: {reason}")


class TensorInfo(NamedTuple):
    """Where a tensor lies: `start` is a byte offset from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class SafetensorsFile:
    """A memory-mapped safetensors file: `file[name]` is a read-only numpy view of it, without a copy.

    A view follows the file: it changes when the file is rewritten in place, and reading it kills the process (SIGBUS)
    when the file has been cut short since. Copy what must outlive that, as loading does. Raises SafetensorsError.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe would wait for ever
                raise SafetensorsError(path, "is not a regular file")
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(self.path, file, size)
                self.metadata, self.tensors = _parse_header(self.path, header, data_start, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise SafetensorsError(path, f"cannot be read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill a C-contiguous array with the file's bytes from `start`.

        The kernel copies from its cache into `out`, which spares the page faults of a mapping: 1.5 to 6 times faster.
        Raises SafetensorsError if the file has become shorter or cannot be read.
        """
        target = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self._descriptor, [target[done:]], start + done)
                if count == 0:
                    raise SafetensorsError(self.path, "was cut short while it was being read")
                done += count
        except OSError as error:
            raise SafetensorsError(self.path, f"cannot be read: {error.strerror or error}") from None

    def view(self, info: TensorInfo) -> np.ndarray:
        """Return the bytes at `info` as an array; `info` need not be a tensor of the header, only a part of one.

        Raises SafetensorsError if the file has become shorter.
        """
        if self._map.size() < info.start + info.nbytes:  # of the file as it is now
            raise SafetensorsError(self.path, "was cut short while it was being read")
        flat = np.frombuffer(self._map, info.dtype, math.prod(info.shape), info.start)
        return flat.reshape(info.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.view(self.tensors[name])

    def release(self, start: int, nbytes: int) -> None:
        """Drop the resident pages of a byte range that has been read; they stay in the page cache of the kernel."""
        if nbytes >= mmap.PAGESIZE and hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + nbytes - first)


def _read_header(path: Path, file, size: int) -> tuple[bytes, int]:
    if size < 8:
        raise SafetensorsError(path, f"truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise SafetensorsError(path, f"header of {length} bytes is beyond the limit of {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise SafetensorsError(path, f"truncated: header of {length} bytes in a file of {size} bytes")
    header = file.read(length)
    if len(header) != length:
        raise SafetensorsError(path, f"truncated: {len(header)} bytes read of a header of {length}")
    if not header.startswith(b"{"):
        raise SafetensorsError(path, "header does not begin with '{'")
    if header.count(b"{") + header.count(b"[") > 3 * MAX_TENSORS + 2:  # before json builds millions of objects
        raise SafetensorsError(path, f"header lists more than {MAX_TENSORS} tensors")
    return header, 8 + length


class DuplicateKey(ValueError):
    """A JSON object holds a key twice."""


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that occurs twice (`json` would keep the last). Raises DuplicateKey."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DuplicateKey(key)
        result[key] = value
    return result


def clip(name: str, limit: int = 200) -> str:
    """Shorten a name that a hostile file chose, and show control characters as escapes."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= limit else f"{shown[:limit]}… ({len(shown)} characters)"


def _parse_header(
    path: Path, header: bytes, data_start: int, size: int
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique_pairs)
    except DuplicateKey as error:
        raise SafetensorsError(path, "occurs twice in the header", str(error)) from None
    except RecursionError:
        raise SafetensorsError(path, "header is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise SafetensorsError(path, f"header is not valid JSON: {clip(str(error))}") from None

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError(path, "must map strings to strings", "__metadata__")
    if len(entries) > MAX_TENSORS:
        raise SafetensorsError(path, f"header lists {len(entries)} tensors, the limit is {MAX_TENSORS}")

    tensors = {name: _parse_tensor(path, name, entry, data_start) for name, entry in entries.items()}
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            begin, expected = info.start - data_start, position - data_start
            raise SafetensorsError(path, f"{what}: data begin at {begin}, expected {expected}", name)
        position += info.nbytes
        if position > size:
            need, have = position - data_start, size - data_start
            raise SafetensorsError(path, f"truncated: data end at {need}, the file holds {have} bytes of data", name)
    if position != size:
        raise SafetensorsError(path, f"{size - position} bytes after the last tensor")
    return metadata, tensors


def _parse_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63  # a bool is an int in Python

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(path, "needs exactly the fields dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SafetensorsError(path, f"unknown dtype {clip(repr(dtype))}", name)
    if not isinstance(shape, list) or not all(map(is_size, shape)) or len(shape) > MAX_RANK:
        raise SafetensorsError(path, f"shape must be at most {MAX_RANK} sizes, is {clip(repr(shape))}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise SafetensorsError(path, f"data_offsets must be two offsets, are {clip(repr(offsets))}", name)
    if math.prod(max(1, size) for size in shape) >= 1 << 60:  # an empty tensor may still claim sizes beyond numpy's
        raise SafetensorsError(path, f"shape {clip(repr(shape))} is impossible", name)
    info = TensorInfo(DTYPES[dtype], tuple(shape), data_start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        told = f"data_offsets {offsets} span {offsets[1] - offsets[0]} bytes"
        raise SafetensorsError(path, f"{told}, {dtype} {shape} needs {info.nbytes}", name)
    return info


def pieces(array: np.ndarray) -> Iterable[np.ndarray]:
    """Yield a C-contiguous array as flat views of at most `PIECE_BYTES`."""
    flat = array.reshape(-1)
    step = max(1, PIECE_BYTES // array.itemsize)
    for begin in range(0, flat.size, step):
        yield flat[begin : begin + step]


def write(
    path: Path | str,
    tensors: Mapping[str, Callable[[], np.ndarray]],
    infos: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write one file: `infos` gives dtype and shape of every name, `tensors[name]()` its values when their turn comes.

    Tensors are ordered by falling item size, so that every one is aligned. The file is on the disk when this returns.
    """
    order = sorted(infos, key=lambda name: -infos[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    position = 0
    for name in order:
        dtype, shape = infos[name]
        end = position + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.asarray(tensors[name](), order="C")  # ascontiguousarray would make a scalar 1-D
            if (array.dtype, array.shape) != infos[name]:
                raise ValueError(f"{name}: {array.dtype} {array.shape} given, {infos[name]} announced")
            for piece in pieces(array):
                file.write(piece.view(np.uint8).data)
                on_bytes(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())
