"""One update of the tables that a step moves: the numbers of each row, and its way through the state.

`rules.rows` has the meanings. A table of the meaning `global` is stepped as a dense tensor, some rows at a time, with
zeros for the rows that did not come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from stepwire.optimizers import Hyperparameters
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray, Pass, Pending, RowPass
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import RowSemantics, faded_slots, row_wise_step_sizes, row_wise_sums
from stepwire_server.steps.dense_rows import dense_ranges
from stepwire_server.steps.reply import ReplyPipeline
from stepwire_server.steps.row_gradients import NamedRows, RowGradients, TableGradient
from stepwire_server.steps.step import SteppedState
from stepwire_server.steps.tensor_steps import CountedSegment

__all__ = ["RowUpdate", "reply_rows", "row_updates"]

_DENSE_ELEMENTS: Final = 1 << 20
_TURN_ELEMENTS: Final = 16 << 20
_LARGEST_NUMBER: Final = 2**32 - 1


class RowUpdate(NamedTuple):
    """The update of one table.

    Attributes:
        gradient: the rows that came.
        step: the arithmetic of the rows that came; for `global` of every row.
        numbers: the numbers of the rows that came after the update, `(n,) uint32`, or float32 for sums; None where none
            are kept.
    """

    gradient: TableGradient
    step: RowPass | Pass
    numbers: HostArray | None

    def apply(
        self, state: SteppedState, request: StepRequest, reply: ReplyPipeline
    ) -> list[Pending[tuple[float, ...]]]:
        """Step the table, and reply with the rows that came; return the sums of its passes."""
        if isinstance(self.step, Pass):
            sums = list(_step_densely(self.gradient, self.step, state))
            reply_rows(state.arrays, request, [NamedRows(self.gradient.table, self.gradient.rows)], reply)
            return sums
        tensor, _, table, rows, _, gradient = self.gradient
        state.before_rows(table, rows)
        sums = []
        for low, high in _parts(request, len(rows), table.width):
            now, out = rows[low:high], None
            if request.replies_rows:
                out = reply.writer.rows(table.start, now, table.width)
            part = self.step.part(low, high)
            sums.append(state.arrays.update_rows(part, table, now, gradient, low, out))
            if out is not None:
                reply.add([sums[-1]])
        if self.numbers is not None:
            state.note_numbers(tensor, rows, self.numbers)
        return sums


class _Counts(NamedTuple):
    """The rows of a table that came, its t, and the numbers of the rows before and after the update."""

    rows: int
    t: int
    before: HostArray | None
    after: HostArray | None


def row_updates(
    state: SteppedState,
    groups: Sequence[Hyperparameters],
    segments: Mapping[int, CountedSegment],
    tables: RowGradients,
    dense: Mapping[int, Pass],
    scalars: Callable[[int], list[float]],
) -> list[RowUpdate]:
    """Return the updates of the tables that a step moves; nothing is changed.

    Args:
        state: the session's state.
        groups: the numbers of each group in this step.
        segments: by its start, each segment of the step; a table is one.
        tables: the rows that came.
        dense: by its start, the arithmetic of each segment in the dense step.
        scalars: returns the scalars of a group's treatment, those before the rule's.
    """
    updates = []
    for gradient in tables.tables():
        semantics, segment = state.config.tables[gradient.tensor], segments[gradient.table.start]
        if semantics is RowSemantics.GLOBAL:
            updates.append(RowUpdate(gradient, dense[gradient.table.start], None))
            continue
        numbers = state.numbers_of(gradient.tensor, gradient.rows) if semantics.counts_rows else None
        before, hyper = scalars(gradient.group), groups[gradient.group]
        if semantics is RowSemantics.ROW_WISE and numbers is not None:
            updates.append(_row_wise(state.config, hyper, gradient, segment.t, before, numbers))
            continue
        after = _numbers_after(semantics, segment.t, numbers)
        step = _row_pass(state.config, hyper, semantics, before, _Counts(len(gradient.rows), segment.t, numbers, after))
        updates.append(RowUpdate(gradient, step, after))
    return updates


def reply_rows(arrays: EngineState, request: StepRequest, named: Sequence[NamedRows], reply: ReplyPipeline) -> None:
    """Reply with the rows that a step names as they are, if it wants any."""
    for table, rows in named if request.replies_rows else ():
        for low, high in _parts(request, len(rows), table.width):
            out = reply.writer.rows(table.start, rows[low:high], table.width)
            reply.add([arrays.read_rows(PARAM, table, rows[low:high], out)])


def _numbers_after(semantics: RowSemantics, t: int, numbers: HostArray | None) -> HostArray | None:
    """Return the numbers of rows after the update: t_r of each, or t of the table for each."""
    if numbers is None:
        return None
    if semantics is RowSemantics.SKIPPED:
        return np.full_like(numbers, min(t, _LARGEST_NUMBER))
    return np.minimum(numbers, np.uint32(_LARGEST_NUMBER - 1)) + np.uint32(1)


def _row_pass(
    config: SessionConfig,
    hyper: Hyperparameters,
    semantics: RowSemantics,
    before: list[float],
    counts: _Counts,
) -> RowPass:
    """Return the arithmetic of rows: those of one number are of one kind.

    Args:
        config: the session's config.
        hyper: the numbers of the group.
        semantics: the meaning of the step.
        before: the scalars before the rule's and before what sleep has left.
        counts: the numbers of the rows.
    """
    rows, t, numbers, after = counts
    recipe = config.row_recipe(hyper, semantics)
    rule = recipe.rule
    weights = [float(getattr(hyper, name) or 0.0) for name in faded_slots(semantics, rule).values()]
    if semantics is RowSemantics.ROW_COUNTER and after is not None:
        found, kinds = np.unique(after, return_inverse=True)
        lines = [[*before, *rule.scalars(hyper, int(own))] for own in found.tolist()]
    elif numbers is not None:
        found, kinds = np.unique(t - 1 - numbers.astype(np.int64), return_inverse=True)
        own = rule.scalars(hyper, t)
        lines = [[*before, *(weight**slept for weight in weights), *own] for slept in found.tolist()]
    else:
        kinds, lines = np.zeros(rows, np.int32), [[*before, *rule.scalars(hyper, t)]]
    scalars = np.array(lines, np.float32).reshape(-1, len(recipe.scalars))
    return RowPass(recipe, scalars, kinds.astype(np.int32))


def _row_wise(
    config: SessionConfig,
    hyper: Hyperparameters,
    gradient: TableGradient,
    t: int,
    before: list[float],
    sums: HostArray,
) -> RowUpdate:
    """Return the update of a table with one sum a row: each row has a line of scalars, which ends with its step size.

    The squares are those of the gradient that the rule gets: unscaled, clipped and limited, as a kernel computes it.
    """
    recipe, width = config.row_recipe(hyper, RowSemantics.ROW_WISE), gradient.table.width
    values, after = gradient.values.reshape(-1, width), np.empty_like(sums)
    numbers = dict(zip(recipe.scalars, np.array(before, np.float32), strict=False))
    most = max(_DENSE_ELEMENTS // width, 1)
    with np.errstate(all="ignore"):
        for low in range(0, len(sums), most):
            part = slice(low, low + most)
            treated = recipe.evaluate(recipe.treatment, {"g": values[part], **numbers})["g"]
            after[part] = row_wise_sums(sums[part], treated)
        scalars = np.empty((len(sums), len(recipe.scalars)), np.float32)
        scalars[:, :-1] = before
        scalars[:, -1] = row_wise_step_sizes(hyper, t, after)
    return RowUpdate(gradient, RowPass(recipe, scalars, np.arange(len(sums), dtype=np.int32), own=True), after)


def _step_densely(gradient: TableGradient, step: Pass, state: SteppedState) -> Iterator[Pending[Any]]:
    """Step every row of a table, some at a time."""
    for found in dense_ranges(gradient, state.arrays):
        start, size = found.start, found.end - found.begin
        state.before_change(start, start + size)
        yield state.arrays.update(step, start, found.chunk.gradient, 0, size, None)


def _parts(request: StepRequest, rows: int, width: int) -> list[tuple[int, int]]:
    """Cut rows into those of one message each, or where none go back into those of one turn of the engine."""
    elements = request.reply_elements if request.replies_rows else _TURN_ELEMENTS
    most = max(elements // (width + _INDEX_ELEMENTS), 1)
    return [(low, min(low + most, rows)) for low in range(0, rows, most)]


_INDEX_ELEMENTS: Final = 4
"""The room of a row's index in a message, in elements."""
