"""Parameters and gradients of a model in the memory that a session shares, so that a step copies nothing."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from stepwire.errors import UnsupportedFeatureError
from stepwire.session import Session
from stepwire.torch.gradient_hooks import GradientHooks
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.tensors import ParameterTensor, from_numpy, locations_of, touch, touch_in_place
from stepwire.transports.host.pages import has_written_pages

__all__ = ["SharedViews", "check_dtypes"]

_LOG = logging.getLogger(__name__)


class SharedViews:
    """Moves a model's parameters into shared memory, and its gradients during the backward pass.

    Autograd allocates a gradient itself. A hook copies the gradient from the cache into shared memory, and sets `.grad`
    to the copy. Later accumulation adds to the copy. `zero_grad` may drop the copy: the next gradient is copied again.

    A step uses this object in place of `Parameters`.
    """

    def __init__(self, session: Session, parameters: Parameters) -> None:
        """Move the parameters into the session's shared memory.

        Raises:
            UnsupportedFeatureError: the session shares no memory with its server.
        """
        self._session = session
        self._parameters = parameters
        self._handed: dict[str, weakref.ref[Any]] = {}
        self._hooks = GradientHooks(self._move_gradient)
        self._hooks.watch(parameters.tensors)
        try:
            self._bind()
        except BaseException:
            self._hooks.remove()
            raise

    def _bind(self) -> None:
        """Make the parameters views of the memory that the session shares now."""
        self._replies = cast(dict[str, Any], self._session.shared_parameters())
        private = cast(dict[str, Any], self._session.shared_parameters(private=True))
        self._gradients = cast(dict[str, Any], self._session.shared_gradients())
        self._gradient_tensors = {
            tensor.name: _tensor(tensor, self._gradients[tensor.name]) for tensor in self._parameters.tensors
        }
        self._places = locations_of(self._gradient_tensors.values())
        self._parameter_tensors = {
            tensor.name: _tensor(tensor, private[tensor.name]) for tensor in self._parameters.tensors
        }
        self._area = _area(list(private.values()))
        self._dirty = False
        self._session.forget_writes()
        self._rebind()
        self._parameters.follow()

    def _rebind(self) -> None:
        """Make views again of parameters that other code gave other memory, which replies would not reach."""
        for tensor in self._parameters.tensors:
            shared = self._parameter_tensors[tensor.name]
            if not _same_elements(tensor.parameter, shared):
                tensor.parameter.data = shared

    def _move_gradient(self, tensor: ParameterTensor) -> None:
        parameter, target = tensor.parameter, self._gradient_tensors[tensor.name]
        gradient = parameter.grad
        if gradient is None or (gradient.layout, gradient.dtype) != (torch.strided, target.dtype):
            return  # `gradients` reads it where it is, or refuses it
        if gradient.shape == target.shape and not _same_elements(gradient, target):
            self._part_with(tensor.name)
            target.copy_(gradient.detach())
            parameter.grad = target.detach()  # an object of the user's own, which may be given other memory
            self._handed[tensor.name] = weakref.ref(parameter.grad)

    def _part_with(self, name: str) -> None:
        """Give the gradient of before memory of its own, if other code has kept it: the next one lies in its place."""
        handed = self._handed.get(name)
        if handed is not None and (kept := handed()) is not None and _same(kept, self._gradient_tensors[name]):
            kept.data = kept.detach().clone()

    def gradients(self) -> Arrays:
        """Return the present gradients: the session's own view for each gradient in its memory.

        Raises:
            InvalidRequestError: as `Parameters.gradients`.
        """
        if self._are_placed():
            return dict(self._gradients)
        placed = {
            tensor.name: self._gradients[tensor.name]
            for tensor in self._parameters.tensors
            if _same_elements(tensor.parameter.grad, self._gradient_tensors[tensor.name])
        }
        return placed | self._parameters.gradients(but=placed)

    def _are_placed(self) -> bool:
        """Tell whether all gradients are in the session's memory, as `_same_elements` does of one."""
        gradients = [tensor.parameter.grad for tensor in self._parameters.tensors]
        try:
            return locations_of(gradients) == self._places
        except (AttributeError, RuntimeError):  # one is None, or sparse
            return False

    def targets(self) -> Any:
        """Return the shared memory as the target of a reply, which is then not copied."""
        return self._replies

    def changed(self) -> list[ParameterTensor]:
        """Return the tensors that other code may have changed since the server had their values.

        The kernel tells of every page that was written, through `.data` too. Where it does not tell, and while pages
        are written that the server has, samples reveal most changes.
        """
        counted = self._parameters.counted()
        if counted or self._dirty or self._area is None:
            return counted or self._parameters.changed()
        return [] if has_written_pages(*self._area) is False else list(self._parameters.tensors)

    def uploaded(self) -> None:
        """Note that the server has the values written on the client: private copies of pages can go."""
        self._dirty = True
        self._parameters.follow()

    def restored(self) -> None:
        """Note that values of the server were written to the parameters here."""
        self._dirty = True
        self._parameters.note()

    def stepped(self, reply: Any) -> None:
        """Follow the parameters after a step. Another connection has other shared memory."""
        first = self._parameters.tensors[0].name
        shown, before = reply[first], self._replies[first]
        if shown is not before and _address(shown) != _address(before):
            self._move(reply)
            touch(self._parameters.tensors)
        elif self._dirty:
            self._dirty = False
            self._session.forget_writes()
            self._rebind()
            touch(self._parameters.tensors)
        else:
            touch_in_place(self._parameters.tensors)
        if self._area is None:
            self._parameters.note()

    def _move(self, reply: Any) -> None:
        try:
            self._bind()
        except UnsupportedFeatureError as error:
            _LOG.warning("parameters are ordinary memory from now on, and each step copies them: %s", error)
            for tensor in self._parameters.tensors:
                self._parameter_tensors[tensor.name] = tensor.parameter.data = _tensor(tensor, reply[tensor.name])
            self._replies = cast(dict[str, Any], self._parameters.targets())
            self._area = None

    def release(self) -> None:
        """Give the model memory of its own again."""
        self._hooks.remove()
        for tensor in self._parameters.tensors:
            parameter = tensor.parameter
            if _same(parameter, self._parameter_tensors[tensor.name]):  # else other code, or other views, have moved it
                parameter.data = parameter.data.clone()
                tensor.follow()
            if _same(parameter.grad, self._gradient_tensors[tensor.name]):
                parameter.grad = parameter.grad.clone()


