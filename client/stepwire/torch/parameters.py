"""All parameters of an optimizer, in the order in which a session holds them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepwire.errors import UnsupportedFeatureError
from stepwire.torch.rules import Group
from stepwire.torch.tensors import HeldTensor
from stepwire.wire.dtypes import FLOAT32

__all__ = ["Parameters"]

Arrays = dict[str, npt.NDArray[Any]]


class Parameters:
    """The parameters of some groups.

    Attributes:
        tensors: one a parameter, group after group.
        membership: the group of each, by name.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        """Hold them.

        Raises:
            UnsupportedFeatureError: one of them, or two together, cannot be stepped from here.
        """
        self.tensors: list[HeldTensor] = []
        self.membership: dict[str, int] = {}
        seen: dict[int, str] = {}
        for index, group in enumerate(groups):
            names = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                name = names[place] if names else f"param_groups[{index}][{place}]"
                if id(parameter) in seen:  # torch warns, steps it twice, and announces that it will refuse
                    raise _unsupported(name, f"is {seen[id(parameter)]!r} once more; list each parameter once")
                seen[id(parameter)] = name
                if name in self.membership:
                    raise _unsupported(name, "is the name of two parameters; give each its own")
                self.tensors.append(HeldTensor(name, parameter))
                self.membership[name] = index
        _refuse_overlaps(self.tensors)

    @property
    def dtype(self) -> np.dtype[Any]:
        """What all of them have, or float32."""
        dtypes = {tensor.dtype for tensor in self.tensors}
        return dtypes.pop() if len(dtypes) == 1 else FLOAT32

    def members(self, group: int) -> list[str]:
        """Return the names of a group's parameters."""
        return [name for name, index in self.membership.items() if index == group]

    def fetch(self) -> Arrays:
        """Return the present values, by name."""
        arrays = {tensor.name: tensor.fetch() for tensor in self.tensors}
        self.synchronize()
        return arrays

    def gradients(self, but: Collection[str] = ()) -> Arrays:
        """Return the gradients that there are, by name; all but some.

        Raises:
            InvalidRequestError: one of them cannot be sent.
        """
        found = {tensor.name: tensor.gradient() for tensor in self.tensors if tensor.name not in but}
        self.synchronize()
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def targets(self) -> Arrays:
        """Return where answers are written, by name."""
        return {tensor.name: tensor.array() for tensor in self.tensors}

    def stepped(self, answer: object) -> None:
        """Bring what a step wrote to `targets` into the parameters."""
        for tensor in self.tensors:
            tensor.settle()

    def uploaded(self) -> None:
        """Note that the session has all present values."""
        self.follow()

    def release(self) -> None:
        """Do nothing: the model's memory is its own."""

    def follow(self) -> None:
        """Note that the session has all present values."""
        for tensor in self.tensors:
            tensor.follow()

    def changed(self) -> list[HeldTensor]:
        """Return those that somebody else has changed since `stepped` or `follow`."""
        return [tensor for tensor in self.tensors if tensor.changed]

    def synchronize(self) -> None:
        """Wait for the copies from GPUs that were asked for."""
        for device in {tensor.parameter.device for tensor in self.tensors if tensor.on_gpu}:
            torch.cuda.current_stream(device).synchronize()


def _refuse_overlaps(tensors: Sequence[HeldTensor]) -> None:
    """Refuse parameters that share elements: torch steps these once for each, one on top of the other."""
    extents = sorted(_extents(tensors), key=lambda extent: extent[:2])
    for (_, end, one), (start, _, other) in zip(extents, extents[1:], strict=False):
        if start < end:
            raise _unsupported(
                other.name,
                f"shares memory with {one.name!r}; tie parameters by using one Parameter twice (module.weight = "
                "other.weight), not two over one storage",
            )


def _extents(tensors: Sequence[HeldTensor]) -> Iterator[tuple[int, int, HeldTensor]]:
    for tensor in tensors:
        parameter = tensor.parameter
        if parameter.numel():
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.data_ptr()
            yield start, start + (last + 1) * parameter.element_size(), tensor


def _unsupported(name: str, problem: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"the parameter {name!r} {problem}", metadata={"field": f"params[{name!r}]", "feature": "torch_parameter"}
    )
