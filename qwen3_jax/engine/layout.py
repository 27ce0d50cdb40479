"""What a decode call is told of its rows, as numpy arrays: whose turn it is, which pages are theirs, what is known.

Arrays that were given out are never written again: one that would say something else is made anew, and one that would
say the same is given out once more, so that what did not change need not be sent to the device.
"""

import numpy as np


class Layout:
    """The rows of one engine."""

    def __init__(self, *, rows: int, columns: int, scratch: int, decode_tokens: int):
        """Begin with empty rows: a table's columns name the scratch page until a page is there."""
        self._scratch = scratch
        self._tables = np.full((rows, columns), scratch, np.int32)
        self._filled = [0] * rows  # pages of each row that its table names
        self._given: np.ndarray | None = None  # the copy of the tables that is out, while it is true
        self._active, self._active_rows = np.zeros(rows, np.bool_), []
        self._nothing = np.full((decode_tokens, rows), -1, np.int32)

    def empty(self, row: int) -> None:
        """Let a row begin anew."""
        self._tables[row] = self._scratch
        self._filled[row] = 0
        self._given = None

    def fill(self, row: int, pages: list[int]) -> None:
        """Bring a row's table up to date with its pages, which only grow."""
        have = self._filled[row]
        if len(pages) > have:
            self._tables[row, have : len(pages)] = pages[have:]
            self._filled[row] = len(pages)
            self._given = None

    def table(self, row: int) -> np.ndarray:
        """Return the table of one row, [columns]."""
        return self._tables[row].copy()

    def table_of(self, pages: list[int]) -> np.ndarray:
        """Return a table that names these pages, [columns]."""
        table = np.full(self._tables.shape[1], self._scratch, np.int32)
        table[: len(pages)] = pages
        return table

    @property
    def tables(self) -> np.ndarray:
        """The tables of all rows, [rows, columns]."""
        if self._given is None:
            self._given = self._tables.copy()
        return self._given

    def active(self, rows: list[int]) -> np.ndarray:
        """Return which rows decode, [rows] bool."""
        if rows != self._active_rows:
            self._active, self._active_rows = np.zeros_like(self._active), rows
            self._active[rows] = True
        return self._active

    def known(self, replays: dict[int, tuple[int, ...]]) -> np.ndarray:
        """Return what {row: its first tokens} says as [decode_tokens, rows] int32, -1 where a token is to be drawn."""
        if not replays:
            return self._nothing
        known = self._nothing.copy()
        for row, tokens in replays.items():
            known[: len(tokens), row] = tokens
        return known
