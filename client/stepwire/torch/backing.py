"""The session behind an optimizer: the model's parameters are the truth, and the session follows them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.session import Session
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.torch.backward import BackwardSender, Numbers
from stepwire.torch.mirror import Kept, Mirror
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.rules import Family, Group
from stepwire.torch.sessions import create_session, find_session
from stepwire.torch.views import SharedViews, check_dtypes
from stepwire.wire.dtypes import dtype_named

__all__ = ["Backing"]

_LOG = logging.getLogger(__name__)


class Backing:
    """One session, and the parameters whose optimizer it is.

    Attributes:
        session: the present one; another after `regroup` and `resume`.
        parameters: what it steps.
        closed: nothing more can be done.
    """

    session: Session

    def __init__(self, family: Family, options: RemoteOptions, groups: Sequence[Group]) -> None:
        """Make a session of these groups, or find the one to go on with and pull its parameters.

        Raises:
            UnsupportedFeatureError: a parameter cannot be stepped from here.
            InvalidRequestError: the session to go on with is of another model or optimizer.
            StepwireError: as `Client.create_session` and `Client.session`.
        """
        self._family = family
        self._options = options
        self.parameters = Parameters(groups)
        self._memory: Parameters | SharedViews = self.parameters
        self._sender: BackwardSender | None = None
        self._groups = groups
        self._loss_scale: float | None = None
        self.closed = False
        self._client = options.client()
        try:
            if options.session is None:
                self._begin_with(self._create(self.parameters, groups), groups)
            else:
                self.resume(options.session, groups)
        except BaseException:
            if options.owns_client:
                self._client.close()
            raise

    # --- sessions ----------------------------------------------------------------------------------------

    def _create(self, parameters: Parameters, groups: Sequence[Group]) -> Session:
        self._check(parameters)
        return create_session(self._client, self._options, self._family, parameters, groups)

    def _check(self, parameters: Parameters) -> None:
        """Refuse options that cannot be had for these parameters, before anything is made."""
        for name in ("shared_views", "send_in_backward"):
            if getattr(self._options, name) and len(self._client.targets) > 1:
                raise UnsupportedFeatureError(
                    f"{name}: the model is cut over several servers or channels; leave it out, or use one",
                    metadata={"field": name, "feature": f"torch_{name}"},
                )
        if self._options.shared_views:
            check_dtypes(parameters, *self._dtypes(parameters))

    def _dtypes(self, parameters: Parameters) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Return how gradients and answers travel."""
        sent, received = self._options.gradient_dtype, self._options.reply_dtype
        return (
            dtype_named(sent or parameters.dtype, "gradient_dtype", gradients=True),
            dtype_named(received or parameters.dtype, "reply_dtype"),
        )

    def _hold(self, session: Session, parameters: Parameters, groups: Sequence[Group]) -> None:
        """Use a session, which has the present values, from now on."""
        self.session, self.parameters = session, parameters
        parameters.follow()
        configuration = session.config
        self._structure = self._family.structure_of(groups)
        self._numbers = [configuration.arguments(index) for index in range(len(configuration.groups))]
        self._gradient_dtype, self._reply_dtype = self._dtypes(parameters)
        self._mirror = Mirror(session, parameters, self._family, self._reply_dtype, self._options.timeout)
        if self._sender is not None:
            self._sender.close()
        watches = self._options.send_in_backward
        self._sender = BackwardSender(parameters, self._begin, self._present_numbers) if watches else None
        self._memory.release()
        self._memory = parameters
        if self._options.shared_views:
            self._memory = SharedViews(session, parameters)

    def _begin_with(self, session: Session, groups: Sequence[Group]) -> None:
        """Use the first session, which nobody else knows and would end."""
        try:
            self._hold(session, self.parameters, groups)
        except BaseException:
            session.close()
            raise

    def _move_to(self, session: Session, parameters: Parameters, groups: Sequence[Group]) -> None:
        """Use another session in the place of the present one, and end that."""
        old = self.session
        try:
            self._hold(session, parameters, groups)
        except UnsupportedFeatureError as error:  # there was shared memory a moment ago
            _LOG.warning("parameters are ordinary memory from now on, and each step copies them: %s", error)
        old.close()

    def resume(self, session_id: str, groups: Sequence[Group]) -> None:
        """Go on with a session: take its slot, and bring its parameters into the model.

        Raises:
            InvalidRequestError: it is of another model, another optimizer, or other options.
            StepwireError: as `Client.session`.
        """
        self._check(self.parameters)
        session = find_session(self._client, session_id, self._options, self._family, self.parameters, groups)
        pulled: Any = session.pull()
        for name, target in self.parameters.targets().items():
            with np.errstate(over="ignore"):
                target[...] = pulled[name]
        self.parameters.stepped(pulled)
        self._hold(session, self.parameters, groups)

    def regroup(self, groups: Sequence[Group]) -> None:
        """Move to a new session of other groups; the state of parameters that stay goes with them.

        Raises:
            InvalidRequestError: the optimizer is closed.
            StepwireError: as creation; everything is as it was.
        """
        self.check_open()
        parameters = Parameters(groups)
        self.upload()
        session = self._create(parameters, groups)
        try:
            session.load_state(self._mirror.carried(session.state(), parameters))
        except BaseException:
            session.close()
            raise
        self._move_to(session, parameters, groups)

    # --- steps -------------------------------------------------------------------------------------------

    def step(self, groups: Sequence[Group], loss_scale: float | None) -> None:
        """Take a step with the gradients that there are, and the groups' present numbers.

        Raises:
            InvalidRequestError: the optimizer is closed, or gradients or numbers are not served; nothing was applied.
            StepwireError: as `Session.step`.
        """
        self.check_open()
        self._groups, self._loss_scale = groups, loss_scale
        overrides = self.overrides(groups)
        answer = None if self._sender is None else self._sender.finish((overrides, loss_scale))
        if answer is None and (gradients := self._memory.gradients()):
            self.upload()
            answer = self.session.step(gradients, **self._step_options((overrides, loss_scale)))
        if answer is not None:  # without any gradient nothing moves, as with torch
            self._memory.stepped(answer)
            self._mirror.forget()

    def _step_options(self, numbers: Numbers) -> dict[str, Any]:
        return {
            "hyperparameters": numbers[0],
            "loss_scale": numbers[1],
            "gradient_dtype": self._gradient_dtype,
            "reply_dtype": self._reply_dtype,
            "out": self._memory.targets(),
            "timeout": self._options.timeout,
        }

    # --- steps that begin in the backward pass -----------------------------------------------------------

    def _present_numbers(self) -> Numbers | None:
        """Return what a step would say now; None where it is not sent in messages, or parameters must be sent first."""
        choice = self.session.transport
        if self.closed or choice is None or choice.name in ("shm", "cuda_ipc") or self.parameters.changed():
            return None
        if self.session.statistics().step_in_doubt is not None:  # a whole gradient tells whether it is that step again
            return None
        return self.overrides(self._groups), self._loss_scale

    def _begin(self, feed: GradientFeed, names: frozenset[str], numbers: Numbers) -> Future[Any]:
        # Only their shapes are looked at; what is sent comes from the feed. Memory that nobody touches costs nothing.
        shapes = {t.name: np.empty(t.shape, t.dtype) for t in self.parameters.tensors if t.name in names}
        return self.session.step_async(shapes, feed=feed, **self._step_options(numbers))

    def _settle(self) -> None:
        """Have no step under way that was begun by a backward pass."""
        if self._sender is not None:
            self._sender.drop()

    # --- numbers -----------------------------------------------------------------------------------------

    def overrides(self, groups: Sequence[Group]) -> list[dict[str, Any]] | None:
        """Return what differs from the numbers that the session was created with.

        Raises:
            InvalidRequestError: something was changed that a session has from its creation.
        """
        if changed := self._outgrown(groups):
            raise InvalidRequestError(
                f"param_groups: {changed}, which a session has from its creation; call "
                "optimizer.load_state_dict(optimizer.state_dict()), which makes another session, or make a new "
                "optimizer where the state lacks what is kept from now on",
                metadata={"field": "param_groups"},
            )
        now = [self._family.numbers_of(group) for group in groups]
        differing = [
            {name: value for name, value in numbers.items() if value != then[name]}
            for numbers, then in zip(now, self._numbers, strict=True)
        ]
        return differing if any(differing) else None

    def _outgrown(self, groups: Sequence[Group]) -> str:
        """Say what of the groups the present session cannot have; empty if nothing."""
        now = self._family.structure_of(groups)
        for name, value in now.items():
            if value != self._structure[name]:
                return f"{name} was changed from {self._structure[name]!r} to {value!r}"
        if self._family.keeps_momentum(groups) and "momentum_buffer" not in self.session.slots:
            return "momentum was changed from 0 in all groups"
        if len(groups) != len(self._numbers):
            return f"there are {len(groups)} groups instead of {len(self._numbers)}"
        return ""

    def upload(self, *, everything: bool = False) -> None:
        """Send the parameters where somebody else has changed them since the last step, or whether or not.

        Raises:
            StepwireError: as `Session.load`.
        """
        self._settle()
        if everything or self.parameters.changed():
            self._mirror.upload()
            self._memory.uploaded()

    def check_open(self) -> None:
        """Refuse to go on after the end.

        Raises:
            InvalidRequestError: `close` or `detach` was called.
        """
        if self.closed:
            raise InvalidRequestError(
                "the optimizer is closed; make a new one, with session=… if the old session was left on the server",
                metadata={"field": "optimizer"},
            )

    # --- state -------------------------------------------------------------------------------------------

    def exported(self, groups: Sequence[Group]) -> tuple[list[dict[str, Any]], Kept]:
        """Return torch's state of each parameter in order, and what it has no place for.

        Raises:
            StepwireError: as `Session.state`.
        """
        self.check_open()
        self.upload()
        return self._mirror.exported(groups)

    def load(self, entries: Sequence[Mapping[str, Any]], kept: Kept, groups: Sequence[Group]) -> None:
        """Replace the state; the model's parameters stay as they are.

        Raises:
            InvalidRequestError: the state is another rule's or another model's; nothing was changed.
            StepwireError: as `Session.load_state`.
        """
        self.check_open()
        self._family.configuration(groups)  # groups of another optimizer lack its numbers
        self._settle()
        session = self._create(self.parameters, groups) if self._outgrown(groups) else self.session
        try:
            state = self._mirror.loadable(session, entries, kept, groups)
            session.load_state(state, timeout=self._options.timeout)
        except BaseException:
            self._mirror.forget()
            if session is not self.session:
                session.close()
            raise
        if session is not self.session:
            self._move_to(session, self.parameters, groups)
        self._mirror.offer(kept)
        self._memory.uploaded()

    def end(self, *, keep: bool) -> None:
        """Let go: end the session on the server, or leave it there. Ending twice is harmless."""
        if self.closed:
            return
        self.closed = True
        if self._sender is not None:
            self._sender.close()
        self._memory.release()
        if keep:
            self.session.detach()
        else:
            self.session.close()
        if self._options.owns_client:
            self._client.close()
