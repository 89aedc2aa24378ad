"""One model twice: stepped by torch's optimizer and by the one whose state is on a server, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

__all__ = ["SHAPES", "Twins", "assert_same_bits", "gradients", "parameters", "same_bits"]

SHAPES = ((33, 17), (129,), ())
"""A matrix, a vector that no vector unit divides evenly, and a number."""

_SEED = 20_261_128

Parameters = list[torch.nn.Parameter]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Parameters:
    """Return parameters that are the same at every call."""
    return [torch.nn.Parameter(values) for values in gradients(shapes, 0, dtype)]


def gradients(shapes: Iterable[tuple[int, ...]], step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return the gradients of a step: random, and the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(_SEED + step)
    drawn = dtype if dtype.is_complex else torch.float32
    return [torch.randn(shape, generator=generator, dtype=drawn).to(dtype) for shape in shapes]


class Twins:
    """Two lists of equal parameters, and an optimizer for each.

    Attributes:
        params: those of torch's optimizer.
        remote_params: those of the drop-in.
        local: torch's optimizer.
        remote: the drop-in.
        taken: steps so far.
    """

    def __init__(
        self,
        optimizers: Callable[[Parameters, Parameters], tuple[Any, Any]],
        make_params: Callable[[], Parameters] = parameters,
    ) -> None:
        self.params, self.remote_params = make_params(), make_params()
        self.local, self.remote = optimizers(self.params, self.remote_params)
        self.taken = 0

    def draw(self) -> None:
        """Give both the gradients of the next step."""
        self.taken += 1
        for params in (self.params, self.remote_params):
            shapes = [tuple(parameter.shape) for parameter in params]
            for parameter, gradient in zip(params, gradients(shapes, self.taken, params[0].dtype), strict=True):
                parameter.grad = gradient

    def step(self, steps: int = 1) -> None:
        """Step both optimizers."""
        for _ in range(steps):
            self.draw()
            self.local.step()
            self.remote.step()

    def assert_close(self, *, rtol: float, atol: float, what: str = "") -> None:
        """Compare the parameters."""
        for place, (one, other) in enumerate(zip(self.params, self.remote_params, strict=True)):
            torch.testing.assert_close(
                other, one, rtol=rtol, atol=atol, msg=lambda text, place=place: f"{what}, parameter {place}: {text}"
            )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal in every bit: NaN equals NaN, and 0 is not -0."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and _bytes(one) == _bytes(other)


def assert_same_bits(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> None:
    """Compare tensor by tensor."""
    for place, (left, right) in enumerate(zip(one, other, strict=True)):
        assert same_bits(left, right), (place, left, right)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
