"""The session behind an optimizer. The model's parameters are the truth, and the session follows them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from stepwire.errors import InvalidRequestError, StepwireError, UnsupportedFeatureError
from stepwire.results import Snapshot
from stepwire.session import Session
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.torch.backward import BackwardSender, Numbers
from stepwire.torch.mirror import ExtraState, Mirror
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.recovery import Recovery
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.sessions import PRECISION, create_session, find_session
from stepwire.torch.views import SharedViews, check_dtypes
from stepwire.wire.dtypes import dtype_named

__all__ = ["Backing"]

_LOG = logging.getLogger(__name__)


class Backing:
    """One session, and the parameters that it steps.

    Attributes:
        session: the present session; another one after `regroup` and `resume`.
        parameters: the parameters that the session steps.
        closed: True after `end`.
    """

    session: Session

    def __init__(self, rule: TorchRule, options: RemoteOptions, groups: Sequence[Group]) -> None:
        """Create a session of these groups, or resume the session of the options and pull its parameters.

        Args:
            rule: the rule.
            options: the options of the optimizer.
            groups: torch's parameter groups.

        Raises:
            UnsupportedFeatureError: a parameter cannot be stepped by a server.
            InvalidRequestError: the session of the options is of another model or optimizer.
            StepwireError: as `Client.create_session` and `Client.session`.
        """
        self._rule = rule
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
                self._use_first(self._create(self.parameters, groups), groups)
            else:
                self.resume(options.session, groups)
        except BaseException:
            if options.owns_client:
                self._client.close()
            raise

    # --- sessions ----------------------------------------------------------------------------------------

    def _create(self, parameters: Parameters, groups: Sequence[Group]) -> Session:
        self._check(parameters)
        return create_session(self._client, self._options, self._rule, parameters, groups)

    def _check(self, parameters: Parameters) -> None:
        """Refuse options that do not work with these parameters, before a session exists."""
        for name in ("shared_views", "send_in_backward"):
            if getattr(self._options, name) and len(self._client.targets) > 1:
                raise UnsupportedFeatureError(
                    f"{name}: the model is partitioned over several servers or channels; leave the option out, or use "
                    "one server and one channel",
                    metadata={"field": name, "feature": f"torch_{name}"},
                )
        if self._options.shared_views:
            check_dtypes(parameters, *self._dtypes(parameters))

    def _dtypes(self, parameters: Parameters) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Return the wire dtypes of gradients and of replies."""
        sent, received = self._options.gradient_dtype, self._options.reply_dtype
        return (
            dtype_named(sent or parameters.dtype, "gradient_dtype", gradients=True),
            dtype_named(received or parameters.dtype, "reply_dtype"),
        )

    def _use(
        self, session: Session, parameters: Parameters, groups: Sequence[Group], memory: Parameters | SharedViews
    ) -> None:
        """Use a session from now on; its parameters are the present values, and `memory` is theirs."""
        self.session, self.parameters = session, parameters
        configuration = session.config
        self._structure = self._rule.structure_of(groups)
        self._precisions = [group.get(PRECISION) for group in groups]
        self._numbers = [configuration.arguments(index) for index in range(len(configuration.groups))]
        self._gradient_dtype, self._reply_dtype = self._dtypes(parameters)
        self._mirror = Mirror(session, parameters, self._rule, self._reply_dtype, self._options.timeout)
        self._recovery = Recovery(session, parameters, self._reply_dtype, self._options.timeout)
        if self._sender is not None:
            self._sender.close()
        watches = self._options.send_in_backward
        self._sender = BackwardSender(parameters, self._begin, self._present_numbers) if watches else None
        before, self._memory = self._memory, memory
        before.release()
        parameters.follow()

    def _memory_of(self, session: Session, parameters: Parameters) -> Parameters | SharedViews:
        """Return the memory in which a session steps the parameters; with shared views they move there."""
        return SharedViews(session, parameters) if self._options.shared_views else parameters

    def _use_first(self, session: Session, groups: Sequence[Group]) -> None:
        """Use the first session, and close it after a failure: no other code has the session."""
        try:
            self._use(session, self.parameters, groups, self._memory_of(session, self.parameters))
        except BaseException:
            session.close()
            raise

    def _move_to(
        self, session: Session, parameters: Parameters, groups: Sequence[Group], state: Callable[[], Snapshot]
    ) -> None:
        """Load a state into a new session, and use the session instead of the present one, which is closed.

        After a failure the new session is closed, and everything is as before.
        """
        try:
            session.load_state(state(), timeout=self._options.timeout)
            try:
                memory = self._memory_of(session, parameters)
            except UnsupportedFeatureError as error:  # the session before had shared memory
                _LOG.warning("parameters are ordinary memory from now on, and each step copies them: %s", error)
                memory = parameters
        except BaseException:
            session.close()
            raise
        old = self.session
        self._use(session, parameters, groups, memory)
        try:
            old.close()
        except StepwireError as error:  # the lease of the session ends it
            _LOG.warning("the session before was not closed: %s", error)

    def resume(self, session_id: str, groups: Sequence[Group]) -> None:
        """Attach to an existing session, and copy its parameters into the model.

        Args:
            session_id: the id of the session.
            groups: torch's parameter groups.

        Raises:
            InvalidRequestError: the session is of another model, another optimizer, or other options.
            StepwireError: as `Client.session`.
        """
        self._check(self.parameters)
        session = find_session(self._client, session_id, self._options, self._rule, self.parameters, groups)
        pulled: Any = session.pull()
        for name, target in self.parameters.targets().items():
            with np.errstate(over="ignore"):
                target[...] = pulled[name]
        self.parameters.stepped(pulled)
        self._use(session, self.parameters, groups, self._memory_of(session, self.parameters))

    def regroup(self, groups: Sequence[Group]) -> None:
        """Move to a new session of other groups, with the state of the parameters that both sessions have.

        Raises:
            InvalidRequestError: the optimizer is closed.
            StepwireError: as `Client.create_session`; nothing was changed.
        """
        self.check_open()
        parameters = Parameters(groups)
        self._follow()
        session = self._create(parameters, groups)
        self._move_to(session, parameters, groups, lambda: self._mirror.carried(session.state(), parameters))

    # --- steps -------------------------------------------------------------------------------------------

    def step(self, groups: Sequence[Group], loss_scale: float | None) -> None:
        """Apply a step with the present gradients and the groups' present numbers.

        Args:
            groups: torch's parameter groups.
            loss_scale: the factor of the gradients; None for 1.

        Raises:
            InvalidRequestError: the optimizer is closed, or gradients or numbers are not served; nothing was applied.
            StepwireError: as `Session.step`.
        """
        self.check_open()
        self._groups, self._loss_scale = groups, loss_scale
        overrides = self.overrides(groups)
        reply = self._reply((overrides, loss_scale))
        if reply is not None:  # without any gradient nothing changes, as with torch
            self._memory.stepped(reply)
            self._mirror.forget()
            self._recovery.stepped()

    def _reply(self, numbers: Numbers) -> Any:
        """Apply a step with the present gradients, and return its reply; None without any gradient."""
        if self._sender is not None:
            with self._recovery.watch():
                if (reply := self._sender.finish(numbers)) is not None:
                    return reply
        if not (gradients := self._memory.gradients()):
            return None
        self.upload()
        with self._recovery.watch():
            return self.session.step(gradients, **self._step_options(numbers))

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
        """Return the numbers of a step; None if no messages carry gradients, or parameters must be sent first."""
        choice = self.session.transport
        if self.closed or choice is None or choice.name in ("shm", "cuda_ipc") or self.parameters.changed():
            return None
        if self.session.statistics().step_in_doubt is not None:  # a whole gradient tells whether it is that step again
            return None
        return self.overrides(self._groups), self._loss_scale

    def _begin(self, feed: GradientFeed, names: frozenset[str], numbers: Numbers) -> Future[Any]:
        # The step reads the shapes of these arrays alone, and the gradients come from the feed. Untouched memory costs
        # nothing.
        shapes = {t.name: np.empty(t.shape, t.dtype) for t in self.parameters.tensors if t.name in names}
        return self.session.step_async(shapes, feed=feed, **self._step_options(numbers))

    def _abort_begun(self) -> None:
        """Abort the step that a backward pass began, if there is one."""
        if self._sender is not None:
            self._sender.drop()

    # --- numbers -----------------------------------------------------------------------------------------

    def overrides(self, groups: Sequence[Group]) -> list[dict[str, Any]] | None:
        """Return the numbers of each group that differ from those of the session's creation; None for no difference.

        Raises:
            InvalidRequestError: an option that is fixed at the session's creation was changed.
        """
        if changed := self._structure_change(groups):
            raise InvalidRequestError.of(
                "param_groups",
                f"{changed}, which is fixed at a session's creation. Call "
                "optimizer.load_state_dict(optimizer.state_dict()) for another session, or make a new optimizer if the "
                "state has no such slot",
            )
        now = [self._rule.numbers_of(group) for group in groups]
        differing = [
            {name: value for name, value in numbers.items() if value != then[name]}
            for numbers, then in zip(now, self._numbers, strict=True)
        ]
        return differing if any(differing) else None

    def _structure_change(self, groups: Sequence[Group]) -> str:
        """Return the change of the groups that needs another session, in words; empty for none."""
        now = self._rule.structure_of(groups)
        for name, value in now.items():
            if value != self._structure[name]:
                return f"{name} was changed from {self._structure[name]!r} to {value!r}"
        if self._rule.keeps_momentum(groups) and "momentum_buffer" not in self.session.slots:
            return "momentum was changed from 0 in all groups"
        if len(groups) != len(self._numbers):
            return f"there are {len(groups)} groups instead of {len(self._numbers)}"
        for index, (group, precision) in enumerate(zip(groups, self._precisions, strict=True)):
            if group.get(PRECISION) != precision:
                return f"{PRECISION} of group {index} was changed from {precision!r} to {group.get(PRECISION)!r}"
        return ""

    def upload(self, *, everything: bool = False) -> None:
        """Send the parameters if other code has changed them since the last step.

        Args:
            everything: send the parameters also if they are not changed.

        Raises:
            StepwireError: as `Session.load`.
        """
        self._abort_begun()
        if not everything and not self.parameters.changed():
            return
        self._recovery.settle()
        if everything or self.parameters.changed():
            self._mirror.upload()
            self._memory.uploaded()

    def _follow(self) -> None:
        """Make the model whole, and the session's parameters the model's.

        Raises:
            StepwireError: as `Recovery.settle` and `Session.load`.
        """
        self._abort_begun()
        self._recovery.settle()
        self.upload()

    def check_open(self) -> None:
        """Refuse a call after `end`.

        Raises:
            InvalidRequestError: `close` or `detach` was called.
        """
        if self.closed:
            raise InvalidRequestError.of(
                "optimizer",
                "the optimizer is closed; make a new one, with session=… if its session was left on the server",
            )

    # --- state -------------------------------------------------------------------------------------------

    def exported(self, groups: Sequence[Group]) -> tuple[list[dict[str, Any]], ExtraState]:
        """Return torch's state of each parameter in order, and the state beyond torch's.

        Raises:
            StepwireError: as `Session.state`.
        """
        self.check_open()
        self._follow()
        return self._mirror.exported(groups)

    def load(self, entries: Sequence[Mapping[str, Any]], extra: ExtraState, groups: Sequence[Group]) -> None:
        """Replace the state. The model's parameters stay.

        Args:
            entries: torch's state of each parameter, in order.
            extra: the state beyond torch's.
            groups: torch's parameter groups.

        Raises:
            InvalidRequestError: the state is of another rule or another model; nothing was changed.
            StepwireError: as `Session.load_state`.
        """
        self.check_open()
        self._rule.optimizer_for(groups)  # groups of another optimizer lack its numbers
        self._abort_begun()
        self._recovery.settle()
        if self.session.statistics().step_in_doubt is not None:  # a load settles the number that the state goes on from
            self.upload(everything=True)
        try:
            if self._structure_change(groups):
                session = self._create(self.parameters, groups)
                state = functools.partial(self._mirror.loadable, session, entries, extra, groups)
                self._move_to(session, self.parameters, groups, state)
            else:
                state_now = self._mirror.loadable(self.session, entries, extra, groups)
                self.session.load_state(state_now, timeout=self._options.timeout)
        except BaseException:
            self._mirror.forget()
            raise
        self._mirror.offer(extra)
        self._memory.uploaded()

    def end(self, *, keep: bool) -> None:
        """Close the session, or detach from it with `keep`. A second call is harmless."""
        if self.closed:
            return
        self.closed = True
        if self._sender is not None:
            self._sender.close()
        try:
            self._recovery.settle_before_end()
        except StepwireError as error:
            _LOG.warning("the outcome of a step that failed is unknown; the model may be of two steps: %s", error)
        self._memory.release()
        if keep:
            self.session.detach()
        else:
            self.session.close()
        if self._options.owns_client:
            self._client.close()
