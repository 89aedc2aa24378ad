"""The names of ranges: a shard's session says by them of which tensors it holds ranges, so nobody else must remember.

A tensor that is whole in its shard keeps its name. A range `[begin:end)` of `w`, counted in row-major elements, is a
1-D tensor of the name

    w[65536:131072]of(512,1024)

with the shape of the whole at its end. A whole tensor whose own name ends like that is named as a range too, the range
of all its elements. So a name that ends like that is always the name of a range, and reading removes exactly one
ending.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec

__all__ = ["Origin", "origin_of", "range_spec"]

_ENDING: Final = re.compile(r"(.+)\[(\d+):(\d+)\]of\((\d+(?:,\d+)*)?\)", re.DOTALL)
_MAX_NAME_CHARACTERS: Final = 512


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
    return dataclasses.replace(spec, name=name, shape=(end - begin,))


def origin_of(spec: TensorSpec) -> Origin:
    """Return the origin of a shard's tensor, from its name alone; the inverse of `range_spec`."""
    found = _ENDING.fullmatch(spec.name)
    if found is None:
        return Origin(spec.name, spec.shape, 0, spec.count)
    name, begin, end, extents = found.groups()
    shape = tuple(map(int, extents.split(","))) if extents else ()
    origin = Origin(name, shape, int(begin), int(end))
    if spec.shape != (origin.end - origin.begin,) or origin.end > math.prod(shape):
        return Origin(spec.name, spec.shape, 0, spec.count)  # no range, only named like one
    return origin
