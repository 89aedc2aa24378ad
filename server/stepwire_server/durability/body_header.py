"""The head of a checkpoint's body, a file in the safetensors format: a length, and JSON that names the arrays.

The first 8 bytes are the length of the JSON, little-endian. Spaces at the end of the JSON make the data begin at a
multiple of 4096. The format allows no holes, so later arrays begin wherever the ones before them end.

Nothing of a head is believed before it is checked, and nothing is allocated by it.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from stepwire_server.durability.disk import Disk, read_all
from stepwire_server.durability.manifest import damaged

__all__ = ["ELEMENT_BYTES", "PAGE_BYTES", "Place", "encode_header", "places", "read_header"]

PAGE_BYTES: Final = 4096
"""The alignment that direct writes need, of memory and of the file."""

ELEMENT_BYTES: Final = 4

_LENGTH: Final = struct.Struct("<Q")
# A session has a handful of slots. The format itself allows 100 MB.
_MOST_HEADER_BYTES: Final = 1 << 20
_MOST_OFFSET: Final = 2**63 - 1


class Place(NamedTuple):
    """The place of an array in the file.

    Attributes:
        offset: the first byte, counted from the start of the file.
        elements: the number of elements.
    """

    offset: int
    elements: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.elements * ELEMENT_BYTES


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Literal["F32"]
    shape: tuple[int]
    data_offsets: tuple[int, int]


def encode_header(slots: Mapping[str, int]) -> bytes:
    """Return the head of a body with one array a slot, one after another.

    Args:
        slots: the number of elements of each.
    """
    entries: dict[str, object] = {}
    end = 0
    for name, elements in slots.items():
        start, end = end, end + elements * ELEMENT_BYTES
        entries[name] = {"dtype": "F32", "shape": [elements], "data_offsets": [start, end]}
    text = json.dumps(entries).encode("ascii")
    text += b" " * (-(len(text) + _LENGTH.size) % PAGE_BYTES)
    if len(text) > _MOST_HEADER_BYTES:
        raise ValueError(f"the names of {len(slots)} slots take {len(text)} bytes, more than {_MOST_HEADER_BYTES}")
    return _LENGTH.pack(len(text)) + text


def places(slots: Mapping[str, int], header_bytes: int) -> dict[str, Place]:
    """Return the place of each array behind a head of `header_bytes` in all."""
    found: dict[str, Place] = {}
    offset = header_bytes
    for name, elements in slots.items():
        found[name] = Place(offset, elements)
        offset = found[name].end
    return found


def read_header(disk: Disk, descriptor: int, path: pathlib.Path) -> dict[str, Place]:
    """Read and check the head of a body.

    Returns:
        The place of each array, in the order of the file; together they are the whole file.

    Raises:
        DataLossError: this is no body that `encode_header` began.
        OSError: the disk failed.
    """
    file_bytes = disk.size(descriptor)
    (length,) = _LENGTH.unpack(_read(disk, descriptor, path, (0, _LENGTH.size)))
    if length > min(_MOST_HEADER_BYTES, file_bytes - _LENGTH.size):
        raise damaged(path, "header", f"it has {length} bytes, in a file of {file_bytes}")
    start = _LENGTH.size + length
    if start % PAGE_BYTES:
        raise damaged(path, "header", f"the data begin at byte {start}, which is no multiple of {PAGE_BYTES}")
    entries = _parse(_read(disk, descriptor, path, (_LENGTH.size, length)), path)
    found: dict[str, Place] = {}
    for name, entry in entries.items():
        found[name] = _checked(name, entry, start, path)
    end = start
    for name, place in sorted(found.items(), key=lambda item: (item[1].offset, item[1].end)):
        if place.offset != end:
            raise damaged(path, name, f"its data begin at byte {place.offset}, and the ones before end at {end}")
        end = place.end
    if end != file_bytes:
        raise damaged(path, "header", f"the arrays end at byte {end}, and the file at {file_bytes}")
    return found


def _parse(text: bytes, path: pathlib.Path) -> dict[str, _Entry]:
    if not text.startswith(b"{"):
        raise damaged(path, "header", "it does not begin with {")
    try:
        return msgspec.json.decode(text, type=dict[str, _Entry])
    except (ValueError, RecursionError) as error:
        raise damaged(path, "header", str(error)[:200]) from None


def _checked(name: str, entry: _Entry, start: int, path: pathlib.Path) -> Place:
    (elements,), (first, last) = entry.shape, entry.data_offsets
    if not 0 <= first <= last <= _MOST_OFFSET or elements < 0 or last - first != elements * ELEMENT_BYTES:
        raise damaged(path, name, f"shape [{elements}] and data_offsets [{first}, {last}] do not fit float32")
    return Place(start + first, elements)


def _read(disk: Disk, descriptor: int, path: pathlib.Path, part: tuple[int, int]) -> bytes:
    offset, nbytes = part
    out = memoryview(bytearray(nbytes))
    if (count := read_all(disk, descriptor, out, offset)) != nbytes:
        raise damaged(path, "header", f"the file ends at byte {offset + count}, within its header")
    return bytes(out)