def check_dtypes(parameters: Parameters, gradients: np.dtype[Any], replies: np.dtype[Any]) -> None:
    """Refuse parameters with another dtype than the shared memory.

    Args:
        parameters: the model's parameters.
        gradients: the wire dtype of gradients.
        replies: the wire dtype of parameters in replies.

    Raises:
        UnsupportedFeatureError: a parameter has another dtype.
    """
    for tensor in parameters.tensors:
        if not tensor.dtype == gradients == replies:
            raise UnsupportedFeatureError(
                f"shared_views: {tensor.name!r} is {tensor.parameter.dtype}, the session's gradients are "
                f"{gradients.name} and its replies {replies.name}; leave gradient_dtype and reply_dtype out, and use "
                "one dtype in the model",
                metadata={"field": "shared_views", "feature": "torch_shared_views"},
            )


def _tensor(tensor: ParameterTensor, view: Any) -> Any:
    """Return a view of shared memory as a tensor like a parameter."""
    made = from_numpy(view) if isinstance(view, np.ndarray) else torch.as_tensor(view, device=tensor.parameter.device)
    return torch.view_as_complex(made) if tensor.parameter.is_complex() else made


def _area(private: Sequence[Any]) -> tuple[int, int] | None:
    """Return the start and the size of the memory of private views; None if this process cannot tell of its pages.

    The views of a session are parts of one mapping.
    """
    arrays = [view for view in private if isinstance(view, np.ndarray) and view.size]
    if not arrays:
        return None
    start = min(map(_address, arrays))
    size = max(_address(array) + array.nbytes for array in arrays) - start
    return None if has_written_pages(start, size) is None else (start, size)


def _same(one: Any, other: Any) -> bool:
    """Tell whether two tensors begin at one place in memory, and the first means what lies there, as the other does."""
    if one is None or one.layout != torch.strided or one.dtype != other.dtype or one.is_conj() or one.is_neg():
        return False
    return bool(one.data_ptr() == other.data_ptr())


def _same_elements(one: Any, other: Any) -> bool:
    """Tell whether two tensors are the same elements of memory in the same order."""
    return _same(one, other) and one.shape == other.shape and one.stride() == other.stride()


def _address(view: Any) -> int:
    interface = getattr(view, "__cuda_array_interface__", None) or view.__array_interface__
    address: int = interface["data"][0]
    return address
