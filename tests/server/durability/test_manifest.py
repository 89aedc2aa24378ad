"""Manifests: every number comes back, and text that was not written by us is refused by file and field."""

from __future__ import annotations

import json
import math
import pathlib
import random
import struct
import tracemalloc
from typing import Any

import google_crc32c
import msgspec
import pytest

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import (
    ArrayFacts,
    Manifest,
    decode_manifest,
    encode_manifest,
    read_manifest,
)
from stepwire_server.rules.loss_scale import LossScale
from tests.server.durability.checkpoint_cases import make_manifest

PATH = pathlib.Path("auto-1/manifest.json")
FLOATS = (0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1 / 3, 2.0**-1022)


def full() -> Manifest:
    facts = ArrayFacts(2500, math.nan, 1000, (0, 1, 2**32 - 1))
    return make_manifest(
        tensor_scalars=FLOATS,
        sum_bound=math.inf,
        loss_scale=LossScale(math.inf, 3),
        arrays={"param": facts, "exp_avg": ArrayFacts(0, -0.0, 1, ())},
    )


def floats_of(manifest: Manifest) -> list[bytes]:
    """Return all floats by their bits."""
    scale = () if manifest.loss_scale is None else (manifest.loss_scale.scale,)
    norms = [facts.norm for _, facts in sorted(manifest.arrays.items())]
    return [struct.pack("<d", value) for value in (*manifest.tensor_scalars, manifest.sum_bound, *scale, *norms)]


def without_floats(manifest: Manifest) -> Manifest:
    arrays = {name: msgspec.structs.replace(facts, norm=0.0) for name, facts in manifest.arrays.items()}
    return msgspec.structs.replace(manifest, tensor_scalars=(), sum_bound=0.0, arrays=arrays)


def same(one: Manifest, other: Manifest) -> bool:
    return floats_of(one) == floats_of(other) and without_floats(one) == without_floats(other)


def signed(tree: dict[str, Any]) -> bytes:
    """Give a tree the checksum that a manifest of it would have."""
    text = json.dumps(tree, sort_keys=True, indent=1) + "\n"
    return json.dumps({**tree, "crc32c": google_crc32c.value(text.encode())}, sort_keys=True, indent=1).encode()


def tree_of(manifest: Manifest) -> dict[str, Any]:
    tree = json.loads(encode_manifest(manifest))
    del tree["crc32c"]
    return dict(tree)


def facts(elements: int, block_elements: int, checksums: list[int]) -> dict[str, Any]:
    array = {"elements": elements, "norm": 0.0, "block_elements": block_elements, "crc32c": checksums}
    return {"arrays": {"param": array}}


@pytest.mark.parametrize(
    "manifest",
    [full(), make_manifest(), make_manifest(loss_scale=None, replied=None, last_result=None, config={}, ready=False)],
    ids=["full", "usual", "bare"],
)
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    decoded = decode_manifest(encode_manifest(manifest), PATH)
    assert same(decoded, manifest)
    assert (decoded.last_result, decoded.loss_scale) == (manifest.last_result, manifest.loss_scale)
    assert encode_manifest(decoded) == encode_manifest(manifest)


def test_the_text_is_json_for_everybody() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = encode_manifest(full())
    tree = json.loads(text, parse_constant=refuse)
    assert list(tree) == sorted(tree)
    assert tree["tensor_scalars"] == [
        0.1,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        "inf",
        "-inf",
        "nan",
        1 / 3,
        2.0**-1022,
    ]
    assert (tree["sum_bound"], tree["loss_scale"], tree["arrays"]["param"]["norm"]) == ("inf", ["inf", 3], "nan")
    assert (tree["last_result"], tree["format"]) == ("AP8gcmVzdWx0", 1)
    assert text == signed(tree_of(full())) + b"\n"


def test_a_config_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_manifest(make_manifest(config={"lr": math.inf}))


def test_every_flip_and_cut_is_found_or_harmless() -> None:
    manifest = full()
    pristine = encode_manifest(manifest)
    rng = random.Random(11)
    refused = 0
    for number in range(600):
        text = bytearray(pristine)
        if number % 6 == 0:
            del text[rng.randrange(len(text)) :]
        for _ in range(rng.choice([1, 1, 2, 8])):
            if text:
                text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        try:
            decoded = decode_manifest(bytes(text), PATH)
        except DataLossError as error:
            refused += 1
            assert error.reason is Reason.CHECKPOINT_DAMAGED
            assert error.metadata["file"] == "auto-1/manifest.json"
        else:
            assert same(decoded, manifest)
    assert refused > 500


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"step": -1}, "step"),
        ({"step": "7"}, "step"),
        ({"step": 2**63}, "step"),
        ({"ready": 1}, "ready"),
        ({"tensor_steps": [1, None]}, "tensor_steps[1]"),
        ({"tensor_scalars": [1.0, "infinite"]}, "tensor_scalars[1]"),
        ({"sum_bound": "nothing"}, "sum_bound"),
        ({"sum_bound": []}, "sum_bound"),
        ({"loss_scale": [1.0, 2, 3]}, "loss_scale"),
        ({"last_result": "no base 64"}, "last_result"),
        ({"config": []}, "config"),
        ({"surprise": 1}, "manifest"),
        ({"format": 2}, "format"),
        ({"format": None}, "format"),
        (facts(5, 2, [1, 2]), "arrays.param.crc32c"),
        (facts(5, 0, []), "arrays[...].block_elements"),
        (facts(1, 1 << 30, [1]), "arrays[...].block_elements"),
        (facts(1, 1, [2**32]), "arrays[...].crc32c[0]"),
        ({"arrays": 5}, "arrays"),
    ],
)
def test_a_wrong_field_is_named_though_the_checksum_is_right(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(DataLossError) as refused:
        decode_manifest(signed({**tree_of(full()), **changes}), PATH)
    assert refused.value.metadata == {"file": "auto-1/manifest.json", "field": field}


def test_a_missing_field_is_damage() -> None:
    tree = tree_of(full())
    del tree["epoch"]
    with pytest.raises(DataLossError, match="missing required field `epoch`"):
        decode_manifest(signed(tree), PATH)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "crc32c": true}',
        b'{"format": 1, "crc32c": 0, "x": NaN}',
        b'{"format": 1, "crc32c": 0, "x": 1e999}',
        b'{"format": 1, "crc32c": 0, "x": ' + b"9" * 10_000 + b"}",
        b'{"format": 1, "crc32c": 0, "config": ' + b"[" * 300_000,
        b'{"format": 1, "crc32c": 0, "config": ' + b"[" * 900 + b"]" * 900 + b"}",
        '{"format": 1, "größe": 2}'.encode(),
        b"\xff\xfe" + '{"format": 1}'.encode("utf-16-le"),
        b"\x00" * 4096,
    ],
)
def test_hostile_text_is_refused(text: bytes) -> None:
    with pytest.raises(DataLossError) as refused:
        decode_manifest(text, PATH)
    assert refused.value.reason is Reason.CHECKPOINT_DAMAGED


def test_a_huge_file_is_not_read(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate((256 << 20) + 1)
    tracemalloc.start()
    try:
        with pytest.raises(DataLossError, match="268435457 bytes are more than 268435456"):
            read_manifest(Disk(), tmp_path / "manifest.json")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
