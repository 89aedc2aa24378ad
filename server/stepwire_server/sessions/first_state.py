"""The first values of a session's arrays, and the ids of its tables before there are rows."""

from __future__ import annotations

from typing import Final

import numpy as np

from stepwire.optimizers import Adagrad
from stepwire_server.engines.protocol import PARAM, EngineState
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import AVERAGE
from stepwire_server.rules.first_values import uniform
from stepwire_server.steps.reply import split_range
from stepwire_server.steps.row_ids import RowIds

__all__ = ["first_ids", "initialize"]

_WRITE_ELEMENTS: Final = 1 << 20


def initialize(config: SessionConfig, arrays: EngineState) -> None:
    """Give slots their first values where these are not zeros."""
    if isinstance(config.optimizer, Adagrad) and config.optimizer.initial_accumulator_value and config.rule_slots:
        first = config.optimizer.initial_accumulator_value
        values = np.full(min(_WRITE_ELEMENTS, config.layout.size), first, np.float32)
        for tensor in config.layout.tensors:
            for low, high in split_range(tensor.offset, tensor.end, _WRITE_ELEMENTS):
                arrays.write("sum", low, values[: high - low])
    for table in config.layout.tables.values():
        if table.spec.uniform_bound and not table.spec.hashed:
            for low, high in split_range(table.offset, table.end, _WRITE_ELEMENTS):
                numbers = uniform(low - table.offset, high - low, table.spec.uniform_bound, table.spec.seed)
                for slot in (PARAM, AVERAGE) if AVERAGE in config.slots else (PARAM,):
                    arrays.write(slot, low, numbers)


def first_ids(config: SessionConfig) -> dict[int, RowIds]:
    """Return the ids of the rows of each table whose rows are named by ids, by index: there are no rows yet."""
    first = config.optimizer.structure().initial_accumulator_value
    return {index: RowIds(config.layout.tensors[index], first) for index in config.hashed_tables}
