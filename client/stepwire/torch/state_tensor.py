"""Tensors of an optimizer's state: current whenever torch uses them, and noticed when they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

import torch
from torch._C import DisableTorchFunctionSubclass  # documented in "Extending PyTorch"

__all__ = ["Keeper", "StateTensor", "plain"]


class Keeper(Protocol):
    """The owner of state tensors."""

    def use(self, tensor: StateTensor) -> None:
        """Give a tensor its present values, and note that other code may write it."""


class StateTensor(torch.Tensor):
    """The present values of one slot of one parameter.

    Each function of torch that gets such a tensor brings it up to date first, so a tensor that was read before a step
    shows the values after it. Views of it, which share its memory, do the same. Results are plain tensors.

    Attributes:
        keeper: the owner; None for a tensor that is no part of a state any more, and keeps its last values.
        parameter: the parameter.
        key: the name of the slot, as torch has it.
        moment: the moment of the values, as the keeper counts moments; None before the first use.
        viewed: the state tensor that this one is a view of; None for no view.
    """

    keeper: Keeper | None
    parameter: Any
    key: str
    moment: int | None
    viewed: StateTensor | None

    @classmethod
    def made(cls, keeper: Keeper, parameter: Any, key: str, like: Any) -> StateTensor:
        """Return a tensor without values, in the form of `like`."""
        tensor: StateTensor = torch.empty_like(like).as_subclass(cls)
        tensor.keeper, tensor.parameter, tensor.key = keeper, parameter, key
        tensor.moment, tensor.viewed = None, None
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch on the present values."""
        used = (
            []
            if func in _FORM
            else [each if each.viewed is None else each.viewed for each in _state_tensors((args, kwargs))]
        )
        for tensor in used:
            if tensor.keeper is not None:
                tensor.keeper.use(tensor)
        with DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return _watched(result, used)

    def __deepcopy__(self, memo: object) -> Any:
        """Return a plain copy of the present values."""
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a plain tensor of the present values."""
        return self.clone().__reduce_ex__(protocol)


def plain(tensor: Any) -> Any:
    """Return a plain tensor over the memory of a tensor, as it is."""
    with DisableTorchFunctionSubclass():
        return tensor.detach()


def _state_tensors(values: Any) -> Iterator[StateTensor]:
    """Yield the state tensors among the arguments of a function."""
    if isinstance(values, StateTensor):
        yield values
    elif isinstance(values, dict):
        yield from _state_tensors(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _state_tensors(value)


def _watched(result: Any, used: list[StateTensor]) -> Any:
    """Return the result of a function, with plain views of state tensors made views that are watched too."""
    if type(result) in (tuple, list):
        return type(result)(_watched(each, used) for each in result)
    if type(result) is not torch.Tensor or not used or result.layout != torch.strided:
        return result
    address = result.untyped_storage().data_ptr()
    for tensor in used:
        if address and address == tensor.untyped_storage().data_ptr():
            view: StateTensor = result.as_subclass(StateTensor)
            view.viewed = tensor
            return view
    return result


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


_FORM: Final = frozenset(
    [_getter(name) for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_sparse")]
    + [torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_complex, torch.Tensor.is_floating_point]
)
"""The functions that read no values."""
