"""Packing of a user's arrays into flat chunks: the ranges of tensors that lie in each message."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.arrays.error_feedback import ErrorFeedback, PendingResidual
from stepwire.arrays.ranges import MadeReply, Ranges
from stepwire.arrays.reply_memory import ReplyMemory
from stepwire.arrays.rows import check_dense
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import Layout
from stepwire.wire.dtypes import BLOCK, FLOAT16, FLOAT32, INT8, is_wire_dtype, wire_alignment, wire_items
from stepwire.wire.int8_blocks import BATCH, decode_blocks, encode_blocks

__all__ = ["Arrays", "ChunkLayout", "Container", "Flat", "PackedRange", "Packer", "named_arrays"]

Arrays: TypeAlias = Mapping[str, Any] | Sequence[Any]
"""A user's arrays: arrays by name, or a list with positions as names, or a tree of those (see `trees`)."""

Container: TypeAlias = dict[str, Any] | list[Any]
"""The arrays of a reply: a dict if the user passed a mapping, a list if the user passed a sequence."""


Flat: TypeAlias = Sequence[npt.NDArray[Any]]
"""1-D arrays in layout order."""


class PackedRange(NamedTuple):
    """Elements `[begin, end)` of tensor `tensor` lie at `[position, position + end - begin)` of a chunk."""

    tensor: int
    begin: int
    end: int
    position: int


class ChunkLayout(NamedTuple):
    """One chunk: flat elements `[offset, offset + elements)`, and the ranges of tensors in them."""

    offset: int
    elements: int
    ranges: list[PackedRange]


