"""The arrays of decode calls: the device's tables follow the rows' pages; nothing that is out is ever written."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.engine.layout import Layout
from qwen3_jax.engine.programs import grown

ROWS, COLUMNS, SCRATCH, GROWTH, TOKENS = 3, 7, 99, 2, 4


def layout_of() -> Layout:
    return Layout(rows=ROWS, columns=COLUMNS, scratch=SCRATCH, growth=GROWTH, decode_tokens=TOKENS)


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, GROWTH), st.booleans()), max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_devices_tables_say_what_the_rows_hold(actions):
    """A row joins with some pages or grows by some; after each call every table is the whole list, then scratch."""
    layout, out = layout_of(), []
    tables, pages = np.full((ROWS, COLUMNS), SCRATCH, np.int32), [[0] * 0 for _ in range(ROWS)]
    for number, (row, count, joins) in enumerate(actions):
        more = [10 * number + i for i in range(count)]
        if joins or len(pages[row]) + count > COLUMNS:
            pages[row] = more
            tables[row] = layout.table(more)
            layout.join(row, more)
        else:
            pages[row] = pages[row] + more
            layout.grow(row, pages[row])
        growth = layout.growth()
        out.append((growth, growth.copy()))
        tables = np.array(grown(jnp.asarray(tables), jnp.asarray(growth)))
        np.testing.assert_array_equal(tables, [(held + [SCRATCH] * COLUMNS)[:COLUMNS] for held in pages])
    for array, said in out:
        np.testing.assert_array_equal(array, said)
    assert layout.growth() is layout.growth()


def test_who_is_active_and_what_is_known():
    layout = layout_of()
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
