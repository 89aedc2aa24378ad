"""The names of ranges: a shard's session says by them of which tensors it holds ranges, so nobody else must remember.

A tensor that is whole in its shard keeps its name. A range `[begin:end)` of `w`, counted in row-major elements, is a
1-D tensor of the name

    w[65536:131072]of(512,1024)

with the shape of the whole at its end. A whole tensor whose own name ends like that is named as a range too, the range
of all its elements. So a name that ends like that is always the name of a range, and reading removes exactly one
ending.

A range of a table has whole rows, and is a table of them. The seed of its first values is moved on, so that each
element begins with the value that it has in the whole. Rows by ids have values by their ids, and the same seed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec

__all__ = ["Origin", "origin_of", "range_spec", "whole_spec"]

_ENDING: Final = re.compile(r"(.+)\[(\d+):(\d+)\]of\((\d+(?:,\d+)*)?\)", re.DOTALL)
_MAX_NAME_CHARACTERS: Final = 512


_SEEDS: Final = 1 << 64
_SEEDS_APART: Final = 0x9E3779B97F4A7C15
"""SplitMix64 adds this to its seed for each number: see `stepwire_server.rules.first_values`."""


class Origin(NamedTuple):
    """The origin of a shard's tensor: elements `[begin, end)` of the tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int


def range_spec(spec: TensorSpec, begin: int, end: int) -> TensorSpec:
    """Return the tensor of a shard that holds elements `[begin, end)` of a tensor.

    Raises:
        InvalidRequestError: the name would be too long for the contract.
    """
    if end - begin == spec.count and not _ENDING.fullmatch(spec.name):
        return spec
    name = f"{spec.name}[{begin}:{end}]of({','.join(map(str, spec.shape))})"
    if len(name) > _MAX_NAME_CHARACTERS:
        raise InvalidRequestError.of(
            "parameters",
            f"the name {spec.name[:80]!r}... has {len(name)} characters with the bounds of a range; at most "
            f"{_MAX_NAME_CHARACTERS} are allowed, shorten it",
            reason=Reason.INVALID_TENSOR,
            tensor=spec.name,
        )
    return dataclasses.replace(spec, name=name, shape=_shape(spec, spec.shape, end - begin), seed=_seed(spec, begin))


def origin_of(spec: TensorSpec) -> Origin:
    """Return the origin of a shard's tensor, from its name alone; the inverse of `range_spec`."""
    found = _ENDING.fullmatch(spec.name)
    if found is None:
        return Origin(spec.name, spec.shape, 0, spec.count)
    name, begin, end, extents = found.groups()
    shape = tuple(map(int, extents.split(","))) if extents else ()
    origin = Origin(name, shape, int(begin), int(end))
    if spec.shape != _shape(spec, shape, origin.end - origin.begin) or origin.end > math.prod(shape):
        return Origin(spec.name, spec.shape, 0, spec.count)  # no range, only named like one
    return origin


def whole_spec(origin: Origin, spec: TensorSpec) -> TensorSpec:
    """Return the tensor whose range a shard's tensor is; the inverse of `range_spec` too."""
    return dataclasses.replace(spec, name=origin.name, shape=origin.shape, seed=_seed(spec, -origin.begin))


def _shape(spec: TensorSpec, whole: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the shape of a range of `count` elements: rows of a table, or one dimension."""
    if not spec.table:
        return (count,)
    return (count // max(math.prod(whole[1:]), 1), *whole[1:])


def _seed(spec: TensorSpec, elements: int) -> int:
    """Return the seed of a table that begins so many elements later."""
    moved = spec.table and not spec.hashed  # the first values of a row follow from its id alone
    return (spec.seed + elements * _SEEDS_APART) % _SEEDS if moved else spec.seed
