"""Few rows of parameters among which every pair of values occurs, in place of the product of all values.

Most faults of code that combines options need one option, or two that meet. A product tries each pair many times over.
The generator is greedy and deterministic: the same parameters give the same rows in every process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Parameters = Mapping[str, Sequence[Any]]
Combination = frozenset[tuple[str, Any]]


def _anything(row: Row) -> bool:
    return True


def combinations(
    parameters: Parameters, wholly: Iterable[Sequence[str]] = (), allowed: Callable[[Row], bool] = _anything
) -> list[Combination]:
    """List all that rows must have among them: of groups of parameters every tuple of values, and every pair.

    Args:
        parameters: the values of each parameter, by name; they are hashable.
        wholly: groups of parameters whose product is wanted whole.
        allowed: tells whether values may occur together; it is given rows that lack parameters, too.
    """
    groups = [*wholly, *itertools.combinations(parameters, 2)]
    products = (
        dict(zip(names, values, strict=True))
        for names in groups
        for values in itertools.product(*(parameters[name] for name in names))
    )
    return list(dict.fromkeys(frozenset(row.items()) for row in products if allowed(row)))


def missing(wanted: Iterable[Combination], rows: Iterable[Row]) -> list[Combination]:
    """List those of some combinations that no row has."""
    items = [row.items() for row in rows]
    return [combination for combination in wanted if not any(combination <= row for row in items)]


def pairwise(
    parameters: Parameters,
    wholly: Iterable[Sequence[str]] = (),
    allowed: Callable[[Row], bool] = _anything,
    given: Iterable[Row] = (),
) -> list[Row]:
    """Return rows that have all `combinations` among them.

    Args:
        parameters: see `combinations`; of values that serve equally well, the first is chosen.
        wholly: see `combinations`.
        allowed: see `combinations`.
        given: rows to begin with.
    """
    rows = list(given)
    wanted = dict.fromkeys(missing(combinations(parameters, wholly, allowed), rows))
    while wanted:
        row = dict(next(iter(wanted)))
        for name, values in parameters.items():
            if name not in row:
                row[name] = _best(row, name, values, allowed, wanted)
        rows.append({name: row[name] for name in parameters})
        for combination in [combination for combination in wanted if combination <= row.items()]:
            del wanted[combination]
    return rows


def _best(
    row: Row, name: str, values: Sequence[Any], allowed: Callable[[Row], bool], wanted: Iterable[Combination]
) -> Any:
    """Choose the value with which a row gains most of what is wanted."""
    known = row.items()
    gains = {value: 0 for value in values if allowed({**row, name: value})}
    for combination in wanted:
        rest = combination - known
        if len(rest) == 1:
            ((other, value),) = rest
            if other == name and value in gains:
                gains[value] += 1
    return max(gains, key=lambda value: gains[value])


def spread(rows: Iterable[Row], values: Sequence[Any]) -> list[Any]:
    """Return a value of one further parameter for each row, such that each value meets as much as possible."""
    met: set[tuple[Any, tuple[str, Any]]] = set()
    chosen: list[Any] = []
    for row in rows:
        value = min(values, key=lambda value: (sum((value, item) in met for item in row.items()), chosen.count(value)))
        met |= {(value, item) for item in row.items()}
        chosen.append(value)
    return chosen
