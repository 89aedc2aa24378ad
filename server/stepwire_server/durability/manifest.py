"""The manifest of a checkpoint: its numbers, and the facts that its arrays are checked by.

It is JSON text with sorted keys, ASCII alone. JSON has no infinities and no NaN, so these are the strings `"inf"`,
`"-inf"` and `"nan"`; every other float is written so that it comes back bit for bit. The field `crc32c` is the CRC32C
of the same text without that field.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import google_crc32c
import msgspec
import numpy as np

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.disk import Disk, read_all, write_all
from stepwire_server.rules.loss_scale import LossScale

__all__ = [
    "LARGEST_BLOCK_ELEMENTS",
    "ArrayFacts",
    "Manifest",
    "MemberFacts",
    "Shadow",
    "damaged",
    "decode_manifest",
    "encode_manifest",
    "read_manifest",
    "write_manifest",
]

LARGEST_BLOCK_ELEMENTS: Final = 1 << 24
"""A reader holds one block in memory, so a manifest cannot make it hold more than this."""

_MOST_BYTES: Final = 256 << 20
_EVERY: Final = "*"
# The fields that may hold a float that JSON does not have.
_FLOATS: Final = (
    ("sum_bound",),
    ("tensor_scalars", _EVERY),
    ("loss_scale", 0),
    ("arrays", _EVERY, "norm"),
    ("shadow", "update_norm"),
)
_WORDS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Checksum = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class ArrayFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The facts of one array.

    Attributes:
        elements: the number of elements.
        norm: the Euclidean norm, of all elements.
        block_elements: the number of elements that one checksum is of; the last block may be shorter.
        crc32c: the CRC32C of each block's bytes.
    """

    elements: _Count
    norm: float
    block_elements: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BLOCK_ELEMENTS)]
    crc32c: tuple[_Checksum, ...]

    @property
    def digest(self) -> str:
        """The CRC32C of all checksums, in hexadecimal digits: arrays with the same digest are the same."""
        return f"{google_crc32c.value(np.array(self.crc32c, '<u4').view(np.uint8)):08x}"


class Shadow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step that the state would make, on a range of its elements.

    Attributes:
        start: the first flat element of the range.
        elements: the number of elements.
        update_norm: the norm of the parameters' change.
    """

    start: _Count
    elements: _Count
    update_norm: float


class MemberFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The facts of one worker of several.

    Attributes:
        worker: the index of the worker.
        contribution: the number of its last contribution that was answered.
        generation: the number of its last hold.
        acquired: the generation in which the client of that hold took the worker from another one.
        last_result: the result of that contribution, encoded; None for none.
        load: the session's last load when it was answered; None for that of the checkpoint, and of older servers.
        loaded: the last load that the worker committed; 0 for none, and of older servers.
    """

    worker: _Count
    contribution: _Count
    generation: _Count
    acquired: _Count
    last_result: bytes | None = None
    load: _Count | None = None
    loaded: _Count = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description of one checkpoint.

    Attributes:
        format: the version of the format.
        session_id: the session's id.
        name: the checkpoint's name.
        created: the time of its creation, ISO 8601.
        epoch: the epoch of the server that wrote it.
        step: the last committed step.
        load: the last committed load.
        ready: parameters had been loaded or initialised.
        tensor_steps: updates each tensor has had, in layout order.
        tensor_scalars: the scalar that the rule keeps for each tensor; empty where it keeps none.
        loss_scale: the state of loss scaling; None without it.
        sum_bound: no element of the accumulated gradient is larger in magnitude; may be infinite.
        generation: the number of the worker's last hold.
        acquired: the generation in which the client of that hold took the worker from another one; of several workers,
            the sum of theirs.
        replied: the step whose reply has the present parameters; None for none.
        last_result: the last step's result, encoded; None for none.
        config: the session's config, as JSON.
        arrays: the facts of each slot.
        shadow: a step that the state would make; None for rules that have none, and of older servers.
        members: the workers of a session with several; empty for one.
    """

    session_id: str
    name: str
    created: str
    epoch: _Count
    step: _Count
    load: _Count
    ready: bool
    tensor_steps: tuple[_Count, ...]
    generation: _Count
    acquired: _Count
    tensor_scalars: tuple[float, ...] = ()
    loss_scale: LossScale | None = None
    sum_bound: float = 0.0
    replied: _Count | None = None
    last_result: bytes | None = None
    config: dict[str, Any] = {}
    arrays: dict[str, ArrayFacts] = {}
    shadow: Shadow | None = None
    members: tuple[MemberFacts, ...] = ()
    format: Literal[1] = 1


def damaged(path: pathlib.Path, field: str, problem: str) -> DataLossError:
    """Return the error of a checkpoint's file that failed its check.

    Args:
        path: the file; its folder and its own name are told.
        field: the part of the file that failed.
        problem: the rest of the sentence.

    Returns:
        The error, with file and field in its metadata.
    """
    file = f"{path.parent.name}/{path.name}"
    return DataLossError(
        f"checkpoint file {file}: {field}: {problem}; use another checkpoint, or bring this one back from a copy",
        reason=Reason.CHECKPOINT_DAMAGED,
        metadata={"file": file, "field": field},
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the text of a manifest.

    Raises:
        ValueError: the config holds a float that JSON does not have.
    """
    tree = {key: _change(value, (key,), _to_word) for key, value in msgspec.to_builtins(manifest).items()}
    return _text({**tree, "crc32c": _checksum(tree)})


