"""Rows of tables over a link: read as of one moment, listed by id, and checked for a load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.rows import IdTarget, RowGradient, Rows, RowTarget, rows_of, split_rows
from stepwire.connection.retry import Deadline
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout
from stepwire.links.link import SessionLink
from stepwire.v1 import state_pb2
from stepwire.wire.dtypes import FLOAT32

__all__ = ["checked_rows", "hashed_tables", "read_rows", "row_ids", "whole_tables"]

Ids = npt.NDArray[np.uint64]


def hashed_tables(layout: Layout) -> dict[str, int]:
    """Return the indices of the tables whose rows are named by ids, by name."""
    return {each.spec.name: index for index, each in layout.tables.items() if each.spec.hashed}


def checked_rows(rows: Mapping[str, Any], layout: Layout) -> tuple[RowGradient, ...]:
    """Return the rows of a load, checked.

    Args:
        rows: `Rows` by the names of tables.
        layout: the layout of the session.

    Raises:
        InvalidRequestError: a name is no table's, a row comes often, or the rows do not fit.
    """
    _check_names(rows, layout)
    loaded = split_rows(rows, layout)[1]
    for each in loaded:
        if len(np.unique(each.indices)) < len(each.indices):
            field = f"rows[{layout.tensors[each.tensor].spec.name!r}]"
            raise InvalidRequestError.of(field, "a row comes twice; name it once", reason=Reason.INVALID_TENSOR)
    return loaded


def read_rows(
    link: SessionLink, rows: Mapping[str, npt.ArrayLike], dtype: np.dtype[Any], deadline: Deadline
) -> tuple[dict[str, Rows], state_pb2.PullHeader]:
    """Return rows of tables by name, with the header of their moment; without tables that is an empty one.

    Raises:
        InvalidRequestError: a name is no table's, or a row is out of range.
        StepwireError: as `SessionLink.pull_rows`.
    """
    header, layout = state_pb2.PullHeader(), link.description.packer.layout
    _check_names(rows, layout)
    places = {table.spec.name: index for index, table in layout.tables.items()}
    found, targets = dict[str, Rows](), list[RowTarget]()
    for name, indices in rows.items():
        table = layout.tensors[places[name]]
        own = rows_of(indices, table, f"rows[{name!r}]")
        targets.append(RowTarget(places[name], own, np.empty((len(own), table.spec.width), dtype)))
        found[name] = Rows(own, targets[-1].values.reshape(-1, *table.spec.shape[1:]))
    if targets:
        header = link.pull_rows(targets, dtype, deadline)
    return found, header


def row_ids(
    link: SessionLink, tables: Mapping[str, int], deadline: Deadline
) -> tuple[dict[str, Ids], state_pb2.PullHeader]:
    """Return the ids of tables by name, each `(n,) uint64`, rising, with the header of their moment.

    Raises:
        StepwireError: as `SessionLink.pull_rows`.
    """
    targets = {name: IdTarget(index, {}) for name, index in tables.items()}
    header = link.pull_rows(list(targets.values()), FLOAT32, deadline)
    return {name: target.ids() for name, target in targets.items()}, header


def whole_tables(link: SessionLink, dtype: np.dtype[Any], deadline: Deadline) -> dict[str, Any]:
    """Return all tables of a session of tables alone, as of one moment: those with ids as `Rows`, others as arrays.

    Ids and rows come one after another. A step in between begins both again.

    Raises:
        StepwireError: as `SessionLink.pull_rows`.
    """
    packer = link.description.packer
    specs = [each.spec for each in packer.layout.tensors]
    while True:
        names, before = row_ids(link, hashed_tables(packer.layout), deadline)
        whole = {spec.name: names.get(spec.name, np.arange(spec.shape[0])) for spec in specs}
        found, after = read_rows(link, whole, dtype, deadline)
        if (before.step, before.load) == (after.step, after.load):
            every = {name: rows if name in names else rows.values for name, rows in found.items()}
            return packer.in_order(every)


def _check_names(rows: Mapping[str, Any], layout: Layout) -> None:
    tables = sorted(table.spec.name for table in layout.tables.values())
    if unknown := [name for name in rows if name not in tables]:
        raise InvalidRequestError.of("rows", f"{unknown[0]!r} is no table of this session; it has {tables}")
