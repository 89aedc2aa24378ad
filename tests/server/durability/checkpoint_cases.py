"""Checkpoints for tests: values with every kind of float, manifests, and disks that fail."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.manifest import Manifest
from stepwire_server.rules.loss_scale import LossScale

Values = dict[str, npt.NDArray[np.float32]]

# NaN quiet, signalling and with a payload, infinities, zeros of both signs, subnormals, the extremes.
SPECIAL = np.array(
    [
        0x7FC00000,
        0x7F800001,
        0xFFC12345,
        0x7F800000,
        0xFF800000,
        0x00000000,
        0x80000000,
        0x00000001,
        0x807FFFFF,
        0x00800000,
        0x7F7FFFFF,
        0xFF7FFFFF,
    ],
    np.uint32,
).view(np.float32)


def make_values(slots: Mapping[str, int], seed: int = 0) -> Values:
    """Make random values, with the special ones among them."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, elements in slots.items():
        array = rng.standard_normal(elements, np.float32)
        count = min(elements, len(SPECIAL))
        array[rng.permutation(elements)[:count]] = SPECIAL[:count]
        values[name] = array
    return values


def bits(values: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, bytes]:
    """Return arrays as what may be compared: NaN equals itself, and -0 is not 0."""
    return {name: array.tobytes() for name, array in values.items()}


def make_manifest(step: int = 7, load: int = 1, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "session_id": "0123456789abcdef",
        "name": "to be filled in",
        "created": f"2026-11-30T07:00:{step:02d}Z",
        "epoch": 3,
        "step": step,
        "load": load,
        "ready": True,
        "tensor_steps": (step, 0, 2**62),
        "tensor_scalars": (0.1, -0.0, 5e-324),
        "loss_scale": LossScale(65536.0, 12),
        "generation": 5,
        "acquired": 4,
        "replied": step,
        "last_result": b"\x00\xff result",
        "config": {"optimizer": {"lr": 0.1, "betas": [0.9, 0.999]}, "label": "größe"},
    }
    return Manifest(**{**fields, **changes})


def write_checkpoint(store: CheckpointStore, name: str, values: Values, manifest: Manifest) -> Manifest:
    writer = store.begin(name, {slot: len(array) for slot, array in values.items()})
    try:
        for slot, array in values.items():
            writer.write(slot, 0, array)
    except BaseException:
        writer.abort()
        raise
    return writer.commit(manifest)


def read_checkpoint(store: CheckpointStore, name: str) -> tuple[Manifest, Values]:
    with store.open(name) as checkpoint:
        values = {slot: np.empty(elements, np.float32) for slot, elements in checkpoint.body.slots.items()}
        for slot, out in values.items():
            checkpoint.body.read(slot, 0, out)
        return checkpoint.manifest, values


def open_files() -> list[str]:
    """Return the paths of the files and folders that this process has open: a store opens nothing else.

    Servers of other tests in this process read of it in `/proc`.
    """
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, which is closed
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(link for link in links if link.startswith("/") and not link.startswith(("/dev/", "/proc/")))


class FailingDisk(Disk):
    """Fails at one call, or from that call on.

    Attributes:
        calls: the calls so far, by name.
    """

    def __init__(self, at: int, number: int = errno.EIO, *, lasting: bool = False, afterwards: bool = False) -> None:
        """Fail at call `at`, counted from 0, with an error number; `afterwards` does the call first."""
        self.calls: list[str] = []
        self._at = at
        self._number = number
        self._lasting = lasting
        self._afterwards = afterwards

    def _count(self) -> bool:
        count = len(self.calls) - 1
        return count == self._at or (self._lasting and count > self._at)

    def _error(self) -> OSError:
        return OSError(self._number, os.strerror(self._number))


def _failing(name: str) -> Any:
    def call(self: FailingDisk, *args: Any) -> Any:
        self.calls.append(name)
        failed = self._count()
        # A descriptor is closed even where closing it fails; a file that failed to open has none.
        done = not failed or name == "close" or (self._afterwards and name != "open")
        result = getattr(Disk, name)(self, *args) if done else None
        if failed:
            raise self._error()
        return result

    return call


for _name in [name for name in vars(Disk) if not name.startswith("_")]:
    setattr(FailingDisk, _name, _failing(_name))


class ShortDisk(Disk):
    """Writes and reads a part of what it is asked for."""

    def __init__(self, most: int) -> None:
        """Move at most so many bytes a call."""
        self._most = most

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().write(descriptor, data[: self._most], offset)

    def read(self, descriptor: int, out: memoryview, offset: int) -> int:
        return super().read(descriptor, out[: self._most], offset)


class DirectDisk(Disk):
    """Has O_DIRECT wherever it runs: checks what that asks for, or refuses it as some file systems do.

    Attributes:
        direct_bytes: the bytes that were written past the page cache.
        other_writes: the numbers of bytes of the other writes.
    """

    def __init__(self, *, at_open: bool = True, most: int | None = None) -> None:
        """Refuse at the opening of a file, or once `most` bytes of a file were written."""
        self._at_open = at_open
        self._most = most
        self._direct: set[int] = set()
        self.direct_bytes = 0
        self.other_writes: list[int] = []

    def open(self, path: pathlib.Path, flags: int) -> int:
        if not flags & os.O_DIRECT:
            return super().open(path, flags)
        if not self._at_open:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        descriptor = super().open(path, flags & ~os.O_DIRECT)
        self._direct.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        self._direct.discard(descriptor)
        super().close(descriptor)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor not in self._direct:
            self.other_writes.append(data.nbytes)
            return super().write(descriptor, data, offset)
        address = np.frombuffer(data, np.uint8).ctypes.data
        if address % 4096 or offset % 4096 or data.nbytes % 4096:
            raise OSError(errno.EFAULT, "not aligned")
        if self._most is not None and self.direct_bytes + data.nbytes > self._most:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        self.direct_bytes += data.nbytes
        return super().write(descriptor, data, offset)
