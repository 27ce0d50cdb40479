"""The arrays of decode calls: true at every moment, never written once they are out, and the same while they say so."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.engine.layout import Layout

ROWS, COLUMNS, SCRATCH, TOKENS = 3, 6, 99, 4


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.sampled_from(["empty", "grow", "look"])), max_size=30))
@settings(max_examples=100, deadline=None)
def test_tables_say_what_the_rows_hold(actions):
    layout = Layout(rows=ROWS, columns=COLUMNS, scratch=SCRATCH, decode_tokens=TOKENS)
    pages: list[list[int]] = [[] for _ in range(ROWS)]
    given_out: list[tuple[np.ndarray, np.ndarray]] = []
    changed = True
    for row, action in actions:
        if action == "empty":
            pages[row] = []
            layout.empty(row)
            changed = True
        elif action == "grow" and len(pages[row]) < COLUMNS:
            pages[row] = [*pages[row], 10 * row + len(pages[row])]
            changed = True
        for each in range(ROWS):
            layout.fill(each, pages[each])
        tables = layout.tables
        expected = np.array([(held + [SCRATCH] * COLUMNS)[:COLUMNS] for held in pages], np.int32)
        np.testing.assert_array_equal(tables, expected)
        np.testing.assert_array_equal(layout.table(row), expected[row])
        np.testing.assert_array_equal(layout.table_of(pages[row]), expected[row])
        assert (tables is given_out[-1][0] if given_out else False) == (not changed)
        given_out.append((tables, tables.copy()))
        changed = False
        for array, said in given_out:
            np.testing.assert_array_equal(array, said)


def test_who_is_active_and_what_is_known():
    layout = Layout(rows=ROWS, columns=COLUMNS, scratch=SCRATCH, decode_tokens=TOKENS)
    first = layout.active([0, 2])
    assert first.tolist() == [True, False, True]
    assert layout.active([0, 2]) is first
    assert layout.active([1]).tolist() == [False, True, False]
    assert first.tolist() == [True, False, True]
    nothing = layout.known({})
    assert (nothing == -1).all()
    assert nothing.shape == (TOKENS, ROWS)
    known = layout.known({1: (7, 8)})
    assert known.T.tolist() == [[-1] * 4, [7, 8, -1, -1], [-1] * 4]
    assert layout.known({}) is nothing
    assert (nothing == -1).all()