def decode_manifest(text: bytes, path: pathlib.Path) -> Manifest:
    """Read the text of a manifest.

    Args:
        text: the whole file.
        path: the file, for errors.

    Raises:
        DataLossError: the text is not a manifest that `encode_manifest` wrote.
    """
    tree = _parse(text, path)
    if tree.get("format") != 1:
        raise damaged(path, "format", f"{str(tree.get('format'))[:32]!r} is not 1, the one that this server reads")
    stored = tree.pop("crc32c", None)
    try:
        actual = _checksum(tree)
    except (ValueError, RecursionError):  # a number beyond float64, which no manifest has
        raise damaged(path, "crc32c", "the text holds what no manifest holds") from None
    if type(stored) is not int or stored != actual:
        raise damaged(path, "crc32c", f"the checksum is {str(stored)[:32]} and the text has {actual}")
    try:
        changed = {key: _change(value, (key,), _from_word) for key, value in tree.items()}
        manifest = msgspec.convert(changed, Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        problem, _, field = str(error).partition(" - at `")
        raise damaged(path, field.strip("`$.") or "manifest", problem[:200]) from None
    for slot, facts in manifest.arrays.items():
        blocks = -(-facts.elements // facts.block_elements)
        if len(facts.crc32c) != blocks:
            raise damaged(path, f"arrays.{slot}.crc32c", f"{len(facts.crc32c)} checksums for {blocks} blocks")
    return manifest


def read_manifest(disk: Disk, path: pathlib.Path) -> tuple[Manifest, int]:
    """Read a manifest, and the bytes of its file.

    Raises:
        DataLossError: it is damaged.
        OSError: the disk failed, or there is no such file.
    """
    descriptor = disk.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        nbytes = disk.size(descriptor)
        if nbytes > _MOST_BYTES:
            raise damaged(path, "manifest", f"{nbytes} bytes are more than {_MOST_BYTES}")
        text = memoryview(bytearray(nbytes))
        if (count := read_all(disk, descriptor, text, 0)) != nbytes:
            raise damaged(path, "manifest", f"the file ends after {count} of {nbytes} bytes")
    finally:
        disk.close(descriptor)
    return decode_manifest(bytes(text), path), nbytes


def write_manifest(disk: Disk, path: pathlib.Path, manifest: Manifest) -> None:
    """Write a manifest into a new file, and wait until it has reached the disk.

    Raises:
        OSError: the disk failed; the file may be there in part.
        ValueError: as `encode_manifest`.
    """
    text = encode_manifest(manifest)
    descriptor = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(disk, descriptor, memoryview(text), 0)
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def _parse(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    try:
        tree = json.loads(text.decode("ascii"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "manifest", f"this is no JSON: {str(error)[:100]}") from None
    if not isinstance(tree, dict):
        raise damaged(path, "manifest", f"this is a {type(tree).__name__} in the place of an object")
    return tree


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _text(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def _checksum(tree: dict[str, Any]) -> int:
    return int(google_crc32c.value(np.frombuffer(_text(tree), np.uint8)))


def _change(tree: Any, path: tuple[object, ...], change: Callable[[Any], Any]) -> Any:
    """Return the value of a top-level field, `path[0]`, with its possible non-finite floats changed."""
    for floats in _FLOATS:
        if floats[0] == path[0]:
            return _at(tree, floats[1:], change)
    return tree


def _at(tree: Any, path: tuple[object, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(tree)
    if isinstance(tree, dict):
        return {key: _at(value, path[1:], change) if path[0] in (key, _EVERY) else value for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [
            _at(value, path[1:], change) if path[0] in (index, _EVERY) else value for index, value in enumerate(tree)
        ]
    return tree


def _to_word(value: Any) -> Any:
    """Spell a float that JSON does not have."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else str(value)


def _from_word(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value
