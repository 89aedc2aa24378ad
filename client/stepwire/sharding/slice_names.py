"""The names of slices: a session of a part says by them of what whole it is a part, so nobody else has to remember.

A tensor that is whole in its shard keeps its name. A slice `[begin:end)` of `w`, counted in row-major elements, is a
1-D tensor of the name

    w[65536:131072]of(512,1024)

with the shape of the whole at its end. A whole tensor whose own name ends like that is named as a slice too, as the one
that is everything; so a name that ends like that is always that of a slice, and reading takes off exactly one ending.
"""

from __future__ import annotations

import math
import re
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec

__all__ = ["Origin", "origin_of", "slice_spec"]

_ENDING: Final = re.compile(r"(.+)\[(\d+):(\d+)\]of\((\d+(?:,\d+)*)?\)", re.DOTALL)
_MAX_NAME_CHARACTERS: Final = 512


class Origin(NamedTuple):
    """What a shard's tensor is a part of: elements `[begin, end)` of the tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int


def slice_spec(spec: TensorSpec, begin: int, end: int) -> TensorSpec:
    """Return how a shard holds elements `[begin, end)` of a tensor.

    Raises:
        InvalidRequestError: the name would be too long for the contract.
    """
    if end - begin == spec.count and not _ENDING.fullmatch(spec.name):
        return spec
    name = f"{spec.name}[{begin}:{end}]of({','.join(map(str, spec.shape))})"
    if len(name) > _MAX_NAME_CHARACTERS:
        raise InvalidRequestError(
            f"parameters: the name {spec.name[:80]!r}... has {len(name)} characters with the place of a slice; at most "
            f"{_MAX_NAME_CHARACTERS} are allowed, shorten it",
            reason=Reason.INVALID_TENSOR,
            metadata={"field": "parameters", "tensor": spec.name},
        )
    return TensorSpec(name, (end - begin,), spec.group, spec.frozen)


def origin_of(spec: TensorSpec) -> Origin:
    """Return what a shard's tensor is a part of, from its name alone; the inverse of `slice_spec`."""
    found = _ENDING.fullmatch(spec.name)
    if found is None:
        return Origin(spec.name, spec.shape, 0, spec.count)
    name, begin, end, extents = found.groups()
    shape = tuple(map(int, extents.split(","))) if extents else ()
    origin = Origin(name, shape, int(begin), int(end))
    if spec.shape != (origin.end - origin.begin,) or origin.end > math.prod(shape):
        return Origin(spec.name, spec.shape, 0, spec.count)  # nobody's slice, only named like one
    return origin
