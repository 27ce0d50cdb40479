"""The state of a run on disk: saved beside the training, committed with digests, verified before it is used.

    checkpoints/
      step_00000120/
        SHA256SUMS       of every other file, as `sha256sum --check` reads it
        step.json        step, path, shape and dtype of every leaf, and what the loop adds (data state, …)
        state/           Orbax: the arrays
      step_00000140.partial/    being written, or left by a run that was killed

Orbax copies the arrays to the host and goes on in threads; another one waits for it, hashes every file, writes
SHA256SUMS and gives the folder its name. That rename is the commit: a kill loses what came after the last one, at most
an interval between saves and the steps made while a save is written.

Orbax alone restores most flipped bits of its files without an error, and its CheckpointManager counts a damaged step
among those that it keeps, so folders, retention and verification are here and only the arrays are Orbax's.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen3_jax import distributed
from qwen3_jax.train import digests, leaves

FORMAT = "qwen3_jax training state 1"
STEP, ARRAYS, PARTIAL = "step.json", "state", ".partial"
CHUNK_BYTES = 64 << 20  # a slice is read in whole chunks: small enough to waste little, large enough for few files

log = logging.getLogger(__name__)


class StateError(ValueError):
    """A training state that cannot be written or used: one line for each step, naming file or leaf."""


class _Told(logging.Filter):
    """Drop the tracebacks that Orbax's threads log of errors that they raise as well: `Checkpoints` says them once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_Told())


