"""The errors of what one server has and several servers have not, or what only some of them would refuse."""

from __future__ import annotations

from typing import Final

from stepwire.errors import UnsupportedFeatureError
from stepwire.layout import Layout
from stepwire.links.link import Load
from stepwire.sharding.rows import MOST_CAPACITY
from stepwire.v1 import session_pb2

__all__ = ["check_ids", "check_load", "fed_gradients", "shared_arrays"]

_COUNTED: Final = ("row_counter", "skipped", "row_wise")


def check_load(load: Load, layout: Layout) -> None:
    """Refuse a load of moments, or of t, whose rows have numbers that no load brings.

    The shards that have such a table would refuse it, and the others would be left with another load.

    Raises:
        UnsupportedFeatureError: a table counts its rows.
    """
    if load.origin is None and not load.tensor_steps and set(load.sources) <= {"param"}:
        return
    for table in layout.tables.values():
        if table.spec.table in _COUNTED:
            raise UnsupportedFeatureError(
                f"load: moments and t of table {table.spec.name!r} belong to the numbers of its rows, which no load "
                "brings; load the parameters alone, or fork the state instead",
                metadata={"field": "load", "feature": "sparse_rows"},
            )


def shared_arrays() -> UnsupportedFeatureError:
    """Return the error of arrays in shared memory: a tensor that is cut lies in several memories."""
    return UnsupportedFeatureError(
        "a session that is cut has no arrays in shared memory, as a tensor may lie in several; pass arrays of your own "
        "to `step`, which are copied into it",
        metadata={"field": "transport", "feature": "transport_shm"},
    )


def check_ids(config: session_pb2.SessionConfig) -> None:
    """Refuse rows by ids that several servers cannot have.

    Shards agree that all new ids have room before any of them steps. A round whose ids have no room on one server would
    stay open on the others, and asynchronous workers step between the two.

    Raises:
        UnsupportedFeatureError: there are several workers, or a table is too large.
    """
    tables = [tensor for tensor in config.tensors if tensor.table.hashed]
    if not tables:
        return
    if config.HasField("aggregation"):
        problem = "are named by ids, which several workers have on one server, and several servers for one worker"
        raise _ids(f"rows of {tables[0].name!r} {problem}; use one target, or a session without `aggregation`")
    for table in tables:
        if table.shape and table.shape[0] > MOST_CAPACITY:
            problem = f"{table.shape[0]} ids, and {MOST_CAPACITY} are possible; use several tables"
            raise _ids(f"{table.name!r} has a capacity of {problem}")


def _ids(problem: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"tables: {problem}",
        metadata={"field": "config.tensors.table.hashed", "feature": "row_ids"},
    )


def fed_gradients() -> UnsupportedFeatureError:
    """Return the error of a gradient that is still being made: its ranges cannot be split yet."""
    return UnsupportedFeatureError(
        "feed: gradients that are made while they are sent go to one server; give `step` the whole gradient",
        metadata={"field": "feed", "feature": "feed"},
    )
