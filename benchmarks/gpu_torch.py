"""`torch.optim.Adam(fused=True)` on the device that the engine uses, through the engine's own stream."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["FusedAdam", "TorchSide"]


class TorchSide:
    """PyTorch on one device.

    Attributes:
        torch: the module.
        place: the device, as torch names it.
    """

    def __init__(self, torch: Any, place: str, stream: int | None) -> None:
        """Use `place`, and there the CUDA stream at an address; None for torch's own order."""
        self.torch = torch
        self.place = place
        self._stream = None if stream is None else torch.cuda.ExternalStream(stream)

    @classmethod
    def installed(cls, index: int, stream: int) -> TorchSide | None:
        """Return torch on a GPU, or None if it is not installed or sees none."""
        try:
            torch = importlib.import_module("torch")
        except ImportError:
            return None
        if not torch.cuda.is_available():
            return None
        with torch.cuda.device(index):
            return cls(torch, f"cuda:{index}", stream)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Ask for what follows in the engine's stream, which one clock is laid on."""
        return contextlib.nullcontext() if self._stream is None else self.torch.cuda.stream(self._stream)

    def settle(self) -> None:
        """Wait until nothing is under way."""
        if self._stream is not None:
            self.torch.cuda.synchronize()

    def rest(self) -> None:
        """Give back memory that torch keeps for later."""
        if self._stream is not None:
            self.torch.cuda.empty_cache()


class FusedAdam:
    """Tensors of some sizes, of zeros, with gradients that stay the same."""

    def __init__(self, side: TorchSide, sizes: Sequence[int], *, halves: bool = False) -> None:
        """Make tensors, and where `halves` a gradient and a reply in bfloat16 for the first."""
        torch = side.torch
        self._side = side
        self._parameters = [torch.nn.Parameter(torch.zeros(size, device=side.place)) for size in sizes]
        for parameter in self._parameters:
            parameter.grad = torch.full_like(parameter, 0.01)
        self._optimizer = torch.optim.Adam(self._parameters, fused=True)
        self._halves = [torch.full_like(self._parameters[0], 0.01, dtype=torch.bfloat16) for _ in range(2 * halves)]
        side.settle()

    def step(self) -> None:
        """Step; nothing waits for it."""
        with self._side.current():
            self._optimizer.step()

    def step_with_casts(self) -> None:
        """Step with a gradient that comes, and parameters that go, as bfloat16."""
        received, reply = self._halves
        with self._side.current():
            self._parameters[0].grad.copy_(received)
            self._optimizer.step()
            reply.copy_(self._parameters[0].detach())

    def after(self, start: np.ndarray[Any, Any], gradients: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Return what becomes of parameters, `(n,) float32`, after a step with each gradient."""
        (parameter,) = self._parameters
        from_numpy = self._side.torch.from_numpy
        with self._side.current():
            parameter.detach().copy_(from_numpy(start))
            for gradient in gradients:
                parameter.grad.copy_(from_numpy(gradient))
                self._optimizer.step()
            result: np.ndarray[Any, Any] = parameter.detach().cpu().numpy()
        return result