def named_arrays(arrays: Arrays, field: str) -> dict[str, npt.NDArray[Any]]:
    """Name the arrays and check that each can be sent.

    Args:
        arrays: the user's arrays, by name or by position.
        field: the path that an error names.

    Returns:
        The arrays by name.

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
        _check_mask(value, f"{field}[{name!r}]")
        array = np.asarray(value)
        if not is_wire_dtype(array.dtype):
            check_dense(value, f"{field}[{name!r}]")
            raise InvalidRequestError.of(
                f"{field}[{name!r}]",
                f"dtype {array.dtype} is not served; cast it to float32, bfloat16 or float16",
                reason=Reason.INVALID_TENSOR,
            )
        named[name] = array
    return named


def _check_mask(value: object, field: str) -> None:
    if isinstance(value, np.ma.MaskedArray) and (masked := np.count_nonzero(np.ma.getmaskarray(value))):
        raise InvalidRequestError.of(
            field,
            f"{masked} of its {value.size} elements are masked, and a server has no masks; fill them, such as with "
            "`.filled(0)`",
            reason=Reason.INVALID_TENSOR,
        )


class Packer:
    """Packs and unpacks the arrays of one session.

    Attributes:
        layout: the layout of the session.
    """

    def __init__(self, layout: Layout) -> None:
        """Prepare for a layout."""
        self.layout = layout
        self._indices = layout.tensor_indices()
        self._shapes = [(tensor.spec.name, tensor.spec.shape) for tensor in layout.tensors]
        self._bounds = [slice(tensor.offset, tensor.end) for tensor in layout.tensors]
        self._reordered = bool(layout.names) and layout.names != tuple(self._indices)
        # In the order of the tensors' creation; the range of a tensor of one dimension has its shape already.
        bounds = dict(zip(self._indices, self._bounds, strict=True))
        shapes = {name: None if len(shape) == 1 else shape for name, shape in self._shapes}
        self._order = list(self.in_order(bounds))
        self._views = [(name, bounds[name], shapes[name]) for name in self._order]
        # Every step has the same chunks.
        self._chunks: dict[tuple[int, int, bool], Sequence[ChunkLayout]] = {}
        self._ranges: dict[tuple[int, int], list[PackedRange]] = {}
        self._replies = ReplyMemory()

    def chunks(self, most: int, dtype: np.dtype[Any] = FLOAT32, *, tables: bool = True) -> Sequence[ChunkLayout]:
        """Return the chunks of at most `most` elements, in order, each aligned as the layout and the encoding ask.

        Args:
            most: the elements of a chunk at most.
            dtype: the encoding.
            tables: True for the whole space, False for no chunk that has elements of tables alone.
        """
        key = (most, wire_alignment(dtype), tables)
        if (known := self._chunks.get(key)) is None:
            known = self._chunks[key] = tuple(self._split(*key))
        return known

    def _split(self, most: int, alignment: int, tables: bool) -> Iterator[ChunkLayout]:
        alignment = max(self.layout.chunk_alignment, alignment)
        most -= most % alignment
        for start, end in [(0, self.layout.size)] if tables else self.layout.dense_ranges:
            start -= start % alignment
            for offset in range(start, end, most):
                count = min(most, end - offset)
                yield ChunkLayout(offset, count, self.ranges(offset, count))

    def ranges(self, offset: int, count: int) -> list[PackedRange]:
        """Return the ranges of tensors in flat elements `[offset, offset + count)`, from a cache."""
        if (known := self._ranges.get((offset, count))) is None:
            known = self._ranges[offset, count] = list(self._find_ranges(offset, offset + count))
        return known

    def _find_ranges(self, offset: int, end: int) -> Iterator[PackedRange]:
        for tensor in self.layout.overlapping(offset, end):
            first = max(offset - tensor.offset, 0)
            last = min(end - tensor.offset, tensor.count)
            yield PackedRange(self._indices[tensor.spec.name], first, last, tensor.offset + first - offset)

    def ordered(self, arrays: Arrays, field: str) -> list[npt.NDArray[Any]]:
        """Return checked 1-D views (copies of non-contiguous arrays) in layout order.

        Raises:
            InvalidRequestError: a name is missing or unknown, or a shape or dtype is wrong.
        """
        return [array.reshape(-1) for array in self._checked(named_arrays(arrays, field), field)]

    def present(
        self, arrays: Arrays, field: str, optional: frozenset[str]
    ) -> tuple[list[npt.NDArray[Any]], frozenset[int]]:
        """Return views as `ordered` does, with an empty view for each tensor without an array.

        Args:
            arrays: the user's arrays; a tensor without an array is absent, or None.
            field: the path that an error names.
            optional: the names that may be absent.

        Returns:
            The views, and the indices of the tensors without an array.

        Raises:
            InvalidRequestError: as `ordered`.
        """
        if not optional or not isinstance(arrays, (Mapping, Sequence)):
            return self.ordered(arrays, field), frozenset()
        named_items = dict(arrays) if isinstance(arrays, Mapping) else {str(i): value for i, value in enumerate(arrays)}
        given = {name: array for name, array in named_items.items() if array is not None}
        absent = frozenset(name for name in self._indices if name not in given and name in optional)
        if not absent:
            return self.ordered(arrays, field), frozenset()
        checked = self._checked(named_arrays(given, field), field, absent)
        return [array.reshape(-1) for array in checked], frozenset(self._indices[name] for name in absent)

    def _checked(
        self, named: dict[str, npt.NDArray[Any]], field: str, absent: frozenset[str] = frozenset()
    ) -> list[npt.NDArray[Any]]:
        """Return the arrays in layout order, of no elements for those that are absent."""
        if named.keys() | absent != self._indices.keys():
            missing = [name for name in self._indices if name not in named and name not in absent][:5]
            unknown = [name for name in named if name not in self._indices][:5]
            raise InvalidRequestError.of(
                field,
                f"names do not match the session's tensors: missing {missing}, unknown {unknown}",
                reason=Reason.INVALID_TENSOR,
            )
        arrays = []
        for name, shape in self._shapes:
            if name in absent:
                arrays.append(np.empty(0, np.float32))
                continue
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
        ranges: Sequence[PackedRange],
        chunk: npt.NDArray[Any],
        offset: int = 0,
        feedback: ErrorFeedback | PendingResidual | None = None,
    ) -> None:
        """Encode ranges into a chunk. Padding, and the elements of a tensor without a gradient, become zero.

        A value beyond float16 becomes infinite, as the contract says, without a warning. This method runs in gRPC's
        sending thread, and a warning that the user has made an error would break the stream there.

        Args:
            flat: 1-D arrays in layout order, empty for a tensor without a gradient.
            ranges: the ranges of the chunk.
            chunk: the items of the encoding; filled.
            offset: the first flat element of the chunk, for `feedback`.
            feedback: with `INT8`, the error feedback: its residual is added, and the new encoding error is kept.
        """
        present = [packed for packed in ranges if packed.end <= len(flat[packed.tensor])]
        if chunk.dtype == INT8:  # the gradient of a frozen tensor would make the blocks coarser, or not finite
            stepped = [packed for packed in present if not self.layout.tensors[packed.tensor].spec.frozen]
            _write_blocks(flat, stepped, chunk, offset, feedback)
        elif chunk.dtype == FLOAT16:
            with np.errstate(over="ignore"):
                _copy(flat, present, chunk)
        else:
            _copy(flat, present, chunk)

    def read(self, flat: Flat, ranges: Sequence[PackedRange], chunk: npt.NDArray[Any]) -> None:
        """Decode a chunk into its ranges of `flat`."""
        for packed in ranges:
            last = packed.position + packed.end - packed.begin
            flat[packed.tensor][packed.begin : packed.end] = chunk[packed.position : last]

    def to_come(self, dtype: np.dtype[Any], names: Sequence[str] | None) -> Ranges:
        """Return 1-D views, as `targets` does, of the arrays of a reply, which are made when they are first asked for.

        Args:
            dtype: the encoding of the reply.
            names: the names in the order that the dict of a reply is to have; others than the tensors' have no say.
                None for a list.
        """

        def make() -> MadeReply:
            whole, named = self._made(dtype)
            if names is None:
                return whole, [named[str(position)] for position in range(len(named))]
            if names != self._order and named.keys() == set(names):
                named = {name: named[name] for name in names}
            return whole, named

        return Ranges(make, self._bounds)

    def allocate_dense(self, dtype: np.dtype[Any], *, as_list: bool) -> tuple[Container, Flat]:
        """Return new arrays of a reply, and 1-D views of them; None, and an empty view, for each table."""
        named, flat = dict[str, Any](), list[npt.NDArray[Any]]()
        for tensor in self.layout.tensors:
            values = np.empty(0 if tensor.spec.table else tensor.count, dtype)
            flat.append(values)
            named[tensor.spec.name] = None if tensor.spec.table else values.reshape(tensor.spec.shape)
        named = self.in_order(named)
        return ([named[str(position)] for position in range(len(named))] if as_list else named), flat

    def allocate_named(self, dtype: np.dtype[Any]) -> tuple[dict[str, npt.NDArray[Any]], Ranges]:
        """Return new arrays by name, as views of one flat array, and 1-D views of them as `targets` does."""
        made = self._made(dtype)
        return made[1], Ranges(lambda: made, self._bounds)

    def _made(self, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
        whole = self._replies.empty(self.layout.size, dtype)
        return whole, {
            name: whole[bounds] if shape is None else whole[bounds].reshape(shape)
            for name, bounds, shape in self._views
        }

    def in_order(self, named: dict[str, Any]) -> dict[str, Any]:
        """Return values by name, one a tensor, in the order of the tensors' creation."""
        return {name: named[name] for name in self.layout.names} if self._reordered else named

    def targets(self, out: Arrays, field: str) -> list[npt.NDArray[Any]]:
        """Return writable 1-D views of a user's arrays in layout order.

        Raises:
            InvalidRequestError: the arrays do not match the layout, or are read-only or not contiguous.
        """
        arrays = self._checked(named_arrays(out, field), field)
        for (name, _), array in zip(self._shapes, arrays, strict=True):
            original = out[name] if isinstance(out, Mapping) else out[int(name)]
            if not isinstance(original, np.ndarray):  # a subclass, such as a memmap, is written through its base
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


