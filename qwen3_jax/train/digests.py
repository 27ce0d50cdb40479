"""SHA256SUMS of a folder: written over every file in it, checked so that nothing that changed goes unseen.

The file is what `sha256sum --check` reads, and is itself read to the letter: a changed, missing or further line, name
or file is a problem. So no digest of the digests is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen3_jax.checkpoint.export import to_disk

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)\n")
HASHERS = 4  # threads


def write(folder: Path) -> None:
    """Hash every file of a folder into its SHA256SUMS."""
    paths = list(_files(folder))
    with ThreadPoolExecutor(HASHERS) as pool:
        sums = list(zip(pool.map(_digest, paths), paths, strict=True))
    with open(folder / SUMS, "w") as file:
        file.writelines(f"{digest}  {path.relative_to(folder)}\n" for digest, path in sums)
        file.flush()
        os.fsync(file.fileno())


def problems(folder: Path, *, index: int = 0, count: int = 1) -> list[str]:
    """Return what is wrong with a folder's files: their names, and the content of every `count`-th from `index` on."""
    try:
        text = (folder / SUMS).read_bytes().decode("ascii", errors="replace")
    except OSError as error:
        return [f"{SUMS}: {error.strerror}"]
    lines = LINE.findall(text)
    expected = {name: digest for digest, name in lines}
    if "".join(f"{digest}  {name}\n" for digest, name in lines) != text or len(expected) != len(lines) or not lines:
        return [f"{SUMS}: damaged"]
    held = {str(path.relative_to(folder)) for path in _files(folder)} - {SUMS}
    found = [f"{name}: missing" for name in sorted(expected.keys() - held)]
    found += [f"{name}: not listed in {SUMS}" for name in sorted(held - expected.keys())]

    def check(name: str) -> str | None:
        try:
            return None if _digest(folder / name) == expected[name] else f"{name}: damaged, its digest differs"
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(HASHERS) as pool:
        found += [problem for problem in pool.map(check, sorted(expected.keys() & held)[index::count]) if problem]
    return found


def sync(folder: Path) -> None:
    """Make renames in a folder last; not every file system can."""
    with contextlib.suppress(OSError):
        to_disk(folder)


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in sorted(os.walk(folder)):
        yield from (Path(root) / name for name in sorted(names))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
