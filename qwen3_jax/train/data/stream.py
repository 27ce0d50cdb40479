"""The examples of one lane: the stream that fills one row of every batch.

Row r of every batch is filled by lane r alone. Lane r's draw j comes from the source that the mixture gives it, and is
record `count * lanes + r` of that source's order, so the lanes together pass over every record once an epoch. Nothing
depends on how many processes share the lanes, or on what they hold.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from qwen3_jax.train.data.config import DataConfig, DataError
from qwen3_jax.train.data.examples import Encoder, Example
from qwen3_jax.train.data.order import Mixture, Permutation, key_of
from qwen3_jax.train.data.records import BadRecord, Records


class Ticket(NamedTuple):
    """An example, and by which draw of its lane and which piece of that record it comes again; these two order it."""

    draw: int
    piece: int
    id: str
    example: Example


class Plan:
    """What all lanes of a run share: records, their order, the mixture, the encoder."""

    def __init__(self, config: DataConfig, encoder: Encoder, *, lanes: int, length: int, seed: int):
        config.check()
        self.config, self.encoder, self.lanes, self.length = config, encoder, lanes, length
        self.sources = [
            Records(source.name, source.path, max_bytes=config.max_record_bytes) for source in config.sources
        ]
        weights = [
            len(records) if source.weight is None else source.weight
            for source, records in zip(config.sources, self.sources, strict=True)
        ]
        self.mixture = Mixture(weights, seed)
        self._order = functools.lru_cache(maxsize=4 * len(self.sources))(
            lambda i, epoch: Permutation(len(self.sources[i]), key_of(seed, self.sources[i].name, epoch))
        )

    def place(self, lane: int, draw: int) -> tuple[int, int, int] | None:
        """Return source, epoch and record of a lane's draw; None when the epochs of that source are over."""
        i, count = self.mixture.draw(lane, draw)
        size = len(self.sources[i])
        epoch, at = divmod(count * self.lanes + lane, size)
        if self.config.epochs is not None and epoch >= self.config.epochs:
            return None
        return i, epoch, self._order(i, epoch)[at] if self.config.shuffle else at

    def is_over(self, lane: int, draw: int) -> bool:
        """Say whether a lane has nothing left at this draw or after it."""
        epochs = self.config.epochs
        if epochs is None:
            return False
        return all(
            self.mixture.count(lane, i, draw) * self.lanes + lane >= epochs * len(records)
            for i, records in enumerate(self.sources)
        )

    def examples(self, i: int, record: int) -> list[Example]:
        """Read and encode a record. Raises BadRecord."""
        source = self.config.sources[i]
        return self.encoder.examples(
            self.sources[i].read(record), length=self.length, long=source.long, turns=source.turns
        )


class Lane:
    """Draws examples in order and fills rows with them, first fit."""

    def __init__(self, plan: Plan, index: int, on_bad: Callable[[str, BadRecord], None]):
        self.index = index
        self._plan, self._on_bad = plan, on_bad
        self._draw, self._piece = 0, 0  # of the next example
        self._waiting: list[Ticket] = []
        self._drawn: tuple[int, str, list[Example]] = (-1, "", [])  # the record that was encoded last
        self.skipped: Counter[str] = Counter()

    def row(self) -> list[Ticket]:
        """Return the examples of the next row; none when the lane has come to its end.

        Of `lookahead` examples that wait, or more if they are shorter than a row together, the one that has waited
        longest comes first, then the longest that fits in what is left, and so on; then new ones, first fit, until the
        row is full or `lookahead` wait. Lengths uniform up to the row's fill 97 % of it with 32, 94 % with 16.
        """
        length, lookahead = self._plan.length, self._plan.config.lookahead
        waiting, self._waiting = self._waiting, []
        total = sum(len(ticket.example) for ticket in waiting)
        while (len(waiting) < lookahead or total < length) and (ticket := self._next()) is not None:
            waiting.append(ticket)
            total += len(ticket.example)
        chosen: list[Ticket] = []
        taken, room = set(), length
        longest_first = sorted(range(1, len(waiting)), key=lambda i: -len(waiting[i].example))
        for i in [0, *longest_first][: len(waiting)]:
            if len(waiting[i].example) <= room:
                chosen.append(waiting[i])
                taken.add(i)
                room -= len(waiting[i].example)
        waiting = [ticket for i, ticket in enumerate(waiting) if i not in taken]
        while room and len(waiting) < lookahead and (ticket := self._next()) is not None:
            if len(ticket.example) <= room:
                chosen.append(ticket)
                room -= len(ticket.example)
            else:
                waiting.append(ticket)
        self._waiting = waiting
        return sorted(chosen)  # by draw

    def _next(self) -> Ticket | None:
        """Return the next example, passing over what is bad or over; None at the end."""
        bad_in_a_row = 0
        while True:
            draw = self._draw
            if self._drawn[0] != draw:
                place = self._plan.place(self.index, draw)
                if place is None:
                    if self._plan.is_over(self.index, draw):
                        return None
                    self._draw, self._piece = draw + 1, 0
                    continue
                try:
                    self._drawn = self._read(draw, place)
                except BadRecord as error:
                    name = _id(self._plan, place)
                    if self._plan.config.bad_records == "stop":
                        raise DataError(
                            f"{name}: {error}: repair it, or set data.bad_records to skip to go on without such records"
                        ) from None
                    self.skipped[error.reason] += 1
                    self._on_bad(name, error)
                    bad_in_a_row += 1
                    if bad_in_a_row > sum(map(len, self._plan.sources)):
                        raise DataError(
                            f"{bad_in_a_row} records in a row are bad, the last, {name}, {error}: give usable data"
                        ) from None
                    self._draw, self._piece = draw + 1, 0
                    continue
            _, name, examples = self._drawn
            piece = self._piece
            if piece + 1 < len(examples):
                self._piece += 1
            else:
                self._draw, self._piece = draw + 1, 0
            return Ticket(draw, piece, f"{name}/{piece}" if len(examples) > 1 else name, examples[piece])

    def _read(self, draw: int, place: tuple[int, int, int]) -> tuple[int, str, list[Example]]:
        i, _, record = place
        return draw, _id(self._plan, place), self._plan.examples(i, record)

    def state(self) -> list:
        """Return where the lane is, as JSON: the next draw and piece, those that wait, the counts of bad records."""
        return [self._draw, self._piece, [[t.draw, t.piece] for t in self._waiting], dict(self.skipped)]

    def restore(self, state: list) -> None:
        """Go to where `state` was; what waited is read again. Raises DataError if that cannot be."""
        self._draw, self._piece, waiting, skipped = state
        self._drawn, self.skipped, self._waiting = (-1, "", []), Counter(skipped), []
        for draw, piece in waiting:
            place = self._plan.place(self.index, draw)
            if place is None:
                raise DataError(f"lane {self.index}: draw {draw} of the saved state is beyond the end of the data")
            try:
                if self._drawn[0] != draw:
                    self._drawn = self._read(draw, place)
                _, name, examples = self._drawn
                id_ = f"{name}/{piece}" if len(examples) > 1 else name
                self._waiting.append(Ticket(draw, piece, id_, examples[piece]))
            except (BadRecord, IndexError) as error:
                name = _id(self._plan, place)
                raise DataError(f"{name}: was usable when the state was saved, now {error}: restore the file") from None


def _id(plan: Plan, place: tuple[int, int, int]) -> str:
    i, epoch, record = place
    return f"{plan.sources[i].name}:{record}@{epoch}"
