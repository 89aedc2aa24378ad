"""Parameters and gradients of a model in the memory that a session shares: a step is then the server's pass alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from stepwire.errors import UnsupportedFeatureError
from stepwire.session import Session
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.tensors import HeldTensor, from_numpy

__all__ = ["SharedViews", "check_dtypes"]

_LOG = logging.getLogger(__name__)


class SharedViews:
    """Moves a model's parameters into shared memory, and its gradients as the backward pass makes them.

    Autograd puts a gradient where it likes. A hook copies it while it is still in the cache, and makes `.grad` the
    copy; what is accumulated later is added there. `zero_grad` may drop it: the next gradient is copied again.

    It stands in the place of `Parameters` for what a step takes and gives.
    """

    def __init__(self, session: Session, parameters: Parameters) -> None:
        """Move them.

        Raises:
            UnsupportedFeatureError: the session shares no memory with its server.
        """
        self._session = session
        self._parameters = parameters
        self._hooks = [
            tensor.parameter.register_post_accumulate_grad_hook(self._mover(tensor))
            for tensor in parameters.tensors
            if tensor.parameter.requires_grad
        ]
        try:
            self._bind()
        except BaseException:
            self._unhook()
            raise

    def _bind(self) -> None:
        """Make the parameters views of the memory that the session shares now."""
        self._answers = cast(dict[str, Any], self._session.shared_parameters())
        private = cast(dict[str, Any], self._session.shared_parameters(private=True))
        self._given = cast(dict[str, Any], self._session.shared_gradients())
        self._places = {tensor.name: _tensor(tensor, self._given[tensor.name]) for tensor in self._parameters.tensors}
        self._homes = {tensor.name: _tensor(tensor, private[tensor.name]) for tensor in self._parameters.tensors}
        self._dirty = False
        self._session.forget_writes()
        self._bring_home()
        self._parameters.follow()

    def _bring_home(self) -> None:
        """Make views again of parameters that were given other memory, which answers would not reach."""
        for tensor in self._parameters.tensors:
            home = self._homes[tensor.name]
            if not _same(tensor.parameter, home) or tensor.parameter.stride() != home.stride():
                tensor.parameter.data = home

    def _mover(self, tensor: HeldTensor) -> Callable[[Any], None]:
        def move(parameter: Any) -> None:
            place, gradient = self._places[tensor.name], parameter.grad
            if gradient is not None and gradient.layout == torch.strided and not _same(gradient, place):
                place.copy_(gradient.detach())
                parameter.grad = place

        return move

    def gradients(self) -> Arrays:
        """Return the gradients that there are: the session's own views where they lie in its memory.

        Raises:
            InvalidRequestError: as `Parameters.gradients`.
        """
        placed = {
            tensor.name: self._given[tensor.name]
            for tensor in self._parameters.tensors
            if _same(tensor.parameter.grad, self._places[tensor.name])
        }
        return placed | self._parameters.gradients(but=placed)

    def targets(self) -> Any:
        """Return what makes an answer no copy."""
        return self._answers

    def uploaded(self) -> None:
        """Note that what was written here is the server's now: the copies of pages that it was written to can go."""
        self._dirty = True
        self._parameters.follow()

    def stepped(self, answer: Any) -> None:
        """Look where the parameters are after a step; a connection that broke took the memory before with it."""
        first = self._parameters.tensors[0].name
        if _address(answer[first]) != _address(self._answers[first]):
            self._move(answer)
        elif self._dirty:
            self._dirty = False
            self._session.forget_writes()
            self._bring_home()
        for tensor in self._parameters.tensors:
            tensor.touch()

    def _move(self, answer: Any) -> None:
        try:
            self._bind()
        except UnsupportedFeatureError as error:
            _LOG.warning("parameters are ordinary memory from now on, and each step copies them: %s", error)
            for tensor in self._parameters.tensors:
                self._homes[tensor.name] = tensor.parameter.data = _tensor(tensor, answer[tensor.name])
            self._answers = self._parameters.targets()

    def release(self) -> None:
        """Leave the model with memory of its own."""
        self._unhook()
        for tensor in self._parameters.tensors:
            tensor.parameter.data = tensor.parameter.data.clone()
            if tensor.parameter.grad is not None:
                tensor.parameter.grad = tensor.parameter.grad.clone()
            tensor.follow()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()


def check_dtypes(parameters: Parameters, gradients: np.dtype[Any], answers: np.dtype[Any]) -> None:
    """Refuse parameters that are no views of what travels.

    Args:
        parameters: the model's.
        gradients: how gradients travel.
        answers: how parameters do.

    Raises:
        UnsupportedFeatureError: one has another dtype.
    """
    for tensor in parameters.tensors:
        if not tensor.dtype == gradients == answers:
            raise UnsupportedFeatureError(
                f"shared_views: {tensor.name!r} is {tensor.parameter.dtype}, and in the session gradients are "
                f"{gradients.name} and answers {answers.name}; leave gradient_dtype and reply_dtype out, and "
                "use one dtype in the model",
                metadata={"field": "shared_views", "feature": "torch_shared_views"},
            )


def _tensor(held: HeldTensor, view: Any) -> Any:
    """Return shared memory as a tensor like a parameter."""
    made = from_numpy(view) if isinstance(view, np.ndarray) else torch.as_tensor(view, device=held.parameter.device)
    return torch.view_as_complex(made) if held.parameter.is_complex() else made


def _same(one: Any, other: Any) -> bool:
    if one is None or one.layout != torch.strided or one.dtype != other.dtype:
        return False
    return bool(one.data_ptr() == other.data_ptr())


def _address(view: Any) -> int:
    interface = getattr(view, "__cuda_array_interface__", None) or view.__array_interface__
    address: int = interface["data"][0]
    return address
