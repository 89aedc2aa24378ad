"""Bodies: any order of blocks makes the same file, another reader reads it, and no damage passes."""

from __future__ import annotations

import json
import math
import pathlib
import random
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.body import BLOCK_ELEMENTS, BodyReader, BodyWriter
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import ArrayFacts
from tests.server.durability.checkpoint_cases import (
    SPECIAL,
    DirectDisk,
    ShortDisk,
    Values,
    bits,
    make_values,
    open_files,
)

# Slots that begin and end within pages, in blocks that do too.
SLOTS = {"param": 5000, "exp_avg": 2999, "exp_avg_scale": 1, "empty": 0, "sum": 1024}
BLOCK = 1500


def write_body(
    path: pathlib.Path, values: Values, *, disk: Disk | None = None, block: int = BLOCK, seed: int | None = None
) -> dict[str, ArrayFacts]:
    """Write a body, block for block in a random order where there is a seed."""
    writer = BodyWriter(
        disk or Disk(), path, {name: len(array) for name, array in values.items()}, block_elements=block
    )
    ranges = [(name, start) for name, array in values.items() for start in range(0, len(array), block)]
    if seed is not None:
        random.Random(seed).shuffle(ranges)
    for name, start in ranges:
        writer.write(name, start, values[name][start : start + block])
    return writer.finish()


def read_body(path: pathlib.Path, facts: dict[str, ArrayFacts], disk: Disk | None = None) -> Values:
    with BodyReader(disk or Disk(), path, facts) as reader:
        values = {name: np.full(elements, 7, np.float32) for name, elements in reader.slots.items()}
        for name, out in values.items():
            reader.read(name, 0, out)
        return values


