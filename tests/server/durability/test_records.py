"""The bytes of the log: the layout of the design page, its checksums, its bounds."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
import pytest

from stepwire_server.durability import records
from stepwire_server.durability.records import Header, Kind, LogPosition, Record, SegmentHead

HEADER = Header(Kind.COMMIT, bytes(range(16)), 7, 11, 513, 9, 4, True, 3, 0xDEADBEEF)
HEAD = SegmentHead(3, 2, 0xABCD, 17, 5, LogPosition(2, 99))


def encoded(header: Header) -> bytearray:
    out = bytearray(100)
    records.encode_header(memoryview(out), header)
    assert out[80:] == bytes(20)
    return out[:80]


def resealed(raw: bytearray) -> bytearray:
    raw[4:8] = struct.pack("<I", google_crc32c.value(bytes(raw[8:])))
    return raw


def test_a_header_lies_as_the_design_says() -> None:
    raw = bytes(encoded(HEADER))
    assert raw[:4] == b"SWR1"
    assert raw[4:8] == struct.pack("<I", google_crc32c.value(raw[8:]))
    assert raw[8:32] == struct.pack("<HHIQQ", 3, 1, 11, 513, 7)
    assert raw[32:48] == struct.pack("<QQ", 9, 4)
    assert raw[48:64] == bytes(range(16))
    assert raw[64:80] == struct.pack("<QII", 3, 0xDEADBEEF, 0)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", Kind)
def test_a_header_comes_back(kind: Kind, last: bool) -> None:
    header = HEADER._replace(kind=kind, last=last)
    assert records.decode_header(encoded(header)) == header


def test_no_flipped_bit_of_a_header_is_believed() -> None:
    good = encoded(HEADER)
    for bit in range(640):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        assert records.decode_header(raw) is None


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (8, struct.pack("<H", 0)),
        (8, struct.pack("<H", 8)),
        (10, struct.pack("<H", 2)),
        (12, struct.pack("<I", records.MOST_META_BYTES + 1)),
        (16, struct.pack("<Q", records.MOST_PAYLOAD_BYTES + 1)),
        (76, b"\1"),
    ],
)
def test_a_sealed_header_with_impossible_values_is_not_believed(offset: int, value: bytes) -> None:
    raw = encoded(HEADER)
    raw[offset : offset + len(value)] = value
    assert records.decode_header(resealed(raw)) is None


def test_a_short_header_is_none() -> None:
    assert records.decode_header(encoded(HEADER)[:79]) is None
    assert records.decode_header(b"") is None


def test_a_head_comes_back_and_no_flipped_bit_is_believed() -> None:
    good = records.encode_head(HEAD)
    assert (len(good), good[:4]) == (512, b"SWS1")
    assert good[4:8] == struct.pack("<I", google_crc32c.value(good[8:]))
    assert records.decode_head(good) == HEAD
    for bit in range(4096):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        assert records.decode_head(bytes(raw)) is None
    assert records.decode_head(good[:511]) is None


@pytest.mark.parametrize(
    ("meta", "payload", "nbytes"), [(0, 0, 512), (432, 0, 512), (432, 1, 1024), (0, 944, 1024), (5, 10**6, 1000448)]
)
def test_a_record_ends_at_a_multiple_of_512(meta: int, payload: int, nbytes: int) -> None:
    assert records.record_bytes(meta, payload) == nbytes


@pytest.mark.parametrize(
    "data", [b"abc" * 10**6, bytearray(b"abc"), memoryview(b"xabc")[1:], np.arange(9, dtype=np.uint8), b""]
)
def test_a_chain_continues_over_all_kinds_of_bytes(data: records.Bytes) -> None:
    assert records.chained(records.chained(0, b"before"), data) == google_crc32c.value(b"before" + bytes(data))


@pytest.mark.parametrize(
    "record",
    [
        Record(Kind.HOLD, b"short", 1),
        Record(Kind.HOLD, bytes(16), 1, bytes(records.MOST_META_BYTES + 1)),
    ],
)
def test_a_record_that_no_reader_would_believe_is_refused(record: Record) -> None:
    with pytest.raises(ValueError, match="at most"):
        records.require_writable(record)
