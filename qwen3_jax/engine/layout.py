"""What a decode call is told of its rows, as numpy arrays: whose turn it is, which pages they got, what is known.

The tables themselves lie on the device: a row brings its own when it joins, and a call is told which pages were added.
Arrays that were given out are never written again: one that would say something else is made anew, and one that would
say the same is given out once more, so that what did not change need not be sent.
"""

import numpy as np


class Layout:
    """The rows of one engine."""

    def __init__(self, *, rows: int, columns: int, scratch: int, growth: int, decode_tokens: int):
        """Begin with empty rows.

        Args:
            columns: of a row's table, which names the `scratch` page where there is none.
            growth: most pages that one decode call adds to a row.
        """
        self._columns, self._scratch = columns, scratch
        self._filled = [0] * rows  # pages of each row that the device's table names
        self._new: list[tuple[int, int, list[int]]] = []
        self._active, self._active_rows = np.zeros(rows, np.bool_), []
        self._no_growth = np.full((rows, growth, 2), -1, np.int32)
        self._nothing = np.full((decode_tokens, rows), -1, np.int32)

    def table(self, pages: list[int]) -> np.ndarray:
        """Return a table that names these pages, [columns] int32."""
        table = np.full(self._columns, self._scratch, np.int32)
        table[: len(pages)] = pages
        return table

    def join(self, row: int, pages: list[int]) -> None:
        """Let a row begin with the table of these pages."""
        self._filled[row] = len(pages)

    def grow(self, row: int, pages: list[int]) -> None:
        """Hear of a row's pages at its next decode call; they have only become more."""
        have = self._filled[row]
        if len(pages) > have:
            self._new.append((row, have, pages[have:]))
            self._filled[row] = len(pages)

    def growth(self) -> np.ndarray:
        """Return what the rows have got since the last call, [rows, growth, 2] int32: column and page, or -1 and -1."""
        if not self._new:
            return self._no_growth
        growth = self._no_growth.copy()
        for row, column, pages in self._new:
            for i, page in enumerate(pages):
                growth[row, i] = column + i, page
        self._new = []
        return growth

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
