"""Steps of rows of a table that engines are tried with: a recipe with everything, and rows of two kinds."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from stepwire.optimizers import Adam
from stepwire_server.engines.protocol import PARAM, Engine, RowPass, Table
from stepwire_server.rules import Precision, Recipe, rule_for
from tests.support import cuda_cases as cases

RECIPE = Recipe(
    rule_for(Adam(), momentum=False)[0],
    limits=True,
    measures=True,
    faded=("exp_avg", "exp_avg_sq"),
)
"""Everything that a recipe of rows may have."""

REPLY = np.dtype(ml_dtypes.bfloat16)
SIZE, START, WIDTH = 3000, 17, 7
TABLE = Table(START, 400, WIDTH)
ROWS = np.array([0, 3, 4, 77, 200, 201, 399], np.int64)


def step() -> RowPass:
    """Return the numbers of a step: two kinds of rows, with other scalars."""
    lines = [
        [-0.5, 0.9, 1.5, fade, fade * fade, *RECIPE.rule.scalars(cases.NUMBERS, t)] for fade, t in ((0.25, 3), (1.0, 9))
    ]
    kinds = np.array([0, 1, 1, 0, 1, 0, 0], np.int32)
    return RowPass(RECIPE, np.array(lines, np.float32), kinds)


def stepped(engine: Engine, *, own: bool = False) -> dict[str, Any]:
    """Step rows with a part of a gradient, once with a reply and once without, and return everything.

    Args:
        engine: the engine.
        own: each row has a line of scalars of its own, with the numbers of its kind.
    """
    arrays = cases.make_arrays(RECIPE, SIZE, odd=False)
    state = engine.allocate(dict.fromkeys((PARAM, *RECIPE.slots), Precision.FLOAT32), SIZE)
    for slot in (PARAM, *RECIPE.slots):
        state.write(slot, 0, arrays[slot])
    buffer = state.receive(10 * WIDTH)
    gradient = buffer.put(0, arrays["gradient"][: 10 * WIDTH])
    out, found = np.zeros(len(ROWS) * WIDTH, REPLY), step()
    if own:
        found = RowPass(RECIPE, found.scalars[found.kinds], np.arange(len(ROWS), dtype=np.int32), own=True)
    first = state.update_rows(found, TABLE, ROWS, gradient, 2, out).wait()
    rest = found.part(3, len(ROWS))
    second = state.update_rows(rest, TABLE, ROWS[3:], gradient, 0, None).wait()
    read = np.zeros(2 * WIDTH, REPLY)
    state.read_rows(PARAM, TABLE, np.array([399, 2], np.int64), read).wait()
    state.settle()
    after = cases.everything_of(state, RECIPE, SIZE)
    buffer.close()
    state.close()
    return {**after, "out": out, "read": read, "sums": np.array([first, second])}


def assert_any_order(engine: Engine) -> None:
    """Step rows in another order, each with its own gradient, and find the same bits."""
    found, arrays, after = step(), cases.make_arrays(RECIPE, SIZE, odd=False), []
    for order in (np.arange(len(ROWS)), np.array([4, 0, 6, 2, 1, 5, 3])):
        state = engine.allocate(dict.fromkeys((PARAM, *RECIPE.slots), Precision.FLOAT32), SIZE)
        for slot in (PARAM, *RECIPE.slots):
            state.write(slot, 0, arrays[slot])
        values = arrays["gradient"][: len(ROWS) * WIDTH].reshape(-1, WIDTH)[order]
        buffer = state.receive(values.size)
        gradient, out = buffer.put(0, np.ascontiguousarray(values).reshape(-1)), np.zeros(len(ROWS) * WIDTH, REPLY)
        state.update_rows(found._replace(kinds=found.kinds[order]), TABLE, ROWS[order], gradient, 0, out).wait()
        state.settle()
        replied = np.empty((len(ROWS), WIDTH), REPLY)
        replied[order] = out.reshape(-1, WIDTH)
        after.append({**cases.everything_of(state, RECIPE, SIZE), "out": replied.reshape(-1)})
        buffer.close()
        state.close()
    assert_same(*after)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two engines: every bit of state and replies, and the sums to six digits."""
    for name, values in one.items():
        if name == "sums":
            np.testing.assert_allclose(values, other[name], rtol=1e-5)
        else:
            cases.assert_same_bits(values.copy(), other[name].copy(), name)
