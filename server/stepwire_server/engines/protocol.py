"""What a session asks of an engine: flat arrays, and one fused pass over a range of them.

An engine owns memory and kernels. It knows no session, no step number and no wire: it is handed element
ranges, a rule with its scalars, and a place for the encoded answer.

Dtypes that cross this border are the wire's: float32, bfloat16 (`ml_dtypes`) and float16. State is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stepwire_server.rules import Rule

__all__ = ["PARAM", "Device", "Engine", "EngineState", "Gradient", "HostArray"]

HostArray = npt.NDArray[Any]

PARAM = "param"
"""The slot of the master parameters; every other slot is named by the rule."""


class Device(NamedTuple):
    """One place where state can live.

    Attributes:
        name: `"cpu"` or `"cuda:0"`.
        description: the processor or GPU, in words.
        memory_bytes: its total memory.
    """

    name: str
    description: str
    memory_bytes: int


class Gradient(Protocol):
    """A staged chunk of gradient, held where the engine wants it. Opaque to everybody else."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The wire dtype."""
        ...

    def __len__(self) -> int:
        """Count the elements."""
        ...


class EngineState(Protocol):
    """The flat float32 arrays of one session. Not thread-safe: the session serialises its calls."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by the arrays."""
        ...

    def stage(self, payload: HostArray) -> Gradient:
        """Take a received 1-D chunk of any wire dtype, contiguous but perhaps unaligned.

        The CPU engine keeps the received bytes as they are, unaligned or not; a GPU engine copies them to
        the device. The payload must stay unchanged until the gradient is dropped.
        """
        ...

    def sum_of_squares(self, gradient: Gradient, begin: int, end: int) -> float:
        """Sum the squares of `gradient[begin:end]`, accumulated in float64.

        Squares of float32 cannot overflow float64, so the result is finite exactly if every element is.
        The order of additions is fixed: the same range gives the same bits on every engine and processor.
        """
        ...

    def update(
        self,
        rule: Rule,
        scalars: Sequence[float],
        start: int,
        gradient: Gradient,
        begin: int,
        end: int,
        out: HostArray | None,
    ) -> None:
        """Step the flat elements `[start, start + end - begin)` with `gradient[begin:end]`.

        Decode, rule and encode are one pass over memory.

        Args:
            rule: the formula; its slots are arrays of this state.
            scalars: `rule.scalars(...)`, float64 on the host, used as float32.
            start: first flat element.
            gradient: a chunk from `stage`.
            begin: first element within the chunk.
            end: one past the last element within the chunk.
            out: where the new parameters go, encoded in its dtype, `(end - begin,)`; None for no answer.
        """
        ...

    def read(self, slot: str, start: int, out: HostArray) -> None:
        """Encode `slot[start:start + len(out)]` into `out`, in the dtype of `out`."""
        ...

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """Decode `values` (any wire dtype, perhaps unaligned) into `slot[start:start + len(values)]`."""
        ...

    def adopt(self, other: EngineState) -> None:
        """Replace this state's arrays by the arrays of the same slots of `other`, which is used up."""
        ...

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        ...


class Engine(Protocol):
    """A device with its kernels."""

    @property
    def device(self) -> Device:
        """Where this engine's arrays live."""
        ...

    def allocate(self, slots: Sequence[str], size: int) -> EngineState:
        """Allocate one zeroed float32 array of `size` elements a slot.

        Raises:
            ResourceExhaustedError: the device has no memory left; nothing stays allocated.
        """
        ...

    def prepare(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """Compile what steps need for these dtypes (reply None: no answer), so that none has to wait for it."""
        ...

    def close(self) -> None:
        """Stop the engine's threads. Closing twice is harmless."""
        ...
