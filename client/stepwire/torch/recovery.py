"""A model after a step that failed: its parameters are made whole, all as before the step or all as after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.errors import SessionNotFoundError, StepwireError
from stepwire.session import Session
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.tensors import ParameterTensor, touch
from stepwire.torch.views import SharedViews

__all__ = ["Recovery"]

Memory: TypeAlias = Parameters | SharedViews

_AT_ONCE_SECONDS: Final = 1.0
"""The longest time that a step which has failed asks for its outcome before it raises."""


class _FailedStep(NamedTuple):
    """A step whose outcome the model does not show yet.

    Attributes:
        step: its number.
        torn: a part of its reply may have been written to the parameters.
        left: the values that the step left in the parameters, by name; None before they were copied.
    """

    step: int
    torn: bool
    left: Arrays | None = None


class Recovery:
    """Makes the parameters of one session whole after a step that failed.

    A reply is written to the parameters as it arrives, so a reply that breaks off leaves values of two steps. A reply
    exists only for an applied step. So the server is asked whether the step was applied, and if it was, the parameters
    are fetched. Values that other code has written in between stay. Code that has written every parameter has made the
    model whole by itself.
    """

    def __init__(
        self, session: Session, parameters: Parameters, memory: Memory, reply_dtype: np.dtype[Any], timeout: float
    ) -> None:
        """Start with a model that is whole.

        Args:
            session: the session.
            parameters: the model's parameters.
            memory: the memory of their values, which is told of values that are restored.
            reply_dtype: the wire dtype of parameters in replies.
            timeout: the time limit of a call, in seconds.
        """
        self._session = session
        self._parameters = parameters
        self._memory = memory
        self._reply_dtype = reply_dtype
        self._timeout = timeout
        self._in_place = memory is not parameters  # the server writes them itself, where the model is
        self._failed: _FailedStep | None = None

    @property
    def is_torn(self) -> bool:
        """Tell whether the model may have values of two steps."""
        return self._failed is not None and self._failed.torn

    def stepped(self) -> None:
        """Note that a step has written all parameters."""
        self._failed = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Make the model whole if the step of the block fails, at once if the server replies soon.

        Otherwise the error gets a note, and the next call that needs a whole model makes it so. No other code has
        changed the model since the step before, or the changes were uploaded.

        Raises:
            SessionNotFoundError: the session is lost, so nothing makes the model whole.
        """
        try:
            yield
        except BaseException as error:
            self._failed_with(error)
            raise

    def _failed_with(self, error: BaseException) -> None:
        known = self._session.statistics()
        if (step := known.step_in_doubt) is None:
            return
        torn = known.reply_begun or self._in_place or self.is_torn
        self._failed = failed = _FailedStep(step, torn)
        if isinstance(error, StepwireError):  # an interrupt of the user does not wait
            try:
                self._settle(min(self._timeout, _AT_ONCE_SECONDS))
                return
            except SessionNotFoundError as lost:
                raise lost from error
            except StepwireError:
                pass
        self._parameters.note()
        self._failed = failed._replace(left={name: array.copy() for name, array in self._parameters.fetch().items()})
        if torn:
            touch(self._parameters.tensors)  # autograd must not use values that the reply may have replaced
            error.add_note(
                f"The model's parameters may be those before step {step}, those after it, or a part of each, until the "
                "optimizer reaches its session again. If the session is lost, load a checkpoint of the model."
            )

    def settle(self) -> None:
        """Make the model whole, if a step has failed and its outcome is unknown.

        Raises:
            SessionNotFoundError: the session is lost; the message names the remedy.
            StepMismatchError: a part of the servers has applied the step.
            StepwireError: as `Session.attach` and `Session.pull`.
        """
        self._settle(self._timeout)

    def settle_before_end(self) -> None:
        """Make the model whole before its session ends, if the server replies soon.

        Raises:
            StepwireError: as `settle`.
        """
        self._settle(min(self._timeout, _AT_ONCE_SECONDS))

    def _settle(self, timeout: float) -> None:
        if (failed := self._failed) is None:
            return
        if not all(tensor.changed for tensor in self._parameters.tensors):
            try:
                self._fetch(failed, timeout)
            except SessionNotFoundError as lost:
                if failed.torn:  # else the model is as before the step
                    raise _torn(failed.step, lost) from None
        self._failed = None

    def _fetch(self, failed: _FailedStep, timeout: float) -> None:
        """Learn whether the step was applied, and if it was, write the session's parameters into the model."""
        self._session.attach(timeout=timeout)  # from now on no older stream commits the step
        # A shard may have applied a step that the session as a whole has not, and other workers may have stepped.
        several = len(self._session.shards) > 1 or self._session.config.aggregation is not None
        if several or self._session.applied_step >= failed.step:
            self._restore(self._session.pull(dtype=self._reply_dtype, timeout=timeout), failed.left)

    def _restore(self, pulled: Any, left: Arrays | None) -> None:
        """Write the session's parameters into the model, except for elements that differ from `left`."""
        present = self._parameters.fetch()
        for tensor in self._parameters.tensors:
            _restore(tensor, present[tensor.name], pulled[tensor.name], None if left is None else left[tensor.name])
        self._memory.restored()


def _restore(
    tensor: ParameterTensor,
    present: npt.NDArray[Any],
    pulled: npt.NDArray[Any],
    left: npt.NDArray[Any] | None,
) -> None:
    if (present.dtype, present.shape) != (tensor.dtype, tensor.shape):  # an upload refuses this parameter
        return
    written = np.zeros(present.shape, bool) if left is None else _bits(present) != _bits(left)
    with np.errstate(over="ignore"):
        np.copyto(present, pulled.astype(present.dtype), where=~written)
    tensor.settle()
    touch([tensor])
    if written.any():
        tensor.mark_changed()


def _torn(step: int, lost: SessionNotFoundError) -> SessionNotFoundError:
    return SessionNotFoundError(
        f"the model's parameters may be those before step {step}, those after it, or a part of each: the step failed, "
        "and its session is lost. Load a checkpoint into the model, and make a new optimizer with the checkpoint's "
        f"state: {lost}",
        metadata=lost.metadata,
    )


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(f"u{values.dtype.itemsize}")
