"""Batches of packed rows, made ahead in a thread, from a place that a few numbers describe.

Each row of the global batch has a lane of its own (see `stream`), and a process fills the rows that it holds: the union
over processes is what one process would make, whatever their number, also after a resume with another number. A state
is a JSON object of about 10 numbers per row, plus two for every example that waits for a row.

Why not grain: its first-fit packer closes all open rows together when an example fits none, and its iterator state
belongs to one shard of a fixed number of shards, so another number of processes cannot go on from it; here both come
from the lanes, and a bad record keeps its place in the order.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from qwen3_jax.text.template import ChatTemplate
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.train.data.config import DataConfig, DataError
from qwen3_jax.train.data.examples import Encoder
from qwen3_jax.train.data.records import BadRecord
from qwen3_jax.train.data.stream import Lane, Plan, Ticket

FORMAT = "qwen3_jax data 1"
MAX_NAMED = 20  # bad records that are logged one by one

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Rows for one step.

    arrays: tokens, positions, segment_ids, targets [B, T] int32 and weights [B, T] float32. Segments count from 1 in
        each row, 0 is padding; positions count from 0 in each segment; position t learns targets[t] where weights[t].
    ids: of the examples in each row, "source:record@epoch", and "/piece" when a record was split.
    """

    arrays: dict[str, np.ndarray]
    ids: tuple[tuple[str, ...], ...]