class Checkpoints:
    """The checkpoints of one run. In several processes, all call each method together."""

    def __init__(self, folder: Path | str, *, keep: int, max_failures: int = 3):
        """Only look at a folder; it is made and locked by `claim`, or by the first `save`.

        Args:
            folder: of the run's checkpoints.
            keep: how many of the newest stay.
            max_failures: failed saves in a row after which `save` raises; until then training goes on.
        """
        if keep < 1:
            raise StateError(f"keep is {keep}: at least the newest checkpoint must stay, give 1 or more")
        self.folder, self.keep, self.max_failures = Path(folder).absolute(), keep, max_failures
        self.skipped: dict[int, str] = {}  # steps that `latest` passed over, and why
        self.failures = 0  # saves that failed, in all
        self._failures_in_a_row = 0
        self._pending = False  # a save whose outcome has not been counted
        self._commit: threading.Thread | None = None
        self._failure: str | None = None  # of that save, on this process
        self._problem: str | None = None  # of the save that was counted last, on any process, until it is told
        self._verified: set[int] = set()
        self._lock: Any = None
        self._checkpointer: Any = None

    # --- writing ------------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Make the folder, lock it against another run, and remove what a killed run left half written.

        Raises:
            StateError: another process trains in this folder.
        """
        if self._lock is None:
            _together(self._claim)
            self._lock = self._lock or True

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open(self.folder / ".lock", "a")  # noqa: SIM115 - held while the run lives; the kernel frees it if killed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StateError(f"{self.folder}: another run writes here: end it, or give another folder") from None
        except OSError:  # a file system without locks
            log.warning("%s cannot be locked: make sure that no other run writes there", self.folder)
        self._lock = lock
        for partial in sorted(self.folder.glob(f"step_*{PARTIAL}")):
            log.warning("removing %s, which was not finished", partial)
            shutil.rmtree(partial)

    def save(self, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
        """Begin to save; return as soon as the arrays may change. Waits for the save before to end.

        Args:
            step: of the state; if that step is there already, written or verified by this run, nothing is done.
            tree: pytree of arrays (jax, PRNG keys among them, or numpy).
            meta: JSON object that `restore` returns; that of the first process is stored.

        Raises:
            StateError: the last `max_failures` saves failed, or another run writes here.
        """
        import orbax.checkpoint as ocp  # 1.3 s to import

        self.claim()
        self.join()
        if self._failures_in_a_row >= self.max_failures:
            problem, self._problem = self._problem, None
            raise StateError(f"{self._failures_in_a_row} saves in a row failed, the last: {problem}")
        if step in self._verified and (self.folder / _name(step)).is_dir():
            return
        flat = leaves.flat(tree)
        arrays = {path: leaves.stored(leaf) for path, leaf in flat.items()}
        record = {
            "format": FORMAT,
            "step": step,
            "leaves": {path: leaves.described(leaf) for path, leaf in flat.items()},
            "meta": meta,
        }
        partial = self.folder / f"{_name(step)}{PARTIAL}"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / STEP).write_text(json.dumps(record, indent=1) + "\n")

        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._pending, self._failure = True, None
        try:
            _together(begin)
            chunks = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in arrays}
            self._checkpointer.save(partial / ARRAYS, args=ocp.args.PyTreeSave(arrays, save_args=chunks))
        except Exception as error:  # a full disk, or whatever else TensorStore meets
            self._fail(step, error)
        else:
            self._commit = threading.Thread(target=self._finish, args=(step,), name="qwen3_jax commit")
            self._commit.start()

    def _finish(self, step: int) -> None:
        partial, final = self.folder / f"{_name(step)}{PARTIAL}", self.folder / _name(step)
        try:
            self._checkpointer.wait_until_finished()
            if distributed.is_main():
                digests.write(partial)
                _discard(final)  # a damaged one of the same step
                os.rename(partial, final)
                digests.sync(self.folder)
                for old in self._steps()[self.keep :]:
                    _discard(self.folder / _name(old))
            self._verified.add(step)
        except Exception as error:
            self._fail(step, error)

    def _fail(self, step: int, error: Exception) -> None:
        self._failure = f"{self.folder / _name(step)} was not saved: {_reason(error)}"
        log.error("%s", self._failure)
        if distributed.is_main():
            shutil.rmtree(self.folder / f"{_name(step)}{PARTIAL}", ignore_errors=True)

    def join(self) -> None:
        """Wait until the save under way is committed or has failed; it counts as in `save`."""
        if not self._pending:
            return
        if self._commit is not None:
            self._commit.join()
        self._pending, self._commit = False, None
        self._problem = next((failure for failure in gather(self._failure) if failure), None)
        self.failures += self._problem is not None
        self._failures_in_a_row = 0 if self._problem is None else self._failures_in_a_row + 1

    def wait(self) -> None:
        """Wait until the last save is committed.

        Raises:
            StateError: it failed; said once.
        """
        self.join()
        problem, self._problem = self._problem, None
        if problem is not None:
            raise StateError(problem)

    def close(self) -> None:
        """Wait for the last save and give the folder free. Raises StateError if that save failed."""
        try:
            self.wait()
        finally:
            self._release()

    def _release(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
        if hasattr(self._lock, "close"):
            self._lock.close()
        self._lock = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if self._commit is not None:  # the others may not come to ask how it went: end without them
            self._commit.join()
        self._release()

    # --- reading ------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps that are committed, the newest first; none of them is verified by this."""
        return distributed.share(self._steps() if distributed.is_main() else None)

    def _steps(self) -> list[int]:
        names = (re.fullmatch(r"step_(\d{8,})", path.name) for path in self.folder.glob("step_*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def latest(self, abstract_tree: Any = None) -> int | None:
        """Return the newest step that verifies, or None when there is no checkpoint at all.

        A step that does not verify, or is of another tree than `abstract_tree`, is logged with the reason, kept in
        `skipped`, and passed over.

        Raises:
            StateError: there are checkpoints and none can be used: a run never starts anew on top of them.
        """
        self.skipped = {}
        for step in self.steps():
            try:
                self._require(step, abstract_tree)
                return step
            except StateError as error:
                self.skipped[step] = str(error)
                log.error("checkpoint skipped: %s", error)
        if self.skipped:
            raise StateError("no checkpoint can be used: " + "; ".join(self.skipped.values()))
        return None

    def verify(self, step: int) -> list[str]:
        """Hash every file of a checkpoint, divided over the processes; return what is wrong, naming files."""
        mine = digests.problems(self.folder / _name(step), index=jax.process_index(), count=jax.process_count())
        return sorted({problem for problems in gather(mine) for problem in problems})

    def restore(self, step: int, abstract_tree: Any) -> tuple[Any, dict[str, Any]]:
        """Read a verified state onto any mesh.

        Args:
            step: of `latest`.
            abstract_tree: shape, dtype and, on a mesh, sharding of every leaf (`jax.ShapeDtypeStruct` or arrays). A
                leaf without a sharding comes to the default device.

        Returns:
            The tree, and `meta` as it was saved.

        Raises:
            StateError: the step does not verify, or is of another tree.
        """
        import orbax.checkpoint as ocp

        record = self._require(step, abstract_tree)
        wanted = leaves.flat(abstract_tree)
        shapes = {path: leaves.stored_shape(leaf) for path, leaf in wanted.items()}
        arguments = {
            path: ocp.RestoreArgs(restore_type=np.ndarray)
            if leaf.sharding is None
            else ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for path, leaf in shapes.items()
        }
        folder = self.folder / _name(step)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restore = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments)
                found = checkpointer.restore(folder / ARRAYS, args=restore)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise StateError(f"{folder}: cannot be read: {_reason(error)}") from error
        values = [leaves.as_asked(found[path], leaf) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_tree), values), record["meta"]

    def _require(self, step: int, abstract_tree: Any) -> dict[str, Any]:
        """Return a step's record after it has been verified and compared with the tree. Raises StateError."""
        folder = self.folder / _name(step)
        main = distributed.is_main()
        if step not in distributed.share(sorted(self._verified) if main else None):
            if problems := self.verify(step):
                more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
                raise StateError(f"{folder}: {'; '.join(problems[:3])}{more}")
            self._verified.add(step)
        try:
            record = distributed.share(json.loads((folder / STEP).read_bytes()) if main else None)
            same = record["format"] == FORMAT and record["step"] == step
        except (OSError, ValueError, KeyError) as error:
            raise StateError(f"{folder / STEP}: {error}") from None
        if not same:
            raise StateError(f"{folder / STEP}: is of {record['format']!r} step {record['step']}, expected {FORMAT!r}")
        if abstract_tree is not None and (differences := leaves.differences(record["leaves"], abstract_tree)):
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise StateError(f"{folder}: not the state of this run: {'; '.join(differences[:3])}{more}")
        return record


def gather(value: Any) -> list[Any]:
    """Return every process's value (JSON) on all of them, in their order; all call this together."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _together(write: Any) -> None:
    """Run on the first process, the others wait; its failure is everybody's."""
    try:
        distributed.once(write)
    except distributed.ClusterError as error:
        raise StateError(str(error)) from None


def _reason(error: Exception) -> str:
    """Return what went wrong in a line; TensorStore names the cause last, after paths."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} … {text[-160:]}"


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that half of it is never taken for one."""
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        shutil.rmtree(old)
