"""Between a user's arrays and flat chunks: which part of which tensor lies where in each message."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout
from stepwire.wire.dtypes import BLOCK, FLOAT16, FLOAT32, INT8, is_wire_dtype, wire_alignment, wire_items
from stepwire.wire.int8_blocks import PIECE, decode_blocks, encode_blocks

__all__ = ["Arrays", "ChunkLayout", "Container", "Flat", "Packer", "Part", "named_arrays"]

Arrays: TypeAlias = Mapping[str, Any] | Sequence[Any]
"""What users pass: arrays by name, or a list whose names are their positions, or a tree of those (see `trees`)."""

Container: TypeAlias = dict[str, Any] | list[Any]
"""What a flat answer is: arrays in a dict where the user passed a mapping, in a list where it was a sequence."""


Flat: TypeAlias = Sequence[npt.NDArray[Any]]
"""1-D arrays in layout order."""


class Part(NamedTuple):
    """Elements `[begin, end)` of tensor `tensor` lie at `[at, at + end - begin)` of a chunk."""

    tensor: int
    begin: int
    end: int
    at: int


class ChunkLayout(NamedTuple):
    """Flat elements `[offset, offset + elements)` and what lies in them."""

    offset: int
    elements: int
    parts: list[Part]


def named_arrays(arrays: Arrays, field: str) -> dict[str, npt.NDArray[Any]]:
    """Name the arrays and check that each can be sent.

    Raises:
        InvalidRequestError: not a mapping or a sequence, or a dtype that is not float32, bfloat16 or float16.
    """
    items: Iterable[tuple[Any, npt.ArrayLike]]
    if isinstance(arrays, Mapping):
        items = arrays.items()
    elif isinstance(arrays, Sequence) and not isinstance(arrays, (str, bytes)):
        items = [(str(index), value) for index, value in enumerate(arrays)]
    else:
        raise InvalidRequestError.of(
            field, f"{type(arrays).__name__} is neither a dict nor a list of arrays", reason=Reason.INVALID_TENSOR
        )
    named = {}
    for name, value in items:
        if not isinstance(name, str):
            raise InvalidRequestError.of(field, f"the name {name!r} is not a string", reason=Reason.INVALID_TENSOR)
        array = np.asarray(value)
        if not is_wire_dtype(array.dtype):
            raise InvalidRequestError.of(
                f"{field}[{name!r}]",
                f"dtype {array.dtype} is not served; cast it to float32, bfloat16 or float16",
                reason=Reason.INVALID_TENSOR,
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
        self._shapes = [(tensor.spec.name, tensor.spec.shape) for tensor in layout.tensors]
        # Every step has the same chunks.
        self._chunks: dict[tuple[int, int], Sequence[ChunkLayout]] = {}
        self._parts: dict[tuple[int, int], list[Part]] = {}

    def chunks(self, most: int, dtype: np.dtype[Any] = FLOAT32) -> Sequence[ChunkLayout]:
        """Return the chunks of at most `most` elements, in order, each aligned as the layout and the encoding ask."""
        kind = (most, wire_alignment(dtype))
        if (known := self._chunks.get(kind)) is None:
            known = self._chunks[kind] = tuple(self._cut(*kind))
        return known

    def _cut(self, most: int, alignment: int) -> Iterator[ChunkLayout]:
        size = self.layout.size
        most -= most % max(self.layout.chunk_alignment, alignment)
        for offset in range(0, size, most):
            count = min(most, size - offset)
            yield ChunkLayout(offset, count, self.parts(offset, count))

    def parts(self, offset: int, count: int) -> list[Part]:
        """Return what lies in flat elements `[offset, offset + count)`; remembered."""
        if (known := self._parts.get((offset, count))) is None:
            known = self._parts[offset, count] = list(self._find_parts(offset, offset + count))
        return known

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
        if named.keys() != self._indices.keys():
            missing = [name for name in self._indices if name not in named][:5]
            unknown = [name for name in named if name not in self._indices][:5]
            raise InvalidRequestError.of(
                field,
                f"names do not match the session's tensors: missing {missing}, unknown {unknown}",
                reason=Reason.INVALID_TENSOR,
            )
        arrays = []
        for name, shape in self._shapes:
            array = named[name]
            if array.shape != shape:
                raise InvalidRequestError.of(
                    f"{field}[{name!r}]",
                    f"shape {array.shape} is not the session's {shape}",
                    reason=Reason.INVALID_TENSOR,
                )
            arrays.append(array)
        return arrays

    def write(
        self,
        flat: Flat,
        parts: Sequence[Part],
        chunk: npt.NDArray[Any],
        offset: int = 0,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        """Encode parts into a chunk; elements between tensors, and those of a tensor without a gradient, become zero.

        What float16 cannot hold becomes infinite, as the contract says, and is no reason for a warning: this runs in
        gRPC's sending thread, where a warning that the user has made an error would break the stream.

        Args:
            flat: 1-D arrays in layout order, empty where a tensor has no gradient.
            parts: what lies in the chunk.
            chunk: items of the encoding.
            offset: first flat element; what `feedback` needs.
            feedback: with `INT8`, adds what earlier steps have left over, and keeps what this one leaves.
        """
        present = [part for part in parts if part.end <= len(flat[part.tensor])]
        if chunk.dtype == INT8:  # whose blocks would be coarser, or not finite, for what a frozen tensor brings
            stepped = [part for part in present if not self.layout.tensors[part.tensor].spec.frozen]
            _write_blocks(flat, stepped, chunk, offset, feedback)
        elif chunk.dtype == FLOAT16:
            with np.errstate(over="ignore"):
                _copy(flat, present, chunk)
        else:
            _copy(flat, present, chunk)

    def read(self, flat: Flat, parts: Sequence[Part], chunk: npt.NDArray[Any]) -> None:
        """Decode a chunk into parts."""
        for part in parts:
            flat[part.tensor][part.begin : part.end] = chunk[part.at : part.at + part.end - part.begin]

    def empty(self, dtype: np.dtype[Any], *, as_list: bool) -> Container:
        """Allocate arrays for an answer, as views of one flat buffer: a list where the user passed one."""
        return self.room(dtype, as_list=as_list)[0]

    def room(self, dtype: np.dtype[Any], *, as_list: bool) -> tuple[Container, list[npt.NDArray[Any]]]:
        """Return what `empty` does, and the same as `targets` does."""
        named, flat = self.named_room(dtype)
        return ([named[str(position)] for position in range(len(named))] if as_list else named), flat

    def named_room(self, dtype: np.dtype[Any]) -> tuple[dict[str, npt.NDArray[Any]], list[npt.NDArray[Any]]]:
        """Return what `room` does, by name."""
        buffer = np.empty(self.layout.size, dtype)
        flat = [buffer[tensor.offset : tensor.end] for tensor in self.layout.tensors]
        return {name: view.reshape(shape) for (name, shape), view in zip(self._shapes, flat, strict=True)}, flat

    def targets(self, out: Arrays, field: str) -> list[npt.NDArray[Any]]:
        """Return writable 1-D views of a user's arrays in layout order.

        Raises:
            InvalidRequestError: they do not match, or are read-only or not contiguous.
        """
        arrays = self._checked(named_arrays(out, field), field)
        for (name, _), array in zip(self._shapes, arrays, strict=True):
            original = out[name] if isinstance(out, Mapping) else out[int(name)]
            if array is not original:
                raise InvalidRequestError.of(
                    f"{field}[{name!r}]",
                    f"{type(original).__name__} is not a NumPy array",
                    reason=Reason.INVALID_TENSOR,
                )
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InvalidRequestError.of(
                    f"{field}[{name!r}]", "the array is read-only or not C-contiguous", reason=Reason.INVALID_TENSOR
                )
        return [array.reshape(-1) for array in arrays]


def _copy(flat: Flat, parts: Sequence[Part], chunk: npt.NDArray[Any]) -> None:
    done = 0
    for part in parts:
        if part.at > done:
            chunk[done : part.at] = 0
        done = part.at + part.end - part.begin
        chunk[part.at : done] = flat[part.tensor][part.begin : part.end]
    if done < len(chunk):
        chunk[done:] = 0


def _write_blocks(
    flat: Flat, parts: Sequence[Part], chunk: npt.NDArray[Any], offset: int, feedback: ErrorFeedback | None
) -> None:
    """Gather a piece that stays in the cache, and encode it from there, until the chunk is full."""
    values = np.empty(min(PIECE, len(chunk) * BLOCK), np.float32)
    for low in range(0, len(chunk) * BLOCK, PIECE):
        piece = values[: min(PIECE, len(chunk) * BLOCK - low)]
        within = list(_parts_within(parts, low, low + len(piece)))
        _copy(flat, within, piece)
        blocks = chunk[low // BLOCK :][: wire_items(INT8, len(piece))]
        if feedback is None:
            encode_blocks(piece, blocks)
        else:
            _encode_with_feedback(piece, blocks, within, offset + low, feedback)


def _encode_with_feedback(
    piece: npt.NDArray[np.float32],
    blocks: npt.NDArray[Any],
    parts: Sequence[Part],
    offset: int,
    feedback: ErrorFeedback,
) -> None:
    spans = [(part.at, part.at + part.end - part.begin) for part in parts]
    with np.errstate(over="ignore", invalid="ignore"):
        for begin, end in spans:
            piece[begin:end] += feedback.residual[offset + begin : offset + end]
    encode_blocks(piece, blocks)
    sent = decode_blocks(blocks, len(piece))
    for begin, end in spans:
        feedback.keep(offset + begin, piece[begin:end], sent[begin:end])


def _parts_within(parts: Sequence[Part], low: int, high: int) -> Iterator[Part]:
    """Yield what of some parts lies in elements `[low, high)` of their chunk, counted from `low`."""
    first = max(bisect_right(parts, low, key=lambda part: part.at) - 1, 0)
    for part in parts[first:]:
        if part.at >= high:
            return
        skipped = max(low - part.at, 0)
        begin, end = part.begin + skipped, min(part.end, part.begin + high - part.at)
        if begin < end:
            yield Part(part.tensor, begin, end, part.at + skipped - low)
