"""Few rows of parameters among which every pair of values occurs, in place of the product of all values.

Most faults of code that combines options need one option, or two that meet. A product tries each pair many times over.
The generator is greedy and deterministic: the same parameters give the same rows in every process.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Parameters = Mapping[str, Sequence[Any]]
Item = tuple[str, Any]
Combination = frozenset[Item]


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
        parameters: see `combinations`; of values that serve equally well, a row gets one that it has seldom met.
        wholly: see `combinations`.
        allowed: see `combinations`.
        given: rows to begin with.
    """
    rows = list(given)
    wanted = dict.fromkeys(missing(combinations(parameters, wholly, allowed), rows))
    met: Counter[frozenset[Item]] = Counter()
    while wanted:
        row = dict(next(iter(wanted)))
        for name, values in parameters.items():
            if name not in row:
                row[name] = _best(row, name, [value for value in values if allowed({**row, name: value})], wanted, met)
        rows.append({name: row[name] for name in parameters})
        met.update(map(frozenset, itertools.combinations(row.items(), 2)))
        for combination in [combination for combination in wanted if combination <= row.items()]:
            del wanted[combination]
    return rows


def _best(
    row: Row, name: str, values: Sequence[Any], wanted: Iterable[Combination], met: Counter[frozenset[Item]]
) -> Any:
    """Choose the value with which a row gains most of what is wanted; of several, one that it has seldom met."""
    known, gains = row.items(), Counter[Item]()
    for combination in wanted:
        rest = combination - known
        if len(rest) == 1:
            gains.update(rest)
    seldom = {value: -sum(met[frozenset((item, (name, value)))] for item in known) for value in values}
    return max(values, key=lambda value: (gains[name, value], seldom[value]))


def spread(rows: Sequence[Row], values: Sequence[Any]) -> list[Any]:
    """Return a value of one further parameter for each row, such that each meets as much as possible of the others."""
    rows_of = Counter(item for row in rows for item in row.items())
    met: set[tuple[Any, Item]] = set()
    chosen: list[Any] = []

    def gain(value: Any, row: Row) -> tuple[float, int]:
        """Count most what few rows have: there are few chances to meet it."""
        return sum(1.0 / rows_of[item] for item in row.items() if (value, item) not in met), -chosen.count(value)

    for row in rows:
        value = max(values, key=lambda value: gain(value, row))
        met |= {(value, item) for item in row.items()}
        chosen.append(value)
    return chosen


def covering(rows: Sequence[Row], wanted: Iterable[Combination]) -> list[Row]:
    """Return few of some rows, such that they have all of the wanted combinations among them."""
    chosen: list[Row] = []
    while left := missing(wanted, chosen):
        chosen.append(max(rows, key=lambda row: sum(combination <= row.items() for combination in left)))
        assert len(missing(left, chosen[-1:])) < len(left), f"no row has {left[0]}"
    return chosen
