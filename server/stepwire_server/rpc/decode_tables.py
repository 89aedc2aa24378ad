"""Tables in the contract's messages: their form, the options that they exclude, and the rows that a step announces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from stepwire.errors import InvalidRequestError, Reason, UnsupportedFeatureError
from stepwire.optimizers import LARGEST_NUMBER, Hyperparameters
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, step_pb2, tensor_pb2
from stepwire.wire.messages import SEMANTICS
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import Precision, RowSemantics, row_obstacle

__all__ = [
    "MOST_ROW_BYTES",
    "check_load",
    "check_table",
    "check_table_groups",
    "check_tables",
    "check_whole",
    "decode_id_tables",
    "decode_load_tables",
    "decode_rows",
    "decode_table_entries",
]

MOST_WIDTH: Final = 65_536
MOST_ROW_BYTES: Final = 4 * MOST_WIDTH
"""The bytes of the widest row in float32, which one message holds whatever the limit of others is."""

_MOST_ROWS: Final = 1 << 40
_MOST_IDS: Final = 1 << 30


def check_table(message: tensor_pb2.TensorSpec, field: str) -> None:
    """Check the form of a table.

    Raises:
        InvalidRequestError: its shape is wrong, or it has no semantics.
        UnsupportedFeatureError: the server does not know its semantics.
    """
    if not message.table.semantics:
        raise InvalidRequestError.of(f"{field}.table.semantics", f"is not set; name one: {', '.join(SEMANTICS)}")
    if message.table.semantics not in SEMANTICS.values():
        problem = f"{message.table.semantics} is unknown to this server, which has {', '.join(SEMANTICS)}"
        raise _unsupported(f"{field}.table.semantics", problem)
    if not 0.0 <= message.table.uniform_bound <= LARGEST_NUMBER:
        problem = f"{message.table.uniform_bound!r}; it must be finite and >= 0"
        raise InvalidRequestError.of(f"{field}.table.uniform_bound", problem)
    if message.table.max_age_steps and not message.table.hashed:
        problem = "rows give way in a table with ids alone; set `hashed`, or leave it out"
        raise InvalidRequestError.of(f"{field}.table.max_age_steps", problem)
    if message.table.hashed and message.table.semantics == SEMANTICS["global"]:
        problem = "'global' steps rows that never came too, and ids have none; use another meaning"
        raise _unsupported(f"{field}.table.hashed", problem)
    if message.table.hashed and message.shape and message.shape[0] > _MOST_IDS:
        problem = f"{message.shape[0]} rows; a table with ids has at most {_MOST_IDS}"
        raise InvalidRequestError.of(f"{field}.shape", problem, reason=Reason.INVALID_TENSOR)
    width = int(np.prod([min(extent, 1 << 20) for extent in message.shape[1:]], dtype=object))
    if not message.shape or not message.shape[0] or not 1 <= width <= MOST_WIDTH:
        raise InvalidRequestError.of(
            f"{field}.shape",
            f"{list(message.shape)}; a table has rows along its first extent, of 1 to {MOST_WIDTH} elements each",
            reason=Reason.INVALID_TENSOR,
        )


def check_tables(config: SessionConfig) -> None:
    """Refuse what a session with tables cannot have.

    Raises:
        UnsupportedFeatureError: names the option.
        InvalidRequestError: a table has first values, and parameters are loaded.
    """
    if not config.tables:
        return
    treatment, rows = config.treatment, [each for each in config.tables.values() if each is not RowSemantics.GLOBAL]
    if config.aggregation is not None and config.aggregation.is_robust:
        raise _unsupported("config.aggregation.reduction", "it is not served in a session with tables; use a mean")
    obstacles = {
        "gradient.accumulation_steps": (treatment.accumulation_steps > 1, "sum the gradients of rows on the client"),
        "gradient.parameter_average_decay": (
            treatment.parameter_average_decay is not None,
            "average the rows that are pulled on the client",
        ),
    }
    for field, (asked, instead) in obstacles.items():
        if asked and rows:
            problem = f"tables of {rows[0].value!r} keep nothing of rows that sleep, and this passes over every row"
            raise _unsupported(f"config.{field}", f"{problem}; use 'global' for all tables, or {instead}")
    for index in config.tables:
        spec = config.layout.tensors[index].spec
        if spec.hashed and not config.start_at_zero:
            problem = "rows by ids begin with first values of their own; ask for INITIALIZATION_ZEROS"
            raise _unsupported("config.tensors.table.hashed", f"table {spec.name!r}: {problem}")
        if spec.held_precision != Precision.FLOAT32.value:
            problem = f"table {spec.name!r} has {spec.state_precision} moments; tables have float32 ones"
            raise _unsupported("config.tensors.state_precision", problem)
        if spec.uniform_bound and not config.start_at_zero:
            problem = f"table {spec.name!r} has first values of its own, and parameters are to be loaded"
            raise InvalidRequestError.of(
                "config.tensors.table.uniform_bound", f"{problem}; ask for INITIALIZATION_ZEROS, or leave it out"
            )
    check_table_groups(config, config.groups, "config.groups")


def check_table_groups(config: SessionConfig, groups: Sequence[Hyperparameters], field: str) -> None:
    """Refuse numbers with which a table cannot be stepped.

    Raises:
        UnsupportedFeatureError: names the group, and the number.
    """
    for index, semantics in config.tables.items():
        spec = config.layout.tensors[index].spec
        hyper = groups[spec.group]
        problem = row_obstacle(config.optimizer, semantics, hyper, config.recipe(hyper).rule)
        if problem is not None:
            raise _unsupported(f"{field}[{spec.group}]", f"table {spec.name!r}, {semantics.value!r}: {problem}")


def decode_table_entries(begin: step_pb2.StepBegin, config: SessionConfig) -> tuple[tuple[int, int], ...]:
    """Return the tables that a step has rows of, with their numbers of rows.

    Raises:
        InvalidRequestError: a tensor is no table, named twice or out of order, or a number is too large.
        UnsupportedFeatureError: the step has an option that tables exclude.
    """
    if config.tables:
        _refuse_beside_tables(begin)
    return _table_entries(begin.tables, config, "begin.tables")


def _table_entries(
    tables: Sequence[tensor_pb2.TableEntries], config: SessionConfig, field: str
) -> tuple[tuple[int, int], ...]:
    entries = tuple((table.tensor, table.entries) for table in tables)
    for place, (index, count) in enumerate(entries):
        if index not in config.tables:
            raise _invalid(f"{field}[{place}].tensor", f"tensor {index} is no table of this session")
        if place and index <= entries[place - 1][0]:
            raise _invalid(f"{field}[{place}].tensor", f"{index} comes after {entries[place - 1][0]}; they rise")
        if count > _MOST_ROWS:
            raise _invalid(f"{field}[{place}].entries", f"{count} rows; a step has at most {_MOST_ROWS}")
    return entries


def check_load(config: SessionConfig, slots: Sequence[str], counts: bool) -> None:
    """Refuse a load of moments, or of t, whose rows have numbers that no load brings.

    Raises:
        UnsupportedFeatureError: a table counts its rows.
    """
    check_whole(config, "open.slots")
    for index, semantics in config.tables.items():
        if semantics.counts_rows and (counts or set(slots) & set(config.rule.slots)):
            name = config.layout.tensors[index].spec.name
            problem = f"moments and t of table {name!r} belong to the numbers of its rows, which no load brings"
            raise _unsupported("open.slots", f"{problem}; load 'param' alone, or use 'torch_sparse' or 'global'")


def decode_load_tables(message: state_pb2.LoadOpen, config: SessionConfig) -> tuple[tuple[int, int], ...]:
    """Return the tables that a load brings rows of, with their numbers of rows.

    Raises:
        InvalidRequestError: a tensor is no table, named twice or out of order, a number is too large, or the load has
            more than rows of parameters.
    """
    entries = _table_entries(message.tables, config, "open.tables")
    more = message.tensor_steps or message.tensor_scalars or message.HasField("loss_scale")
    if entries and not message.by_rows:
        raise InvalidRequestError.of("open.tables", "rows are announced, and `by_rows` is not set; set it")
    if message.by_rows and (list(message.slots) != ["param"] or more):
        raise InvalidRequestError.of("open.slots", "rows replace 'param' alone, and no numbers; name nothing else")
    return entries


def check_whole(config: SessionConfig, field: str) -> None:
    """Refuse a pull or a load of whole slots, in which a row of a table that is named by an id has no name.

    Raises:
        UnsupportedFeatureError: a table has ids.
    """
    for index in config.hashed_tables:
        name = config.layout.tensors[index].spec.name
        raise _unsupported(field, f"rows of table {name!r} are named by ids, and whole slots name none; name the rows")


def decode_rows(message: tensor_pb2.TableRows, config: SessionConfig, field: str) -> HostArray:
    """Return the rows that a message names, `(n,) int64`.

    Raises:
        InvalidRequestError: the tensor is no table, or a row is out of range.
    """
    if message.tensor not in config.tables:
        raise _invalid(f"{field}.tensor", f"tensor {message.tensor} is no table of this session")
    rows, spec = np.array(message.rows, np.uint64), config.layout.tensors[message.tensor].spec
    if rows.size and int(rows.max()) >= spec.named_rows:
        raise _invalid(f"{field}.rows", f"row {int(rows.max())} is not below {spec.named_rows}, those of {spec.name!r}")
    return rows.astype(np.int64)


def decode_id_tables(request: pb.PullRequest, config: SessionConfig) -> tuple[int, ...]:
    """Return the tables whose ids a pull asks for; none in most pulls.

    Raises:
        InvalidRequestError: a tensor has no ids, or the pull asks for more.
    """
    for place, index in enumerate(request.row_ids):
        if index not in config.hashed_tables:
            raise _invalid(f"row_ids[{place}]", f"tensor {index} is no table of this session whose rows have ids")
    if request.row_ids and (request.rows or request.slots):
        raise InvalidRequestError.of("row_ids", "ids come alone; ask for rows and slots in another pull")
    return tuple(dict.fromkeys(request.row_ids))


def _refuse_beside_tables(begin: step_pb2.StepBegin) -> None:
    obstacles = {
        "overlap": begin.overlap,
        "in_shared_memory": begin.in_shared_memory,
        "reply.mode": begin.reply.mode == step_pb2.REPLY_MODE_CHANGED,
        "reply.first": bool(begin.reply.first),
    }
    for field, asked in obstacles.items():
        if asked:
            raise _unsupported(f"begin.{field}", "it is not served in a session with tables; leave it out")


def _unsupported(field: str, problem: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(f"{field}: {problem}", metadata={"field": field, "feature": "sparse_rows"})


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_TENSOR)
