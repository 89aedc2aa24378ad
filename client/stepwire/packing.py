"""Between a user's arrays and flat chunks: which part of which tensor lies where in each message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.codecs import FLOAT16, is_wire_dtype
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout

__all__ = ["Arrays", "ChunkPlan", "Container", "Flat", "Packer", "Part", "named_arrays"]

Arrays: TypeAlias = Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike]
"""What users pass: arrays by name, or a list whose names are their positions."""

Container: TypeAlias = dict[str, npt.NDArray[Any]] | list[npt.NDArray[Any]]
"""What users get back: a dict where they passed a mapping, a list where they passed a sequence."""


Flat: TypeAlias = Sequence[npt.NDArray[Any]]
"""1-D arrays in layout order."""


class Part(NamedTuple):
    """Elements `[begin, end)` of tensor `tensor` lie at `[at, at + end - begin)` of a chunk."""

    tensor: int
    begin: int
    end: int
    at: int


class ChunkPlan(NamedTuple):
    """Flat elements `[offset, offset + elements)` and what lies in them."""

    offset: int
    elements: int
    parts: list[Part]


def named_arrays(arrays: Arrays, field: str) -> dict[str, npt.NDArray[Any]]:
    """Name the arrays and check that each can be sent.

    Raises:
        InvalidRequestError: not a mapping or a sequence, or a dtype that is not float32, bfloat16 or float16.
    """
    if isinstance(arrays, Mapping):
        items = list(arrays.items())
    elif isinstance(arrays, Sequence) and not isinstance(arrays, (str, bytes)):
        items = [(str(index), value) for index, value in enumerate(arrays)]
    else:
        raise _invalid(field, f"{type(arrays).__name__} is neither a dict nor a list of arrays")
    named = {}
    for name, value in items:
        if not isinstance(name, str):
            raise _invalid(field, f"the name {name!r} is not a string")
        array = np.asarray(value)
        if not is_wire_dtype(array.dtype):
            raise _invalid(
                f"{field}[{name!r}]",
                f"dtype {array.dtype} is not served; cast it to float32, bfloat16 or float16",
            )
        named[name] = array
    return named


class Packer:
    """Packs and unpacks the arrays of one session.

    Attributes:
        layout: where the tensors lie.
    """

    def __init__(self, layout: Layout) -> None:
        """Prepare for a layout."""
        self.layout = layout
        self._indices = layout.tensor_indices()
        self._parts: dict[tuple[int, int], list[Part]] = {}

    def chunks(self, most: int) -> list[ChunkPlan]:
        """Return the chunks of at most `most` elements, in order, each aligned as the layout asks."""
        size, most = self.layout.size, most - most % self.layout.chunk_alignment
        spans = [(offset, min(most, size - offset)) for offset in range(0, size, most)]
        return [ChunkPlan(offset, count, self.parts(offset, count)) for offset, count in spans]

    def parts(self, offset: int, count: int) -> list[Part]:
        """Return what lies in flat elements `[offset, offset + count)`; remembered, as every step has the same."""
        if (offset, count) not in self._parts:
            self._parts[offset, count] = list(self._find_parts(offset, offset + count))
        return self._parts[offset, count]

    def _find_parts(self, offset: int, end: int) -> Iterator[Part]:
        for tensor in self.layout.overlapping(offset, end):
            first = max(offset - tensor.offset, 0)
            last = min(end - tensor.offset, tensor.count)
            yield Part(self._indices[tensor.spec.name], first, last, tensor.offset + first - offset)

    def ordered(self, arrays: Arrays, field: str) -> list[npt.NDArray[Any]]:
        """Return checked 1-D views (copies of non-contiguous arrays) in layout order.

        Raises:
            InvalidRequestError: a name is missing or unknown, or a shape or dtype is wrong.
        """
        return [array.reshape(-1) for array in self._checked(named_arrays(arrays, field), field)]

    def present(
        self, arrays: Arrays, field: str, optional: frozenset[str]
    ) -> tuple[list[npt.NDArray[Any]], frozenset[int]]:
        """Return views as `ordered` does, empty ones where a tensor has no array, and the indices of those tensors.

        Args:
            arrays: the user's; a tensor is left out, or None.
            field: the path that an error names.
            optional: the names that may be left out.

        Raises:
            InvalidRequestError: as `ordered`.
        """
        if not optional or not isinstance(arrays, (Mapping, Sequence)):
            return self.ordered(arrays, field), frozenset()
        named_items = dict(arrays) if isinstance(arrays, Mapping) else {str(i): value for i, value in enumerate(arrays)}
        given = {name: array for name, array in named_items.items() if array is not None}
        absent = [name for name in self._indices if name not in given and name in optional]
        if not absent:
            return self.ordered(arrays, field), frozenset()
        named = named_arrays(given, field)
        named |= {name: np.empty(self._shape(name), np.float32) for name in absent}
        flat = [array.reshape(-1) for array in self._checked(named, field)]
        missing = frozenset(self._indices[name] for name in absent)
        return [array[:0] if index in missing else array for index, array in enumerate(flat)], missing

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.layout.tensors[self._indices[name]].spec.shape

    def _checked(self, named: dict[str, npt.NDArray[Any]], field: str) -> list[npt.NDArray[Any]]:
        if len(named) != len(self._indices) or any(name not in named for name in self._indices):
            missing = [name for name in self._indices if name not in named][:5]
            unknown = [name for name in named if name not in self._indices][:5]
            raise _invalid(field, f"names do not match the session's tensors: missing {missing}, unknown {unknown}")
        for tensor in self.layout.tensors:
            if named[tensor.spec.name].shape != tensor.spec.shape:
                raise _invalid(
                    f"{field}[{tensor.spec.name!r}]",
                    f"shape {named[tensor.spec.name].shape} is not the session's {tensor.spec.shape}",
                )
        return [named[tensor.spec.name] for tensor in self.layout.tensors]

    def write(self, flat: Flat, parts: Sequence[Part], chunk: npt.NDArray[Any]) -> None:
        """Encode parts into a chunk; elements between tensors become zero.

        What float16 cannot hold becomes infinite, as the contract says, and is no reason for a warning: this runs in
        gRPC's sending thread, where a warning that the user has made an error would break the stream.
        """
        if chunk.dtype == FLOAT16:
            with np.errstate(over="ignore"):
                self._write(flat, parts, chunk)
        else:
            self._write(flat, parts, chunk)

    def _write(self, flat: Flat, parts: Sequence[Part], chunk: npt.NDArray[Any]) -> None:
        done = 0
        for part in parts:
            if part.end > len(flat[part.tensor]):  # a tensor without a gradient
                continue
            if part.at > done:
                chunk[done : part.at] = 0
            done = part.at + part.end - part.begin
            chunk[part.at : done] = flat[part.tensor][part.begin : part.end]
        if done < len(chunk):
            chunk[done:] = 0

    def read(self, flat: Flat, parts: Sequence[Part], chunk: npt.NDArray[Any]) -> None:
        """Decode a chunk into parts."""
        for part in parts:
            flat[part.tensor][part.begin : part.end] = chunk[part.at : part.at + part.end - part.begin]

    def empty(self, dtype: np.dtype[Any], *, as_list: bool) -> Container:
        """Allocate arrays for an answer, as views of one flat buffer: a list where the user passed one."""
        buffer = np.empty(self.layout.size, dtype)
        named = {
            tensor.spec.name: buffer[tensor.offset : tensor.end].reshape(tensor.spec.shape)
            for tensor in self.layout.tensors
        }
        return [named[str(position)] for position in range(len(named))] if as_list else named

    def targets(self, out: Container, field: str) -> list[npt.NDArray[Any]]:
        """Return writable 1-D views of a user's arrays in layout order.

        Raises:
            InvalidRequestError: they do not match, or are read-only or not contiguous.
        """
        arrays = self._checked(named_arrays(out, field), field)
        for tensor, array in zip(self.layout.tensors, arrays, strict=True):
            original = out[tensor.spec.name] if isinstance(out, Mapping) else out[int(tensor.spec.name)]
            if array is not original:
                raise _invalid(f"{field}[{tensor.spec.name!r}]", f"{type(original).__name__} is not a NumPy array")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise _invalid(f"{field}[{tensor.spec.name!r}]", "the array is read-only or not C-contiguous")
        return [array.reshape(-1) for array in arrays]


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {problem}", reason=Reason.INVALID_TENSOR, metadata={"field": field})
