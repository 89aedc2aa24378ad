"""The body of a checkpoint: every slot as one float32 array, in one file of the safetensors format.

Ranges are whole blocks, and each block has its own CRC32C and its own sum of squares. So they may be written in any
order, and the same values give the same file and the same facts.

Each block is copied once, into an aligned buffer. Its checksum is of that copy, which is what is written. Whole pages
go past the page cache where the file system allows that (O_DIRECT). The two ends of a block that begins within a page
go through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from stepwire_server.durability.body_header import (
    ELEMENT_BYTES,
    PAGE_BYTES,
    Place,
    encode_header,
    places,
    read_header,
)
from stepwire_server.durability.disk import Disk, read_all, write_all
from stepwire_server.durability.manifest import LARGEST_BLOCK_ELEMENTS, ArrayFacts, damaged

__all__ = ["BLOCK_ELEMENTS", "BodyReader", "BodyWriter"]

BLOCK_ELEMENTS: Final = 1 << 20
"""The elements of a block, 4 MiB."""

_GRAIN: Final = 1 << 16  # elements squared at a time: their float64 stay in the cache

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]


class BodyWriter:
    """Writes a new body. One thread uses it, and ends it by `finish` or `abort`."""

    def __init__(
        self, disk: Disk, path: pathlib.Path, slots: Mapping[str, int], *, block_elements: int = BLOCK_ELEMENTS
    ) -> None:
        """Create the file, set its bytes aside and write its head.

        Args:
            disk: the file system.
            path: the file, which must not exist.
            slots: the number of elements of each slot, in the order of the file.
            block_elements: the elements of a block.

        Raises:
            OSError: the disk failed; the file may be there in part.
        """
        if not 1 <= block_elements <= LARGEST_BLOCK_ELEMENTS:
            raise ValueError(f"a block has 1 to {LARGEST_BLOCK_ELEMENTS} elements, not {block_elements}")
        self._disk = disk
        self._slots = dict(slots)
        self._block_elements = block_elements
        header = encode_header(self._slots)
        self._places = places(self._slots, len(header))
        self._blocks: dict[str, dict[int, tuple[int, float]]] = {name: {} for name in self._slots}
        largest = min(block_elements, max(self._slots.values(), default=0))
        # A map is page-aligned; a block may begin within a page.
        self._buffer: _Bytes = np.frombuffer(mmap.mmap(-1, largest * ELEMENT_BYTES + PAGE_BYTES), np.uint8)
        self._direct: int | None = None
        self._descriptor: int | None = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with contextlib.ExitStack() as undo:
            undo.callback(self.abort)
            _allocate(disk, self._descriptor, max((place.end for place in self._places.values()), default=len(header)))
            write_all(disk, self._descriptor, memoryview(header), 0)
            with _unsupported_is_fine():
                self._direct = disk.open(path, os.O_WRONLY | os.O_DIRECT)
            undo.pop_all()

    def write(self, slot: str, start: int, values: _Floats) -> None:
        """Write a range of a slot, in any order; each range once.

        Args:
            slot: the slot's name.
            start: the first element, a multiple of the block's elements.
            values: `(n,) float32`, as many whole blocks as there are, or all up to the end of the slot.

        Raises:
            OSError: the disk failed; only `abort` helps.
            ValueError: the range is not made of whole blocks, or one of them was written before.
        """
        elements, step = self._slots[slot], self._block_elements
        end = start + len(values)
        if values.dtype != np.float32 or values.ndim != 1:
            raise ValueError(f"values are {values.dtype} of shape {values.shape}, not (n,) float32")
        if not 0 <= start <= end <= elements or start % step or (end % step and end != elements):
            raise ValueError(f"[{start}, {end}) is not made of whole blocks of {step} in a slot of {elements} elements")
        for first in range(start, end, step):
            block = first // step
            if block in self._blocks[slot]:
                raise ValueError(f"block {block} of slot {slot!r} was written before")
            offset = self._places[slot].offset + first * ELEMENT_BYTES
            self._blocks[slot][block] = self._write_block(offset, values[first - start : first - start + step])

    def finish(self) -> dict[str, ArrayFacts]:
        """Wait until the file has reached the disk, close it, and return the facts of each slot.

        Raises:
            OSError: the disk failed; only `abort` helps.
            ValueError: a block is missing.
        """
        facts = {slot: self._facts(slot) for slot in self._slots}
        assert self._descriptor is not None
        self._disk.sync(self._descriptor)
        self._close()
        return facts

    def abort(self) -> None:
        """Close the file, whatever is in it. Harmless after `finish`, and twice."""
        with contextlib.suppress(OSError):
            self._close()

    def _facts(self, slot: str) -> ArrayFacts:
        elements, written = self._slots[slot], self._blocks[slot]
        missing = next((block for block in range(-(-elements // self._block_elements)) if block not in written), None)
        if missing is not None:
            raise ValueError(f"block {missing} of slot {slot!r} was not written")
        in_order = [written[block] for block in sorted(written)]
        norm = math.sqrt(math.fsum(squares for _, squares in in_order))
        return ArrayFacts(elements, norm, self._block_elements, tuple(checksum for checksum, _ in in_order))

    def _write_block(self, offset: int, values: _Floats) -> tuple[int, float]:
        """Write a block and return its checksum and its sum of squares."""
        before, nbytes = offset % PAGE_BYTES, len(values) * ELEMENT_BYTES
        copy = self._buffer[before : before + nbytes]
        copy.view(np.uint32)[:] = values.view(np.uint32)  # as integers, so that no NaN is made quiet
        pages_start = -(-before // PAGE_BYTES) * PAGE_BYTES
        pages_end = (before + nbytes) // PAGE_BYTES * PAGE_BYTES
        if pages_start >= pages_end or not self._write_direct(offset - before, pages_start, pages_end):
            pages_start = pages_end = before
        for low, high in ((before, pages_start), (pages_end, before + nbytes)):
            if low < high:
                assert self._descriptor is not None
                write_all(self._disk, self._descriptor, self._buffer[low:high].data, offset - before + low)
        return int(google_crc32c.value(copy)), _sum_of_squares(copy.view(np.float32))

    def _write_direct(self, base: int, start: int, end: int) -> bool:
        """Write whole pages of the buffer past the page cache, and tell whether the file system did."""
        if self._direct is None:
            return False
        with _unsupported_is_fine():
            write_all(self._disk, self._direct, self._buffer[start:end].data, base + start)
            return True
        direct, self._direct = self._direct, None
        self._disk.close(direct)
        return False

    def _close(self) -> None:
        descriptors = (self._direct, self._descriptor)
        self._direct = self._descriptor = None
        with contextlib.ExitStack() as closing:
            for descriptor in descriptors:
                if descriptor is not None:
                    closing.callback(self._disk.close, descriptor)


class BodyReader:
    """Reads a body, and hands out no block whose checksum is wrong. A context manager. One thread uses it.

    Attributes:
        slots: the number of elements of each slot.
        nbytes: the bytes of the file.
    """

    def __init__(self, disk: Disk, path: pathlib.Path, arrays: Mapping[str, ArrayFacts]) -> None:
        """Open a body and check its head.

        Args:
            disk: the file system.
            path: the file.
            arrays: the facts of its slots.

        Raises:
            DataLossError: the head is damaged, or is of other arrays.
            OSError: the disk failed, or there is no such file.
        """
        self._disk = disk
        self._path = path
        self._arrays = dict(arrays)
        self._buffer: _Floats = np.empty(0, np.float32)
        self._buffered: tuple[str, int] | None = None
        self._descriptor: int | None = disk.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.nbytes = disk.size(self._descriptor)
            self._places: dict[str, Place] = read_header(disk, self._descriptor, path)
            self.slots = {name: place.elements for name, place in self._places.items()}
            for name in sorted(self.slots.keys() | self._arrays.keys()):
                told = self._arrays[name].elements if name in self._arrays else None
                if self.slots.get(name) != told:
                    raise damaged(path, name, f"{self.slots.get(name)} elements, and {told} in the manifest")
            undo.pop_all()

    def read(self, slot: str, start: int, out: _Floats) -> None:
        """Read any range of a slot. Whole blocks are the fastest: others are read whole, and copied.

        Args:
            slot: the slot's name.
            start: the first element.
            out: `(n,) float32`, contiguous.

        Raises:
            DataLossError: a block's checksum is wrong; `out` is undefined.
            OSError: the disk failed.
        """
        facts = self._arrays[slot]
        step, end = facts.block_elements, start + len(out)
        if out.dtype != np.float32 or out.ndim != 1 or not 0 <= start <= end <= facts.elements:
            raise ValueError(f"[{start}, {end}) as {out.dtype} is no range of a slot of {facts.elements} float32")
        for block in range(start // step, -(-end // step)):
            first, last = block * step, min((block + 1) * step, facts.elements)
            low, high = max(first, start), min(last, end)
            if (low, high) == (first, last):
                self._read_block(slot, block, out[low - start : high - start])
            else:
                out[low - start : high - start] = self._whole_block(slot, block, last - first)[
                    low - first : high - first
                ]

    def verify(self, told: Callable[[int], object] = lambda nbytes: None) -> None:
        """Read everything.

        Args:
            told: a function of the bytes of the arrays that were read so far, as float32.

        Raises:
            DataLossError: naming the first array that is damaged, and its first block.
            OSError: the disk failed.
        """
        nbytes = 0
        for slot in self._places:
            facts = self._arrays[slot]
            for block in range(len(facts.crc32c)):
                count = min(facts.block_elements, facts.elements - block * facts.block_elements)
                self._whole_block(slot, block, count)
                told(nbytes := nbytes + count * ELEMENT_BYTES)

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        descriptor, self._descriptor = self._descriptor, None
        self._buffered = None
        if descriptor is not None:
            self._disk.close(descriptor)

    def __enter__(self) -> BodyReader:
        """Read for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _whole_block(self, slot: str, block: int, count: int) -> _Floats:
        """Return a block in the reader's own memory, which keeps the last one."""
        if len(self._buffer) < count:
            self._buffer = np.empty(count, np.float32)
        out = self._buffer[:count]
        if self._buffered != (slot, block):
            self._buffered = None
            self._read_block(slot, block, out)
            self._buffered = (slot, block)
        return out

    def _read_block(self, slot: str, block: int, out: _Floats) -> None:
        assert self._descriptor is not None
        facts = self._arrays[slot]
        data: npt.NDArray[Any] = out.view(np.uint8)
        offset = self._places[slot].offset + block * facts.block_elements * ELEMENT_BYTES
        try:
            count = read_all(self._disk, self._descriptor, data.data, offset)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error
        if count != data.nbytes:
            raise damaged(self._path, slot, f"the file ends in block {block}, {data.nbytes - count} bytes too early")
        if (actual := google_crc32c.value(data)) != facts.crc32c[block]:
            raise damaged(
                self._path, slot, f"block {block} has the checksum {actual}, and the manifest {facts.crc32c[block]}"
            )


def _allocate(disk: Disk, descriptor: int, nbytes: int) -> None:
    with _unsupported_is_fine():
        disk.allocate(descriptor, nbytes)


@contextlib.contextmanager
def _unsupported_is_fine() -> Iterator[None]:
    """Go on where the file system does not know a call; every other failure is one."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _sum_of_squares(values: _Floats) -> float:
    """Sum the squares of a block in float64, always in the same order."""
    with np.errstate(all="ignore"):
        parts = [
            float(np.square(values[low : low + _GRAIN], dtype=np.float64).sum())
            for low in range(0, len(values), _GRAIN)
        ]
    return math.fsum(parts)
