"""The resources that the sessions of one GPU have in common, and results of several parts. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from stepwire_server.engines.cuda.bus import Bus
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.gradient import GradientCache
from stepwire_server.engines.cuda.kernels import CudaKernels
from stepwire_server.engines.cuda.sums import Cells
from stepwire_server.engines.protocol import Pending

__all__ = ["CudaResources", "Together"]

Part = TypeVar("Part")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class CudaResources:
    """One device with everything that is set up once.

    Attributes:
        device: the memory and the streams.
        kernels: the compiled code.
        bus: the way to the device and back.
        cells: the room for sums.
        gradients: the memory of gradients.
        tables: the tables of 8-bit moments, on the device.
    """

    device: CudaDevice
    kernels: CudaKernels
    bus: Bus
    cells: Cells
    gradients: GradientCache
    tables: Any

    @property
    def tables_address(self) -> int:
        """The address of the tables, as an argument of kernels."""
        address: int = self.tables.data.ptr
        return address

    @property
    def working_bytes(self) -> int:
        """The device memory held besides sessions and gradients, at most; kept memory of gradients counts as free."""
        return self.bus.device_bytes + int(self.tables.nbytes)


class Together(Generic[Part, Value]):
    """Several pending parts of one result; see `Pending`."""

    def __init__(self, parts: Sequence[Pending[Part]], combine: Callable[[list[Part]], Value]) -> None:
        """Make the result of all parts with `combine`."""
        self._resources = parts
        self._combine = combine

    def wait(self) -> Value:
        """See `Pending`; nothing is on its way afterwards, even after an error."""
        with contextlib.ExitStack() as others:
            for part in reversed(self._resources):
                others.callback(part.wait)
        return self._combine([part.wait() for part in self._resources])
