"""The engine that keeps state in GPU memory, on CuPy. Unverified on a GPU.

The simplest correct form: an array of device memory a slot, one kernel a call, and copies to and from pageable
memory, all on the default stream, which keeps them in order. The tests run it through a stand-in for CuPy that
executes the same generated kernels on the processor, and compile them for real devices.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepwire.errors import ResourceExhaustedError, StepwireError, UnsupportedFeatureError
from stepwire_server.engines.cuda_kernels import CudaKernels
from stepwire_server.engines.cuda_state import CudaState
from stepwire_server.engines.protocol import PARAM, Device, Span
from stepwire_server.rules import Precision, Recipe

__all__ = ["CudaEngine"]

# How each precision is held: there are no 8-bit kernels for this device yet.
_HELD: dict[Precision, np.dtype[Any]] = {
    Precision.FLOAT32: np.dtype(np.float32),
    Precision.BFLOAT16: np.dtype(np.uint16),
}


class CudaEngine:
    """Flat arrays in the memory of one GPU. Unverified on a GPU. Thread-safe, unlike its states."""

    def __init__(self, index: int = 0, cupy: Any = None) -> None:
        """Start an engine.

        Args:
            index: the device, as CUDA numbers the visible ones.
            cupy: the CuPy module, or a stand-in; None to import it, here and nowhere else.
        """
        self.kernels = CudaKernels(cupy or importlib.import_module("cupy"), index)
        self._device = self.kernels.describe()

    @property
    def device(self) -> Device:
        """The GPU and its memory."""
        return self._device

    def state_bytes(self, slots: Mapping[str, Precision], size: int, kept: Sequence[Span] = ()) -> int:
        """See `Engine.state_bytes`.

        Raises:
            UnsupportedFeatureError: a slot is to be held in 8 bits.
        """
        return sum(self._dtype(precision).itemsize * size for precision in slots.values())

    def allocate(self, slots: Mapping[str, Precision], size: int, kept: Sequence[Span] = ()) -> CudaState:
        """See `Engine.allocate`. Each slot is an array of its own, so that `adopt` frees what it replaces.

        Raises:
            ResourceExhaustedError: the device has no memory left; nothing stays allocated.
            UnsupportedFeatureError: a slot is to be held in 8 bits.
        """
        needed_bytes = self.state_bytes(slots, size, kept)
        cupy = self.kernels.cupy
        try:
            with self.kernels.device():
                arrays = {slot: cupy.zeros(size, self._dtype(precision)) for slot, precision in slots.items()}
        except cupy.cuda.memory.OutOfMemoryError as problem:
            self.kernels.free_unused()
            raise ResourceExhaustedError(
                f"no memory on {self._device.name} ({self._device.description}) for {len(slots)} arrays of {size} "
                f"elements ({needed_bytes} bytes); close a session or use another device",
                metadata={"needed_bytes": needed_bytes, "device": self._device.name},
            ) from problem
        return CudaState(self.kernels, arrays, size)

    def prepare(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare`.

        Raises:
            UnsupportedFeatureError: the rule's slots are to be held in 8 bits.
        """
        self._dtype(recipe.precision)
        self.kernels.update(recipe, gradient, reply)
        if recipe.rule.direction is not None:
            self.kernels.measure(recipe, gradient)
        self.kernels.of_gradients("fold")

    def self_test(self) -> None:
        """Compile and run a kernel, because a missing NVRTC shows only then.

        Raises:
            Exception: whatever CuPy raises, or a StepwireError when the device computes wrongly.
        """
        with contextlib.closing(self.allocate({PARAM: Precision.FLOAT32}, 1)) as state:
            total = state.sum_of_squares(state.stage(np.array([3.0, 4.0], np.float32)), 0, 2, 1.0)
        if total != 25.0:
            raise StepwireError(f"{self._device.name} computes 3² + 4² = {total}")

    def close(self) -> None:
        """See `Engine.close`. There are no threads; kernels and free memory go back to the device."""
        self.kernels.close()

    def _dtype(self, precision: Precision) -> np.dtype[Any]:
        if precision not in _HELD:
            raise UnsupportedFeatureError(
                f"state_precision {precision.value} is not served on {self._device.name} yet; "
                "use bfloat16, or a server on the CPU",
                metadata={"field": "config.state_precision", "feature": f"state_{precision.value}"},
            )
        return _HELD[precision]
