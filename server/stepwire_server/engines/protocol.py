"""The interface of engines: flat arrays, and one fused pass over a range of them.

An engine owns memory and kernels. It knows no session, no step number and no wire. Its callers give it element ranges,
a rule with its scalars, and a place for the encoded reply.

Dtypes that cross this border are the wire's: float32, bfloat16 (`ml_dtypes`), float16, and for gradients
`stepwire.wire.int8_blocks.INT8`, in whose blocks they stay. State is float32, but for slots, or regions of slots, that
were allocated in another `Precision`. A payload or a reply is an array of the host, or of `ExportedMemory`.

Calls are carried out in the order in which they are made, but a GPU carries them out later. Their results come as a
`Pending`. A caller asks for the next result before it waits for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stepwire.errors import DataLossError
from stepwire_server.engines.device_info import DeviceInfo, EngineStatistics
from stepwire_server.engines.exported_memory import ExportedMemory
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.engines.pending import Done, Pending
from stepwire_server.engines.regions import Holding, Range, Table
from stepwire_server.rules import Recipe

__all__ = [
    "GRAIN",
    "PARAM",
    "DeviceInfo",
    "Done",
    "Engine",
    "EngineState",
    "EngineStatistics",
    "ExportedMemory",
    "Gradient",
    "GradientBuffer",
    "HostArray",
    "Pass",
    "Pending",
    "Range",
    "RowPass",
    "Table",
]

HostArray = npt.NDArray[Any]

PARAM = "param"
"""The slot of the master parameters; every other slot is named by the rule."""

GRAIN = 65_536
"""The elements of one block of a sum of squares; threads share ranges in multiples of them."""


class Pass(NamedTuple):
    """A recipe with the numbers of one step.

    Attributes:
        recipe: the arithmetic of each element, for slots in any precision.
        scalars: the recipe's scalars, float64 on the host, used as float32.
        seed: 32 bits that differ from step to step, for stochastic rounding.
    """

    recipe: Recipe
    scalars: tuple[float, ...]
    seed: int = 0


class RowPass(NamedTuple):
    """A recipe with the numbers of one step for rows of a table, each kind of row with its own.

    Attributes:
        recipe: the arithmetic of each element, for slots held as float32.
        scalars: the recipe's scalars, one line a kind of row, `(kinds, scalars) float32`.
        kinds: the kind of each row, `(rows,) int32`.
        own: each row has a line of its own, in the order of the rows.
    """

    recipe: Recipe
    scalars: HostArray
    kinds: HostArray
    own: bool = False

    def part(self, low: int, high: int) -> RowPass:
        """Return the pass of rows `[low, high)` alone."""
        if not self.own:
            return self._replace(kinds=self.kinds[low:high])
        return self._replace(scalars=self.scalars[low:high], kinds=self.kinds[: high - low])


class Gradient(Protocol):
    """A chunk of gradient in memory that the engine reads. Opaque to everybody else."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The wire dtype."""
        ...

    def __len__(self) -> int:
        """Count the elements."""
        ...


class GradientBuffer(Protocol):
    """The chunks of one step's gradient, all of one wire dtype. Not thread-safe."""

    def put(self, offset: int, payload: HostArray, count: int | None = None) -> Gradient:
        """Keep a received chunk.

        The CPU engine keeps the received bytes as they are, unaligned or not. A GPU engine has copied them when this
        returns, unless they lie in memory that is pinned. They must stay unchanged until `close`.

        Args:
            offset: the first flat element; for blocks a multiple of their size.
            payload: the elements, contiguous but perhaps unaligned.
            count: the number of elements, of which the last block may hold more; None for all of the payload.

        Returns:
            The chunk, for the calls of the state.

        Raises:
            ResourceExhaustedError: the device has no memory left.
        """
        ...

    def close(self) -> None:
        """Let go of the chunks; none of them is used any more. Closing twice is harmless."""
        ...


