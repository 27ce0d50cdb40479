"""Records on disk, by number: JSONL and text through an index of line ends, Parquet by row group.

Opening scans a file once for its line ends (8 bytes of memory per line; nothing else is kept) and every line counts,
good or bad: what is wrong with one never changes the number, and so the place in the order, of another.
"""

from __future__ import annotations

import collections
import glob
import json
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen3_jax.train.data.config import DataError

SCAN_BYTES = 16 << 20
ROW_GROUPS = 4  # of a Parquet file, kept in memory


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a short kind to count by, the text says more."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


class File(Protocol):
    """The records of one file."""

    size_bytes: int

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, Any]:
        """Return a record. Raises BadRecord. Safe on several threads."""
        ...


class Lines:
    """A JSONL file, or a text file of which each line is a document."""

    def __init__(self, path: Path, *, json_lines: bool, max_bytes: int):
        self._path, self._json, self._max_bytes = path, json_lines, max_bytes
        self._file = os.open(path, os.O_RDONLY)  # stays open: the records outlive a rename or removal of the file
        weakref.finalize(self, os.close, self._file)
        self.size_bytes = os.fstat(self._file).st_size
        self._ends = _line_ends(self._file, self.size_bytes)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> dict[str, Any]:
        start = int(self._ends[index - 1]) + 1 if index else 0
        size = int(self._ends[index]) - start
        if size > self._max_bytes:
            raise BadRecord("too large", f"{size} bytes, data.max_record_bytes is {self._max_bytes}")
        try:
            line = os.pread(self._file, size, start)
        except OSError as error:
            raise BadRecord("unreadable", str(error.strerror)) from None
        if len(line) < size:
            raise BadRecord("unreadable", f"{self._path} has become shorter")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8", f"byte {error.start}") from None
        if not text.strip():
            raise BadRecord("empty")
        if not self._json:
            return {"text": text.rstrip("\r")}
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadRecord("not JSON", str(error)) from None
        if not isinstance(record, dict):
            raise BadRecord("not an object", f"a JSON {type(record).__name__}")
        return record


def _line_ends(file: int, size: int) -> np.ndarray:
    """Return where each line ends, int64; the last may lack its newline."""
    ends, done = [], 0
    while piece := os.pread(file, min(SCAN_BYTES, size - done), done):
        ends.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + done)
        done += len(piece)
    found = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    if size and (not len(found) or found[-1] != size - 1):
        found = np.append(found, size)
    return found.astype(np.int64)


class Parquet:
    """A Parquet file; a read loads the row group around the record, the last few stay."""

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet  # pyright: ignore[reportMissingImports] - optional
        except ImportError:
            raise DataError(f"{path}: Parquet needs pyarrow: pip install pyarrow, or convert to JSONL") from None
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from both
            raise DataError(f"{path}: not a Parquet file: {error}") from None
        groups = range(self._file.metadata.num_row_groups)
        self._starts = np.cumsum([0, *(self._file.metadata.row_group(i).num_rows for i in groups)])
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = path.stat().st_size

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            with self._lock:
                if group not in self._groups:
                    self._groups[group] = self._file.read_row_group(group)
                    if len(self._groups) > ROW_GROUPS:
                        self._groups.popitem(last=False)
                self._groups.move_to_end(group)
                [record] = self._groups[group].slice(index - int(self._starts[group]), 1).to_pylist()
        except (OSError, ValueError) as error:
            raise BadRecord("unreadable", str(error)) from None
        return {key: value for key, value in record.items() if value is not None}


class Records:
    """The records of several files, numbered in the order of the files."""

    def __init__(self, name: str, paths: str | Sequence[str], *, max_bytes: int):
        """Open and index. Raises DataError naming a pattern without a file, or a file that cannot be read."""
        self.name = name
        self._files = [_open(path, max_bytes) for path in _found(name, [paths] if isinstance(paths, str) else paths)]
        self._starts = np.cumsum([0, *map(len, self._files)])
        self.size_bytes = sum(file.size_bytes for file in self._files)
        if not len(self):
            raise DataError(f"data source {name!r} has no records in {paths}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> dict[str, Any]:
        """Return record `index` of all. Raises BadRecord."""
        at = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[at].read(index - int(self._starts[at]))


def _found(name: str, patterns: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"data source {name!r}: no file is named {pattern}")
        found += map(Path, matches)
    return found


def _open(path: Path, max_bytes: int) -> File:
    try:
        if path.suffix == ".parquet":
            return Parquet(path)
        if path.suffix in (".jsonl", ".txt"):
            return Lines(path, json_lines=path.suffix == ".jsonl", max_bytes=max_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    raise DataError(f"{path}: a data file ends in .jsonl, .txt or .parquet, this one in {path.suffix or 'nothing'!r}")
