"""What a run trains on: the `[data]` section of a run's TOML file.

[data]
shuffle = true
epochs = 2                     # leave out to go on for ever

[[data.sources]]
name = "chats"
path = "data/chats-*.jsonl"    # .jsonl, .txt (a line is a document), .parquet
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


class DataError(ValueError):
    """Training data that cannot be used: one line, naming the key or the file and the remedy."""


@dataclass(frozen=True)
class Source:
    """Files that are drawn from as one; their records are `{"text"}`, `{"messages"[, "tools"]}` or `{"tokens"}`."""

    name: str  # stands in the id of every example
    path: str | tuple[str, ...]  # files or patterns
    weight: float | None = None  # share of the examples; all sources have one or none (then: by number of records)
    long: Literal["skip", "split", "truncate"] | None = None  # longer than a row; None: split texts, skip chats
    turns: Literal["all", "last"] = "all"  # the assistant's turns that are learned


@dataclass(frozen=True)
class DataConfig:
    """The sources and how they are mixed, packed and read."""

    sources: tuple[Source, ...]
    shuffle: bool = True  # another order in every epoch, decided by the seed
    epochs: int | None = None  # passes over everything, then the data ends; None: no end
    lookahead: int = 32  # examples among which a row finds what fits it
    bad_records: Literal["skip", "stop"] = "skip"  # skipped records are counted and named
    max_record_bytes: int = 64 << 20  # a longer line is a bad record
    prefetch: int = 2  # batches made ahead in a thread; 0: none
    threads: int = 2  # rows packed at the same time

    def check(self) -> None:
        """Raise DataError for values that make no sense."""
        if not self.sources:
            raise DataError("data.sources is empty: name at least one file")
        names = [source.name for source in self.sources]
        for source in self.sources:
            where = f"data.sources[{source.name!r}]"
            if not source.name or names.count(source.name) > 1:
                raise DataError(f"{where}: give every source a name of its own, have {names}")
            if source.long not in (None, "skip", "split", "truncate"):
                raise DataError(f"{where}.long is {source.long!r}: use skip, split or truncate")
            if source.turns not in ("all", "last"):
                raise DataError(f"{where}.turns is {source.turns!r}: use all or last")
            if source.weight is not None and not (math.isfinite(source.weight) and source.weight > 0):
                raise DataError(f"{where}.weight is {source.weight}: give a number above 0")
        weighted = sum(source.weight is not None for source in self.sources)
        if weighted not in (0, len(names)):
            raise DataError(f"{weighted} of {len(names)} data.sources have a weight: give all of them one, or none")
        if weighted and self.epochs is not None:
            raise DataError(
                f"data.epochs {self.epochs} is passes over everything, weights decide how often each source is seen: "
                "leave out one of them"
            )
        for key, least in {"epochs": 1, "lookahead": 1, "max_record_bytes": 1, "prefetch": 0, "threads": 1}.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise DataError(f"data.{key} is {value}: give at least {least}")
        if self.bad_records not in ("skip", "stop"):
            raise DataError(f"data.bad_records is {self.bad_records!r}: use skip or stop")
