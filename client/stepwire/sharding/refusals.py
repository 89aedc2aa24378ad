"""The errors of what one server has, and several servers of one session have not."""

from __future__ import annotations

from stepwire.errors import UnsupportedFeatureError

__all__ = ["fed_gradients", "rows_by_ids", "shared_arrays"]


def shared_arrays() -> UnsupportedFeatureError:
    """Return the error of arrays in shared memory: a tensor that is cut lies in several memories."""
    return UnsupportedFeatureError(
        "a session that is cut has no arrays in shared memory, as a tensor may lie in several; pass arrays of your own "
        "to `step`, which are copied into it",
        metadata={"field": "transport", "feature": "transport_shm"},
    )


def rows_by_ids(name: str) -> UnsupportedFeatureError:
    """Return the error of a table whose rows are named by ids: ranges of indices part rows among servers."""
    return UnsupportedFeatureError(
        f"tables: rows of {name!r} are named by ids, and servers part rows by ranges of indices; use one target",
        metadata={"field": "config.tensors.table.hashed", "feature": "row_ids"},
    )


def fed_gradients() -> UnsupportedFeatureError:
    """Return the error of a gradient that is still being made: its ranges cannot be split yet."""
    return UnsupportedFeatureError(
        "feed: gradients that are made while they are sent go to one server; give `step` the whole gradient",
        metadata={"field": "feed", "feature": "feed"},
    )