def crc32c(data: bytes) -> int:
    """Compute a CRC32C bit for bit, by its polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_values_come_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    before = open_files()
    values = make_values(SLOTS)
    facts = write_body(tmp_path / "body", values)
    assert bits(read_body(tmp_path / "body", facts)) == bits(values)
    assert set(values["param"].view(np.uint32)) >= set(SPECIAL.view(np.uint32))
    assert open_files() == before


def test_blocks_of_the_usual_size(tmp_path: pathlib.Path) -> None:
    values = make_values({"param": 2 * BLOCK_ELEMENTS + 777, "exp_avg": BLOCK_ELEMENTS})
    writer = BodyWriter(Disk(), tmp_path / "body", {name: len(array) for name, array in values.items()})
    writer.write("exp_avg", 0, values["exp_avg"])
    writer.write("param", BLOCK_ELEMENTS, values["param"][BLOCK_ELEMENTS:])  # a block, and the rest
    writer.write("param", 0, values["param"][:BLOCK_ELEMENTS])
    facts = writer.finish()
    assert {name: (fact.block_elements, len(fact.crc32c)) for name, fact in facts.items()} == {
        "param": (1 << 20, 3),
        "exp_avg": (1 << 20, 1),
    }
    assert bits(read_body(tmp_path / "body", facts)) == bits(values)


def test_any_order_makes_the_same_file_and_facts(tmp_path: pathlib.Path) -> None:
    values = make_values(SLOTS)
    finite = {name: np.nan_to_num(array, posinf=1, neginf=2) for name, array in values.items()}
    facts = write_body(tmp_path / "first", finite)
    for seed in range(10):
        assert write_body(tmp_path / str(seed), finite, seed=seed) == facts
        assert (tmp_path / str(seed)).read_bytes() == (tmp_path / "first").read_bytes()


def test_facts_are_those_of_the_bytes(tmp_path: pathlib.Path) -> None:
    values = {"param": make_values({"param": 700}, 3)["param"]}
    values["param"][~np.isfinite(values["param"]) | (np.abs(values["param"]) > 1e30)] = 0.5
    facts = write_body(tmp_path / "body", values, block=300)["param"]
    blocks = [values["param"][start : start + 300].tobytes() for start in (0, 300, 600)]
    assert facts.crc32c == tuple(map(crc32c, blocks))
    assert crc32c(b"123456789") == 0xE3069283
    assert facts.norm == pytest.approx(math.sqrt(math.fsum(float(x) ** 2 for x in values["param"])), rel=1e-14)


@pytest.mark.parametrize(
    ("special", "norm"), [(math.nan, math.nan), (-math.inf, math.inf), (3e38, 3e38), (1e-40, 1e-40)]
)
def test_a_norm_of_extremes(tmp_path: pathlib.Path, special: float, norm: float) -> None:
    facts = write_body(tmp_path / "body", {"param": np.array([0.0, special], np.float32)})
    assert facts["param"].norm == pytest.approx(norm, rel=1e-5, nan_ok=True)


def test_data_begin_at_a_page_and_have_no_holes(tmp_path: pathlib.Path) -> None:
    values = make_values(SLOTS)
    write_body(tmp_path / "body", values)
    data = (tmp_path / "body").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    assert list(header) == list(SLOTS)
    assert data[8 + length :] == b"".join(bits(values).values())
    assert header["exp_avg"] == {"dtype": "F32", "shape": [2999], "data_offsets": [20000, 31996]}


def test_the_official_package_reads_the_same(tmp_path: pathlib.Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    values = make_values(SLOTS)
    write_body(tmp_path / "body", values, seed=1)
    loaded = safetensors.load_file(tmp_path / "body")
    assert bits({name: loaded[name] for name in SLOTS}) == bits(values)
    assert {(array.dtype, array.ndim) for array in loaded.values()} == {(np.dtype(np.float32), 1)}


@pytest.mark.parametrize(("start", "end"), [(0, 5000), (1, 2), (1499, 1501), (1500, 3000), (100, 4999), (7, 7)])
def test_any_range_is_read(tmp_path: pathlib.Path, start: int, end: int) -> None:
    values = make_values(SLOTS)
    facts = write_body(tmp_path / "body", values)
    with BodyReader(Disk(), tmp_path / "body", facts) as reader:
        out = np.zeros(end - start, np.float32)
        for _ in range(2):
            reader.read("param", start, out)
            assert out.tobytes() == values["param"][start:end].tobytes()
        reader.read("exp_avg_scale", 0, out[:1])
        assert out[:1].tobytes() == (values["exp_avg_scale"] if len(out) else out).tobytes()


def test_whole_pages_go_past_the_cache(tmp_path: pathlib.Path) -> None:
    values = make_values({"param": 4096, "exp_avg": 4096})
    disk = DirectDisk()
    write_body(tmp_path / "body", values, disk=disk, block=1024, seed=2)
    assert (disk.direct_bytes, disk.other_writes) == (2 * 4 * 4096, [4096])  # beside them, the head alone


@pytest.mark.parametrize(
    "disk",
    [DirectDisk(), DirectDisk(at_open=False), DirectDisk(most=0), DirectDisk(most=8192), ShortDisk(1000), ShortDisk(1)],
    ids=["direct", "refused at open", "at the first write", "at a later write", "short writes", "bytes"],
)
def test_every_way_to_write_makes_the_same_file(tmp_path: pathlib.Path, disk: Disk) -> None:
    values = make_values(SLOTS)
    expected = write_body(tmp_path / "expected", values)
    facts = write_body(tmp_path / "body", values, disk=disk, seed=4)
    assert {name: fact.crc32c for name, fact in facts.items()} == {name: fact.crc32c for name, fact in expected.items()}
    assert (tmp_path / "body").read_bytes() == (tmp_path / "expected").read_bytes()
    assert bits(read_body(tmp_path / "body", facts, disk)) == bits(values)


@pytest.mark.parametrize(
    ("start", "count"), [(1, 1499), (0, 1499), (1500, 1), (4500, 499), (4500, 501), (-1500, 1500), (6000, 0)]
)
def test_ranges_are_whole_blocks(tmp_path: pathlib.Path, start: int, count: int) -> None:
    writer = BodyWriter(Disk(), tmp_path / "body", SLOTS, block_elements=BLOCK)
    with pytest.raises(ValueError, match="not made of whole blocks of 1500 in a slot of 5000"):
        writer.write("param", start, np.zeros(count, np.float32))
    writer.abort()


def test_each_block_is_written_once_and_none_is_missing(tmp_path: pathlib.Path) -> None:
    writer = BodyWriter(Disk(), tmp_path / "body", {"param": 4000}, block_elements=BLOCK)
    writer.write("param", 1500, np.zeros(1500, np.float32))
    with pytest.raises(ValueError, match="block 1 of slot 'param' was written before"):
        writer.write("param", 1500, np.zeros(2500, np.float32))
    writer.write("param", 0, np.zeros(1500, np.float32))
    with pytest.raises(ValueError, match="block 2 of slot 'param' was not written"):
        writer.finish()
    with pytest.raises(ValueError, match="float64"):
        writer.write("param", 3000, np.zeros(1000))  # type: ignore[arg-type]
    writer.abort()
    writer.abort()


def test_damage_is_told_by_array_and_block(tmp_path: pathlib.Path) -> None:
    values = make_values(SLOTS)
    facts = write_body(tmp_path / "body", values)
    pristine = bytearray((tmp_path / "body").read_bytes())
    rng = random.Random(5)
    for _ in range(100):
        element = rng.randrange(5000 + 2999)
        slot, index = ("param", element) if element < 5000 else ("exp_avg", element - 5000)
        damaged = pristine.copy()
        damaged[4096 + 4 * element + rng.randrange(4)] ^= 1 << rng.randrange(8)
        later = rng.randrange(4096 + 4 * element + 4, len(damaged))
        damaged[later] ^= 0x80
        (tmp_path / "body").write_bytes(damaged)
        with BodyReader(Disk(), tmp_path / "body", facts) as reader:
            with pytest.raises(DataLossError, match=f"block {index // BLOCK} has the checksum") as refused:
                reader.verify()
            assert refused.value.metadata == {"file": f"{tmp_path.name}/body", "field": slot}
            assert refused.value.reason is Reason.CHECKPOINT_DAMAGED
            with pytest.raises(DataLossError, match=f"block {index // BLOCK} has the checksum"):
                reader.read(slot, index, np.empty(1, np.float32))


def body(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Make a file by hand, its head a page long unless that does not do."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end], **changes}


FACTS = {"param": ArrayFacts(2, 0.0, 1, (0, 0))}
GOOD = entry(0, 8)
DEEP = b"[" * 300_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 8,
        b"\xff" * 5000,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 0),
        body({"param": GOOD}, b"\x00" * 8, length=100),
        body({"param": GOOD}, b"\x00" * 7),
        body({"param": GOOD}, b"\x00" * 9),
        body({"param": GOOD}, b"\x00" * 4096),
        body({"param": entry(4, 12)}, b"\x00" * 12),
        body({"param": GOOD, "other": entry(4, 12)}, b"\x00" * 12),
        body({"param": GOOD, "other": entry(0, 8)}, b"\x00" * 8),
        body({"param": GOOD, "other": entry(12, 16)}, b"\x00" * 16),
        body({"param": entry(0, 8, dtype="F64", shape=[1])}, b"\x00" * 8),
        body({"param": entry(0, 8, dtype="U32")}, b"\x00" * 8),
        body({"param": entry(0, 8, dtype=None)}, b"\x00" * 8),
        body({"param": entry(0, 8, shape=[3])}, b"\x00" * 8),
        body({"param": entry(0, 8, shape=[1, 2])}, b"\x00" * 8),
        body({"param": entry(0, 8, shape=[-2])}, b"\x00" * 8),
        body({"param": entry(0, 8, shape=[2.5])}, b"\x00" * 8),
        body({"param": entry(0, 8, data_offsets=[8, 0])}, b"\x00" * 8),
        body({"param": entry(0, 8, data_offsets=[-8, 0])}, b"\x00" * 8),
        body({"param": entry(0, 8, shape=[1 << 60], data_offsets=[0, 1 << 62])}, b"\x00" * 8),
        body({"param": entry(0, 8, shape=[1 << 100], data_offsets=[0, 1 << 102])}, b"\x00" * 8),
        body({"param": entry(0, 8, more=1)}, b"\x00" * 8),
        body({"param": {"dtype": "F32"}}, b"\x00" * 8),
        body({"other": GOOD}, b"\x00" * 8),
        body({"param": entry(0, 4)}, b"\x00" * 4),
        body({"param": GOOD, "__metadata__": {"format": "pt"}}, b"\x00" * 8),
        body([], b""),
        body(b"{", b""),
        body(b' {"param": 1}', b""),
        body(b"\xff\xfe{}", b""),
        body(DEEP),
        body(b'{"param":' + DEEP),
        body(b'{"param":{"dtype":"F32","shape":' + DEEP),
        body(b'{"param":' + b'{"a":' * 100_000),
    ],
)
def test_hostile_heads_are_refused_for_little_memory(tmp_path: pathlib.Path, data: bytes) -> None:
    (tmp_path / "body").write_bytes(data)
    before = open_files()
    tracemalloc.start()
    try:
        with pytest.raises(DataLossError, match="checkpoint file"):
            BodyReader(Disk(), tmp_path / "body", FACTS)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert open_files() == before


def test_a_long_head_is_refused_though_the_file_has_room_for_it(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "body").open("wb") as file:
        file.write(struct.pack("<Q", (96 << 20) - 8) + b"{")
        file.truncate(200 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(DataLossError, match="header: it has 100663288 bytes"):
            BodyReader(Disk(), tmp_path / "body", FACTS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_good_head_by_hand_is_read(tmp_path: pathlib.Path) -> None:
    """So the refusals above are of what differs from it."""
    (tmp_path / "body").write_bytes(body({"param": GOOD}, np.array([1, 2], np.float32).tobytes()))
    facts = {"param": ArrayFacts(2, 0.0, 1, tuple(crc32c(np.float32(x).tobytes()) for x in (1, 2)))}
    assert read_body(tmp_path / "body", facts)["param"].tolist() == [1.0, 2.0]
