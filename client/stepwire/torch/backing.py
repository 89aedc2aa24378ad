"""The session behind an optimizer. The model and the parameter groups are the truth, and the session follows them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from stepwire.connection.errands import as_a_whole
from stepwire.errors import DataLossError, SessionNotFoundError, StepwireError
from stepwire.session import Session
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.torch.backward import BackwardSender, Numbers
from stepwire.torch.life import Life
from stepwire.torch.live_state import LiveState
from stepwire.torch.mirror import ExtraState, Wanted
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.placement import Placement, Placer
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.states import SnapshotView
from stepwire.torch.succession import edited, last_step, loaded, regrouped
from stepwire.torch.workers import leave, refuse_among_workers

__all__ = ["Backing"]

_LOG = logging.getLogger(__name__)
_LOST = (SessionNotFoundError, DataLossError)


class Backing:
    """One session, and the parameters that it steps.

    Attributes:
        life: the time until `end`, in this process.
        weight: the weight of the gradients in a weighted mean over several workers; None for 1.
    """

    def __init__(self, rule: TorchRule, options: RemoteOptions, groups: Sequence[Group], live: LiveState) -> None:
        """Create a session of these groups, or resume that of the options and pull its parameters.

        Args:
            rule: the rule.
            options: the options of the optimizer.
            groups: torch's parameter groups.
            live: the state that users see.

        Raises:
            UnsupportedFeatureError: a parameter cannot be stepped by a server.
            InvalidRequestError: the session of the options is of another model or optimizer.
            StepwireError: as `Client.create_session` and `Client.session`.
        """
        self._rule = rule
        self._options = options
        self._live = live
        self._groups = groups
        self._view: SnapshotView | None = None
        self._sender: BackwardSender | None = None
        self._loss_scale: float | None = None
        self.weight: float | None = None
        self.life = Life()
        live.serve(self._present_view, rule.keys)
        parameters = Parameters(groups)
        self._client = options.client()
        self._placer = Placer(self._client, options, rule)
        try:
            self._placer.sparse.declare(parameters, groups)
            if options.session is None:
                self._use_first(self._placer.created(parameters, groups), parameters, groups)
            else:
                self._resume(options.session, parameters, groups)
        except BaseException:
            if options.owns_client:
                self._client.close()
            raise

    @property
    def session(self) -> Session:
        """The present session; another one after a move or a resume."""
        return self._placement.session

    @property
    def parameters(self) -> Parameters:
        """The parameters that the session steps."""
        return self._placement.parameters

    def _use(self, placement: Placement) -> None:
        """Use a session from now on; its parameters are the present values."""
        before, self._placement = getattr(self, "_placement", None), placement
        if self._sender is not None:
            self._sender.close()
        watches = self._options.send_in_backward
        self._sender = BackwardSender(placement.parameters, self._begin, self._present_numbers) if watches else None
        if before is not None and before.memory is not placement.memory:
            before.memory.release()
        placement.parameters.follow()
        self._live.settled([tensor.parameter for tensor in placement.parameters.tensors])
        self._view = None

    def _use_first(self, session: Session, parameters: Parameters, groups: Sequence[Group]) -> None:
        """Use the first session, and close it after a failure: no other code has the session."""
        mirror = self._placer.mirror(session, parameters)
        try:
            mirror.join()
            self._use(self._placer.placed(mirror, groups))
        except BaseException:
            if not mirror.is_shared:
                session.close()
            raise

    def _resume(self, session_id: str, parameters: Parameters, groups: Sequence[Group]) -> None:
        session = self._placer.found(session_id, parameters, groups)
        self._use(self._placer.placed(self._placer.mirror(session, parameters), groups))

    def resume(self, session_id: str, groups: Sequence[Group]) -> None:
        """Attach to an existing session, and copy its parameters into the model.

        Args:
            session_id: the id of the session.
            groups: torch's parameter groups.

        Raises:
            InvalidRequestError: the session is of another model, another optimizer, or other options.
            StepwireError: as `Client.session`.
        """
        self.life.check()
        self._abort_begun()
        parameters = self.parameters if self._placement.fits(groups) else self._regrouped(groups)
        self._resume(session_id, parameters, groups)
        self._live.replaced({})

    def _move(self, groups: Sequence[Group], parameters: Parameters, wanted: Wanted) -> None:
        """Move to a new session with another state. After a failure everything is as before."""
        old = self._placement
        session = self._placer.created(parameters, groups)
        try:
            mirror = self._placer.mirror(session, parameters)
            mirror.inherit(old.mirror, wanted.olds)
            mirror.load_state(mirror.composed(wanted, groups))
            placement = self._placer.placed(mirror, groups, again=True)
        except BaseException:
            session.close()
            raise
        stay = {id(tensor.parameter) for tensor in parameters.tensors}
        for tensor in old.parameters.tensors:
            if id(tensor.parameter) not in stay:
                self._live.leave(tensor.parameter)
        self._use(placement)
        try:
            old.session.close()
        except StepwireError as error:  # the lease of the session ends it
            _LOG.warning("the session before was not closed: %s", error)

    # --- the groups and the state are the truth ------------------------------------------------------------

    def follow(self, groups: Sequence[Group]) -> None:
        """Have the session follow the groups' parameters, and the state that users have written.

        Raises:
            UnsupportedFeatureError: a parameter cannot be stepped by a server.
            InvalidRequestError: the optimizer is closed, or the state does not fit the parameters.
            StepwireError: as `Client.create_session` and `Session.load_state`; nothing was changed.
        """
        self.life.check()
        self._groups = groups
        if not any(group["params"] for group in groups):
            return
        if not self._placement.fits(groups):
            refuse_among_workers(self.session, "param_groups", "all of them would have to move to another session")
            self._regroup(groups, self._regrouped(groups))
        elif edits := self._live.edits():
            self._settle()
            self._put(edits, groups)

    def _regroup(self, groups: Sequence[Group], parameters: Parameters) -> None:
        """Move to a new session of other parameters, or of other groups or tables of them."""
        self._settle()
        wanted = regrouped(self.parameters, parameters, self._live, self._present_view(), last_step(self.session))
        self._move(groups, parameters, wanted)

    def _put(self, edits: Mapping[Any, dict[str, Any]], groups: Sequence[Group]) -> None:
        """Load the state of some parameters."""
        view = None if len(edits) == len(self.parameters.tensors) else self._present_view()
        wanted = edited(self.parameters, edits, view, last_step(self.session))
        mirror = self._placement.mirror
        mirror.load_state(mirror.composed(wanted, groups))
        self._placement.memory.uploaded()
        self._expire()

    def _regrouped(self, groups: Sequence[Group]) -> Parameters:
        return self.parameters.regrouped(groups, by_rows=self._placer.sparse.by_rows(groups))

    def _settle(self) -> None:
        """Settle everything whose outcome is open: a step that was begun, that failed, or that is in doubt."""
        self._abort_begun()
        self._placement.recovery.settle()
        if self.session.statistics().step_in_doubt is not None:  # a load settles the number that the state goes on from
            self.upload(everything=True)

    def _expire(self) -> None:
        """Forget the state as it was read: the session's state has changed, or is about to change."""
        self._live.expire()  # it may read for the last time
        self._view = None

    def _present_view(self) -> SnapshotView:
        """Return the state of the session, fetched once between two changes."""
        self.life.check()
        if self._view is None:
            self._placement.recovery.settle()
            self._view = self._placement.mirror.view()
        return self._view

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
        self.follow(groups)
        self._loss_scale = loss_scale
        if not any(group["params"] for group in groups):
            return
        if (successor := self._placer.sparse.followed(self.parameters, groups)) is not None:
            self._regroup(groups, successor)
        numbers, sender = (self._placement.overrides(groups), loss_scale), self._sender
        self._expire()
        if sender is not None and self._followed(lambda: sender.finish(numbers)):
            return
        gradients = self._placement.memory.gradients()
        if gradients or self._placement.mirror.is_shared:  # without any gradient nothing changes, as with torch
            if sender is None or not sender.committed:  # else the model may show the reply of this very step
                self.upload()
            self._followed(lambda: self.session.step(gradients, **self._step_options(numbers)))

    def _followed(self, step: Callable[[], Any]) -> bool:
        """Apply a step, and follow its reply as one with it; tell whether there was one."""

        def followed() -> bool:
            if (reply := step()) is not None:
                self._placement.memory.stepped(reply)
                self._placement.mirror.stepped()
                self._placement.recovery.stepped()
            return reply is not None

        with self._placement.recovery.watch():
            return as_a_whole(followed)

    def _step_options(self, numbers: Numbers) -> dict[str, Any]:
        return {
            "hyperparameters": numbers[0],
            "loss_scale": numbers[1],
            "gradient_dtype": self._placement.gradient_dtype,
            "reply_dtype": self._placement.reply_dtype,
            "out": self._placement.memory.targets(),
            "weight": self.weight,
            "timeout": self._options.timeout,
        }

    def _present_numbers(self) -> Numbers | None:
        """Return the numbers of a step; None if no messages carry gradients, or something must be sent first."""
        if self.life.is_over or not self._placement.can_begin(self._groups):
            return None
        return self._placement.overrides(self._groups), self._loss_scale

    def _begin(self, feed: GradientFeed, names: frozenset[str], numbers: Numbers) -> Future[Any]:
        return self.session.step_async(self.parameters.shapes(names), feed=feed, **self._step_options(numbers))

    def _abort_begun(self) -> None:
        """Abort the step that a backward pass began, if there is one."""
        if self._sender is not None:
            self._sender.drop()

    def upload(self, *, everything: bool = False) -> None:
        """Send the parameters if other code has changed them since the last step.

        Args:
            everything: send the parameters also if they are not changed.

        Raises:
            StepwireError: as `Session.load`.
        """
        self._abort_begun()
        placement = self._placement
        if not everything and not placement.memory.changed():
            return
        placement.recovery.settle()
        if everything or placement.memory.changed():
            placement.mirror.upload()
            placement.memory.uploaded()

    # --- state -------------------------------------------------------------------------------------------

    def exported(self, groups: Sequence[Group]) -> tuple[dict[Any, Any], ExtraState]:
        """Return torch's state by parameter, and the state beyond torch's.

        Raises:
            StepwireError: as `Session.state`.
        """
        self.follow(groups)
        self._abort_begun()
        self._placement.recovery.settle()
        self.upload()
        self._view = None  # it may be older than an upload, and its arrays are the caller's from now on
        try:
            extra = self._placement.mirror.extra(self._present_view().snapshot)
            return self._live.exported([parameter for group in groups for parameter in group["params"]]), extra
        finally:
            self._view = None

    def load(self, entries: Sequence[Mapping[str, Any]], extra: ExtraState, groups: Sequence[Group]) -> None:
        """Replace the state, in a new session if the present one is lost. The model's parameters stay.

        Args:
            entries: torch's state of each parameter, in order.
            extra: the state beyond torch's.
            groups: torch's parameter groups.

        Raises:
            InvalidRequestError: the state is of another rule or another model; nothing was changed.
            StepwireError: as `Session.load_state`.
        """
        self.life.check()
        self._rule.optimizer_for(groups)  # groups of another optimizer lack its numbers
        self._groups = groups
        try:
            self._settle()
            self._load(entries, extra, groups)
        except _LOST as error:
            _LOG.warning("a new session gets the state: %s", error)
            self._load_anew(entries, extra, groups, None)
        except BaseException:
            self._placement.mirror.forget()
            raise
        self._placement.memory.uploaded()
        self._expire()

    def _load(self, entries: Sequence[Mapping[str, Any]], extra: ExtraState, groups: Sequence[Group]) -> None:
        placement = self._placement
        if placement.structure_change(groups) or not placement.fits(groups):
            refuse_among_workers(self.session, "load_state_dict", "the state dict has other groups or options")
            self._load_anew(entries, extra, groups, None if placement.mirror.is_exact else self._present_view())
            return
        wanted = loaded(placement.parameters, placement.parameters, entries, extra, None, last_step(self.session))
        state = placement.mirror.composed(wanted, groups)
        self._live.release()
        placement.mirror.load_state(state)

    def _load_anew(
        self,
        entries: Sequence[Mapping[str, Any]],
        extra: ExtraState,
        groups: Sequence[Group],
        before: SnapshotView | None,
    ) -> None:
        """Load a state into a new session, which has the masters of `before`."""
        parameters = self._regrouped(groups)
        wanted = loaded(self.parameters, parameters, entries, extra, before, last_step(self.session))
        with contextlib.suppress(*_LOST):
            self._live.release()
        self._move(groups, parameters, wanted)

    def end(self, *, keep: bool) -> None:
        """Close the session, or detach from it with `keep`. A second call is harmless.

        Raises:
            SessionNotFoundError: a step has failed, and its session is lost; everything is closed all the same.
        """
        if self.life.is_over:
            return
        if keep:  # a session that is left goes on without this model
            try:
                self.follow(self._groups)
                self.upload()
            except StepwireError as error:
                _LOG.warning("the last changes of the model, the groups or the state are not in the session: %s", error)
        self.life.closed = True
        with contextlib.ExitStack() as ending:
            if self._options.owns_client:
                ending.callback(self._client.close)
            ending.callback(leave, self.session, keep=keep)
            ending.callback(lambda: self._placement.memory.release())
            if self._sender is not None:
                self._sender.close()
            try:
                self._placement.recovery.settle_before_end()
            except SessionNotFoundError:
                raise
            except StepwireError as error:
                if self._placement.recovery.is_torn:
                    _LOG.warning("the outcome of a step is unknown; the model may be of two steps: %s", error)