class Loader:
    """Iterate over batches; `state()` is where the batch that was handed out last leaves off."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        *,
        batch: int,
        length: int,
        process: int = 0,
        processes: int = 1,
        seed: int,
        vocab_size: int | None = None,
        anyone: Callable[[bool], bool] | None = None,
    ):
        """Open and index the files.

        Args:
            config: of the run.
            tokenizer: of the model folder; None if all data is `{"tokens"}`.
            template: None if there are no `{"messages"}`.
            batch: rows of the global batch.
            length: positions of a row.
            process: which of the `processes` equal blocks of rows this process makes.
            processes: must divide `batch`.
            seed: of the order.
            vocab_size: that `{"tokens"}` must stay below; None means the tokenizer's.
            anyone: tells all processes whether one of them says True; several processes that read a number of epochs
                call it at every batch, so that they end together (until then, who has no rows left makes empty ones).

        Raises:
            DataError: naming the key or file.
        """
        if batch < 1 or length < 1 or batch % processes or not 0 <= process < processes:
            raise DataError(
                f"batch {batch} × length {length}, process {process} of {processes}: "
                "give a batch that the number of processes divides"
            )
        if processes > 1 and config.epochs is not None and anyone is None:
            raise DataError(f"data.epochs {config.epochs} in {processes} processes: they need `anyone` to end together")
        if vocab_size is None:
            if tokenizer is None:
                raise DataError("neither a tokenizer nor vocab_size is given: one of them bounds the token ids")
            vocab_size = tokenizer.vocab_size
        self.config, self.batch, self.length = config, batch, length
        self._anyone = anyone if config.epochs is not None else None
        self.bad_records: deque[tuple[str, str]] = deque(maxlen=1000)  # id and reason of the last ones
        self._plan = Plan(config, Encoder(tokenizer, template, vocab_size), lanes=batch, length=length, seed=seed)
        self._recipe = _recipe(config, self._plan, seed)
        self._pad_id = 0 if tokenizer is None or tokenizer.pad_id is None else tokenizer.pad_id
        rows = batch // processes
        self._lanes = [Lane(self._plan, i, self._bad) for i in range(process * rows, (process + 1) * rows)]
        self._named = 0
        self._batches = 0
        self._state = self._snapshot()
        self._ahead: _Ahead | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch. Raises StopIteration after the last epoch, DataError for unusable data."""
        if self._ahead is None:
            self._ahead = _Ahead(self._made, self.config.prefetch)
        batch, state = next(self._ahead)
        more = any(batch.ids)
        if not (more if self._anyone is None else self._anyone(more)):
            raise StopIteration
        self._state = state
        return batch

    def state(self) -> dict[str, Any]:
        """Return where this process's rows are, as a JSON object; `merge` joins those of several processes."""
        lanes, batches = self._state
        return {"format": FORMAT, "recipe": self._recipe, "batches": batches, "lanes": lanes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of this data, made by any number of processes and merged.

        Raises:
            DataError: naming what differs: the seed, the sources, their sizes, the batch, the length, or the packing.
        """
        self.close()
        if state.get("format") != FORMAT:
            raise DataError(f"the data state has format {state.get('format')!r}, this library reads {FORMAT!r}")
        for key, mine in self._recipe.items():
            saved = state["recipe"].get(key)
            if saved != mine:
                raise DataError(f"the data state is of {key} {saved}, this run has {mine}: go on with the same data")
        for lane in self._lanes:
            if str(lane.index) not in state["lanes"]:
                raise DataError(f"the data state lacks row {lane.index} of {self.batch}: merge those of all processes")
            lane.restore(state["lanes"][str(lane.index)])
        self._batches = state["batches"]
        self._state = self._snapshot()

    @property
    def batches(self) -> int:
        """Batches handed out since the start of the run."""
        return self._state[1]

    @property
    def skipped(self) -> Counter[str]:
        """How many records were bad, by reason, up to the last batch handed out, in this process's rows."""
        return sum((Counter(lane[3]) for lane in self._state[0].values()), Counter())

    def close(self) -> None:
        """End the thread; the next batch starts another one."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _snapshot(self) -> tuple[dict[str, list], int]:
        return {str(lane.index): lane.state() for lane in self._lanes}, self._batches

    def _made(self) -> Generator[tuple[Batch, tuple[dict[str, list], int]]]:
        with ThreadPoolExecutor(self.config.threads, "qwen3_jax rows") as pool:
            while True:
                rows = list(pool.map(Lane.row, self._lanes))
                self._batches += 1
                yield _batch(rows, self.length, self._pad_id), self._snapshot()

    def _bad(self, id_: str, error: BadRecord) -> None:
        self.bad_records.append((id_, str(error)))
        self._named += 1
        if self._named <= MAX_NAMED:
            more = "; further ones are only counted" if self._named == MAX_NAMED else ""
            log.warning("skipped %s: %s%s", id_, error, more)


class _Ahead:
    """An iterator that a thread runs ahead of; an exception comes out where it was raised."""

    def __init__(self, make: Callable[[], Generator[Any]], depth: int):
        self._items = make()
        self._queue: queue.Queue[tuple[Any, BaseException | None]] | None = None
        self._stopping = threading.Event()
        if depth:
            self._queue = queue.Queue(depth)
            self._thread = threading.Thread(target=self._run, name="qwen3_jax data", daemon=True)
            self._thread.start()
        self._ended: BaseException | None = None

    def _run(self) -> None:
        try:
            for item in self._items:
                self._put((item, None))
                if self._stopping.is_set():
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))
        finally:
            self._items.close()

    def _put(self, item: tuple[Any, BaseException | None]) -> None:
        assert self._queue is not None
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def __next__(self) -> Any:
        if self._queue is None:
            return next(self._items)
        if self._ended is not None:
            raise self._ended
        item, error = self._queue.get()
        if error is not None:
            self._ended = error
            raise error
        return item

    def close(self) -> None:
        self._stopping.set()
        if self._queue is not None:
            self._thread.join()
        else:
            self._items.close()


def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the states of all processes after the same batch into one.

    Raises:
        DataError: they are not of the same run and batch.
    """
    first = dict(states[0])
    lanes: dict[str, list] = {}
    for state in states:
        if any(state[key] != first[key] for key in ("format", "recipe", "batches")):
            raise DataError("the data states of the processes are not of the same run and batch")
        lanes |= state["lanes"]
    return first | {"lanes": {key: lanes[key] for key in sorted(lanes, key=int)}}


def _recipe(config: DataConfig, plan: Plan, seed: int) -> dict[str, Any]:
    """Return what decides which example comes when, as JSON."""
    sources = [
        {"name": source.name, "weight": source.weight, "long": source.long, "turns": source.turns}
        | {"records": len(records), "bytes": records.size_bytes}
        for source, records in zip(config.sources, plan.sources, strict=True)
    ]
    return {
        "seed": seed,
        "batch": plan.lanes,
        "length": plan.length,
        "shuffle": config.shuffle,
        "epochs": config.epochs,
        "lookahead": config.lookahead,
        "max_record_bytes": config.max_record_bytes,
        "sources": sources,
    }


def _batch(rows: list[list[Ticket]], length: int, pad_id: int) -> Batch:
    shape = (len(rows), length)
    arrays: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "targets")
    }
    arrays["weights"] = np.zeros(shape, np.float32)
    arrays["tokens"][:] = arrays["targets"][:] = pad_id
    for r, row in enumerate(rows):
        at = 0
        for segment, ticket in enumerate(row, start=1):
            inputs, targets, weights = ticket.example
            span = slice(at, at + len(inputs))
            arrays["tokens"][r, span], arrays["targets"][r, span] = inputs, targets
            arrays["weights"][r, span] = weights
            arrays["positions"][r, span] = np.arange(len(inputs))
            arrays["segment_ids"][r, span] = segment
            at += len(inputs)
    return Batch(arrays, tuple(tuple(ticket.id for ticket in row) for row in rows))