def _copy(flat: Flat, ranges: Sequence[PackedRange], chunk: npt.NDArray[Any]) -> None:
    done = 0
    for packed in ranges:
        if packed.position > done:
            chunk[done : packed.position] = 0
        done = packed.position + packed.end - packed.begin
        chunk[packed.position : done] = flat[packed.tensor][packed.begin : packed.end]
    if done < len(chunk):
        chunk[done:] = 0


def _write_blocks(
    flat: Flat,
    ranges: Sequence[PackedRange],
    chunk: npt.NDArray[Any],
    offset: int,
    feedback: ErrorFeedback | PendingResidual | None,
) -> None:
    """Gather batches that stay in the processor's cache, and encode each from there."""
    values = np.empty(min(BATCH, len(chunk) * BLOCK), np.float32)
    for low in range(0, len(chunk) * BLOCK, BATCH):
        batch = values[: min(BATCH, len(chunk) * BLOCK - low)]
        within = list(_ranges_within(ranges, low, low + len(batch)))
        _copy(flat, within, batch)
        blocks = chunk[low // BLOCK :][: wire_items(INT8, len(batch))]
        if feedback is None:
            encode_blocks(batch, blocks)
        else:
            _encode_with_feedback(batch, blocks, within, offset + low, feedback)


def _encode_with_feedback(
    batch: npt.NDArray[np.float32],
    blocks: npt.NDArray[Any],
    ranges: Sequence[PackedRange],
    offset: int,
    feedback: ErrorFeedback | PendingResidual,
) -> None:
    bounds = [(packed.position, packed.position + packed.end - packed.begin) for packed in ranges]
    with np.errstate(over="ignore", invalid="ignore"):
        for begin, end in bounds:
            batch[begin:end] += feedback.residual[offset + begin : offset + end]
    encode_blocks(batch, blocks)
    sent = decode_blocks(blocks, len(batch))
    for begin, end in bounds:
        feedback.keep(offset + begin, batch[begin:end], sent[begin:end])


def _ranges_within(ranges: Sequence[PackedRange], low: int, high: int) -> Iterator[PackedRange]:
    """Yield the overlap of ranges with elements `[low, high)` of their chunk, with positions counted from `low`."""
    first = max(bisect_right(ranges, low, key=lambda packed: packed.position) - 1, 0)
    for packed in ranges[first:]:
        if packed.position >= high:
            return
        skipped = max(low - packed.position, 0)
        begin, end = packed.begin + skipped, min(packed.end, packed.begin + high - packed.position)
        if begin < end:
            yield PackedRange(packed.tensor, begin, end, packed.position + skipped - low)