class EngineState(Protocol):
    """The flat float32 arrays of one session. Not thread-safe: the session serialises its calls."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by the arrays."""
        ...

    @property
    def depth(self) -> int:
        """The number of replies that it pays to ask for before the first wait."""
        ...

    def receive(self, size: int | None = None) -> GradientBuffer:
        """Make ready for a gradient; may be called while a step with another one is under way.

        Args:
            size: its elements; None for those of the flat space.
        """
        ...

    def sum_of_squares(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> Pending[float]:
        """Sum the squares of `gradient[begin:end] · factor`, each a float32, accumulated in float64.

        Squares of float32 cannot overflow float64, so the result is finite exactly if every element is. Its relative
        error is below 2⁻⁴⁵. The order of additions is fixed: the same range gives the same bits on every engine.

        Args:
            gradient: a chunk from `receive`.
            begin: first element within the chunk.
            end: one past the last element within the chunk.
            factor: used as float32.
            accumulated: first flat element of the accumulated gradient that is added first; None for none.
        """
        ...

    def accumulate(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """Add `gradient[begin:end] · factor` to the accumulated gradient from flat element `start` on."""
        ...

    def measure(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> Pending[tuple[float, float]]:
        """Sum the squares of the parameters and of a layerwise rule's direction; changes nothing.

        Precision and order are those of `sum_of_squares`; arguments are those of `update`.
        """
        ...

    def fetch(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> HostArray:
        """Return what `sum_of_squares` squares, as float32 on the host; slow and rarely needed."""
        ...

    def fetch_direction(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> HostArray:
        """Return the direction that `measure` squares, as float32 on the host; slow and rarely needed."""
        ...

    def update(
        self,
        step: Pass,
        start: int,
        gradient: Gradient,
        begin: int,
        end: int,
        out: HostArray | None,
    ) -> Pending[tuple[float, ...]]:
        """Step the flat elements `[start, start + end - begin)` with `gradient[begin:end]`.

        Decode, arithmetic, measurements and encode are one pass over memory.

        Args:
            step: the arithmetic; the recipe's slots are arrays of this state.
            start: first flat element; all elements lie in one region of the rule's slots.
            gradient: a chunk from `receive`.
            begin: first element within the chunk.
            end: one past the last element within the chunk.
            out: the place of the new parameters, `(end - begin,)`; they are there, in its dtype, when the wait ends.
                None for no reply.

        Returns:
            The recipe's `sums`, to about six digits, whatever their magnitude: see `measured_sums`. Their order of
            additions is the processor's choice.
        """
        ...

    def update_rows(
        self, step: RowPass, table: Table, rows: HostArray, gradient: Gradient, begin: int, out: HostArray | None
    ) -> Pending[tuple[float, ...]]:
        """Step some rows of a table: gather, arithmetic, scatter and encode are one pass over them.

        Args:
            step: the arithmetic; the recipe's slots are arrays of this state.
            table: the place of the table, whose rule's slots are held as float32.
            rows: the rows, `(n,) int64`, each once. Those that rise are fastest.
            gradient: a chunk of float32 from `receive`, rows one after another.
            begin: the place of the first row within the chunk, in rows.
            out: the place of the new rows, `(n · width,)`, as for `update`; None for no reply.

        Returns:
            The recipe's `sums`, as `update`.
        """
        ...

    def read_rows(self, slot: str, table: Table, rows: HostArray, out: HostArray) -> Pending[None]:
        """Encode rows of a slot that is held as float32 into `out`, `(n · width,)`, before the wait ends.

        Args:
            slot: the slot.
            table: the place of the table.
            rows: the rows, `(n,) int64`, in any order.
            out: the place of the rows, in its dtype.
        """
        ...

    def read(self, slot: str, start: int, out: HostArray) -> Pending[None]:
        """Encode `slot[start:start + len(out)]` into `out`, in the dtype of `out`, before the wait ends.

        Beside a slot "s" there is a slot "s_scale", which repeats the maximum of each 8-bit block for its elements, and
        is zero for elements in another precision.
        """
        ...

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """Decode `values` (any wire dtype, perhaps unaligned) into `slot[start:start + len(values)]`.

        They may change once this has returned.
        """
        ...

    def copy(self, source: str, target: str) -> None:
        """Copy a slot held as float32 to another."""
        ...

    def clear(self, slot: str) -> None:
        """Zero a slot held as float32."""
        ...

    def adopt(self, other: EngineState) -> None:
        """Replace this state's slots by those of `other`, held as float32 there; `other` is used up."""
        ...

    def move(self, slot: str, memory: HostArray) -> bool:
        """Hold a slot of float32 in `memory`, `(size,) float32`, from now on, whatever is loaded into it.

        Returns:
            False where slots cannot lie in memory of the host; nothing has changed then.
        """
        ...

    def yield_buffers(self, gradient: Gradient | None) -> None:
        """Give back what sessions share and this one holds: the caller is about to wait for another session.

        Results that were asked for stay valid: those that lie in shared buffers are copied out. So are those of
        `gradient`, if a chunk is given.

        Raises:
            Exception: the device failed; CuPy has no common base for its errors.
        """
        ...

    def settle(self) -> None:
        """Wait until all that was asked for is done.

        Raises:
            Exception: the device failed; CuPy has no common base for its errors.
        """
        ...

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        ...


class Engine(Protocol):
    """A device with its kernels."""

    @property
    def device(self) -> DeviceInfo:
        """The device of this engine's arrays."""
        ...

    def statistics(self) -> EngineStatistics:
        """Return the memory and the threads of the engine now."""
        ...

    def state_bytes(self, slots: Mapping[str, Holding], size: int) -> int:
        """Return the bytes that `allocate` allocates."""
        ...

    def allocate(self, slots: Mapping[str, Holding], size: int) -> EngineState:
        """Allocate one zeroed array of `size` elements a slot.

        Args:
            slots: how each is held; the parameters, what is accumulated and averaged as float32, and all slots of a
                rule alike.
            size: elements of the flat space.

        Raises:
            ResourceExhaustedError: the device has no memory left; nothing stays allocated.
        """
        ...

    def prepare(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """Compile the kernels of steps with these dtypes and the recipe's precision; None stands for no reply."""
        ...

    def bound_kernels(self, room: KernelRoom) -> None:
        """Have kernels admitted to a room before they are made, from now on.

        An engine that gives their memory back unloads the least recently used one instead.
        """
        ...

    def prepare_table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> None:
        """Compile the kernels of steps of rows with this recipe; None stands for no reply."""
        ...

    def pin(self, memory: HostArray) -> AbstractContextManager[None]:
        """Let the device reach this memory by itself for a block, `(n,) uint8`, where that makes a difference.

        No copy from or to the memory may be under way when the block ends.
        """
        ...

    def export(self, nbytes: int) -> ExportedMemory:
        """Allocate memory that another process can open.

        Args:
            nbytes: a multiple of 2 MiB: a smaller allocation may lie in one block with others, and the other process
                would see the whole block.

        Raises:
            UnsupportedFeatureError: the device cannot, or may not; the message says why, and what to do.
            ResourceExhaustedError: the device has no memory left.
        """
        ...

    def warm_up(self) -> None:
        """Compile the kernels that most sessions need, so that the first session need not wait."""
        ...

    def on_lost(self, tell: Callable[[DataLossError], None]) -> None:
        """Call `tell`, which must not wait, once the device fails for good; every later call raises that error."""
        ...

    def rest(self) -> None:
        """Give back memory that is only kept for the next step; for times without steps."""
        ...

    def close(self) -> None:
        """Stop the engine's threads, give its memory back. Closing twice is harmless."""
        ...
