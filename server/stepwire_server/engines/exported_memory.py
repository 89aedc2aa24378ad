"""Memory of a device that another process opens."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

__all__ = ["ExportedMemory"]


class ExportedMemory(Protocol):
    """Zeroed memory of a device that one other process can open, and nothing of which is state."""

    @property
    def handle(self) -> bytes:
        """The 64 bytes by which the other process opens the memory."""
        ...

    @property
    def device_uuid(self) -> bytes:
        """The 16 bytes of the device's UUID."""
        ...

    def array(self, offset: int, dtype: np.dtype[Any], items: int) -> Any:
        """Return items of a wire dtype from byte `offset` on, `(items,)`, for `GradientBuffer.put` and for replies.

        A reply is there for the other process once the wait, or `settle`, has ended.
        """
        ...

    def read(self, offset: int, nbytes: int) -> bytes:
        """Copy some bytes to the host."""
        ...

    def close(self) -> None:
        """Zero it and give it back. Closing twice is harmless; the other process must have closed it before."""
        ...
