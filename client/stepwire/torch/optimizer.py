"""The base of optimizers like torch's with their state and arithmetic on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn

import torch

from stepwire.errors import SessionNotFoundError
from stepwire.results import StepResult, TransportChoice
from stepwire.session import Session
from stepwire.torch.backing import Backing
from stepwire.torch.error_hints import with_hints
from stepwire.torch.hooks import hooked
from stepwire.torch.live_state import LiveState
from stepwire.torch.mirror import ExtraState
from stepwire.torch.options import split_options
from stepwire.torch.refused import REFUSED_OPTIONS, refuse_options
from stepwire.torch.rules import STATE_KEYS, TORCH_RULES, TorchRule
from stepwire.torch.sessions import PRECISION
from stepwire.torch.signatures import signature_of
from stepwire.torch.workers import refuse_among_workers

__all__ = ["RemoteOptimizer"]

_KEY = "stepwire"


class RemoteOptimizer(torch.optim.Optimizer):
    """A mixin for an optimizer class, before torch's own class. The constructor and the parameter groups are torch's.

    `step` reads `param_groups` anew every time, so schedulers and users may change numbers as usual. A parameter
    without a gradient keeps its state. Torch's version counters reveal parameters that other code changed in place, and
    such parameters are sent first. The counters miss a change through `.data`: call `upload_parameters` after it.
    """

    rule: ClassVar[TorchRule]
    param_groups: list[dict[str, Any]]
    _backing: Backing | None = None
    _live: LiveState | None = None
    _packed_state: dict[Any, Any] | None = None
    _is_loading = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Find the rule of the class, and append the names of `RemoteOptions` to torch's signature."""
        super().__init_subclass__(**options)
        if cls.__name__ in TORCH_RULES:
            cls.rule = TORCH_RULES[cls.__name__]
        cls.__signature__ = signature_of(cls, RemoteOptimizer)

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """Make the optimizer and its session.

        Args:
            params: parameters, named parameters, or groups, as for torch.
            args: torch's own arguments.
            kwargs: torch's own arguments, and those of `RemoteOptions`.

        Raises:
            UnsupportedFeatureError: an option or a parameter is not served; the message has the reason.
            InvalidRequestError: a number is out of range, or the session to resume is of another model.
            UnavailableError: the server cannot be reached.
        """
        self._options, own = split_options(kwargs)
        super().__init__(params, *args, **own)
        refuse_options(self.param_groups)
        self.state.clear()  # Adagrad's constructor makes state, and the state is on the server
        with with_hints(self._options, None):
            self._backing = Backing(self.rule, self._options, self.param_groups, self.state)
        # A user may compile a whole training step, and a call to a server cannot be traced.
        self._apply_step = torch.compiler.disable(self._backing.step)

    # --- state of the optimizer --------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The state of each parameter, by parameter, as torch has it: reads fetch it, and writes are sent.

        A read fetches all of the state, once between two steps. A write is sent before the next step.
        """
        if self._packed_state is not None:  # while torch's own code makes a state dict, or reads groups
            return self._packed_state
        if self._live is None:
            self._live = LiveState()
        return self._live

    @state.setter
    def state(self, value: Any) -> None:
        if value is self._live:
            return
        items = list(value.items())
        self.state.clear()
        self.state.update(items)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True to have `GradScaler` call `step` also after an overflow, with its scale, and no gradients unscaled.

        False while other code has put a wrapper into the place of `step`: accelerate counts the calls, and would take a
        step that was left out for one that was taken. Torch's schedulers have wrappers too, and only look at the calls.
        """
        if self.session.config.aggregation is not None:  # so that `step` sees the scaler, and refuses it
            return True
        wrapper = self.__dict__.get("step")
        return self._options.amp_scaling and (wrapper is None or hasattr(wrapper, "_wrapped_by_lr_sched"))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore torch's own value, which is that of its fused form."""

    @property
    def backing(self) -> Backing:
        """The session behind the optimizer, with the parameters that it steps."""
        assert self._backing is not None  # since the constructor
        return self._backing

    @property
    def session(self) -> Session:
        """The session, for operations beyond torch's optimizers: averages, shared memory, listings."""
        return self.backing.session

    @property
    def session_id(self) -> str:
        """The id of the session, for `session=` in a later process; another id after `add_param_group`. It is kept."""
        return self.session.session_id

    @property
    def applied_step(self) -> int:
        """The number of the last applied step, also after a resume."""
        return self.session.applied_step

    @property
    def weight(self) -> float | None:
        """The weight of the next steps' gradients in a weighted mean over several workers; None for 1."""
        return self.backing.weight

    @weight.setter
    def weight(self, value: float | None) -> None:
        self.backing.weight = value

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last step: norms, clipping, times; None before the first."""
        return self.session.last_result

    @property
    def transport(self) -> TransportChoice | None:
        """The transport of gradients, with the reason for it; None before the first step."""
        return self.session.transport

    # --- torch's methods ---------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one step on the server, exactly once. The parameters have their new values when the call returns.

        Args:
            closure: a function that evaluates the model again and returns the loss.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            NonFiniteGradientError: NaN or Inf with `non_finite="reject"`; nothing was applied.
            InvalidRequestError: a gradient or a number is not served; nothing was applied.
            FencedError: another process attached to the session.
            StepwireError: as `Session.step`; call `step` again with the same gradients after `UnavailableError`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None:
            refuse_among_workers(self.session, "GradScaler", "each would leave out other steps; use bfloat16")
        if found_inf is None or not float(found_inf):  # set by GradScaler, which lowers the scale then
            refuse_options(self.param_groups)
            with with_hints(self._options, self.session):
                self._apply_step(self.param_groups, None if scale is None else float(scale))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters. An optimizer with a session moves to a new session, with the state of the old one.

        Args:
            param_group: the group, as for torch.

        Raises:
            StepwireError: as the constructor; the groups are as before.
        """
        if self._backing is not None:
            refuse_among_workers(self.session, "add_param_group", "all of them would have to move to another session")
        super().add_param_group(param_group)
        if self._backing is None:
            return
        try:
            refuse_options(self.param_groups)
            with with_hints(self._options, self.session):
                self._backing.follow(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own state dict, for this optimizer or torch's optimizer of the same name.

        Besides `state` and `param_groups` the dict has `"stepwire"`: the session, its step, and the state beyond
        torch's. With `light_state_dict` the dict has no tensors, and is valid as long as the session lives.

        Raises:
            StepwireError: as `Session.state`.
        """
        if self._options.light_state_dict:
            return self.handle()
        ours: dict[str, Any] = {}

        def show(_: Any) -> None:
            with with_hints(self._options, self.session):
                self._packed_state, extra = self.backing.exported(self.param_groups)
            ours.update(extra._asdict())

        return self._packed(show, ours)

    def handle(self) -> dict[str, Any]:
        """Return a state dict without tensors, with which `load_state_dict` resumes the session, which is kept."""
        refuse_among_workers(self.session, "handle", "a worker joins by its job and its index")

        def show(_: Any) -> None:
            with with_hints(self._options, self.session):
                self.backing.follow(self.param_groups)
            self.session.keep()
            self._packed_state = {}

        return self._packed(show, {"handle": True})

    def _packed(self, show: Callable[[Any], None], ours: dict[str, Any]) -> dict[str, Any]:
        """Return torch's own state dict of the state that `show` shows, with our key."""

        def add(_: Any, made: dict[str, Any]) -> dict[str, Any]:
            self._packed_state = None
            return {**made, _KEY: {"session_id": self.session.own_id, "step": self.applied_step, **ours}}

        try:
            with (
                hooked(self.register_state_dict_pre_hook, show),
                hooked(self.register_state_dict_post_hook, add, prepend=True),
            ):
                packed: dict[str, Any] = super().state_dict()
        finally:
            self._packed_state = None
        return packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what torch's own code, or a user's, sets: groups, hooks, and a state, which is sent."""
        given = dict(state)
        wanted = given.pop("state", None)
        before, self._packed_state = self._packed_state, {}  # torch's classes look into the state, and fetch nothing
        try:
            super().__setstate__(given)
        finally:
            self._packed_state = before
        if wanted is not None and not self._is_loading:
            self.state = wanted

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of torch's optimizer of the same name.

        The model's parameters stay, as with torch; load the model's own state dict too. The dict of `handle` resumes
        the session instead, and pulls its parameters into the model.

        Args:
            state_dict: the dict of `state_dict` or `handle`.

        Raises:
            InvalidRequestError: the dict is of another rule or another model.
            StepwireError: as `Session.load_state`.
        """
        given: dict[str, Any] = {}

        def keep(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            given.update(incoming)
            return {**incoming, "state": {}}  # torch would cast moments to the parameters' dtype

        def load(_: Any) -> None:
            for group, own in zip(self.param_groups, before, strict=True):
                # The dict of an optimizer with other options has the same state.
                group.update({name: False for name in REFUSED_OPTIONS if name in group})
                group.pop(PRECISION, None)
                group.update({name: own[name] for name in own if name == PRECISION})
            self._load(given)

        before, self.param_groups = self.param_groups, [{**group} for group in self.param_groups]
        self._is_loading = True
        try:
            with (
                hooked(self.register_load_state_dict_pre_hook, keep),
                hooked(self.register_load_state_dict_post_hook, load, prepend=True),
            ):
                super().load_state_dict(state_dict)
        except BaseException:
            self.param_groups = before
            raise
        finally:
            self._is_loading = False

    def _load(self, given: dict[str, Any]) -> None:
        ours = given.get(_KEY) or {}
        if ours.get("handle"):
            self._resume(ours)
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        positions = [index for group in given["param_groups"] for index in group["params"]]
        states = {index: given["state"].get(index, {}) for index in positions}
        entries = [{key: entry[key] for key in entry if key in STATE_KEYS} for entry in states.values()]
        with with_hints(self._options, self.session):
            extra = ExtraState(*(ours.get(name, {}) for name in ExtraState._fields))
            self.backing.load(entries, extra, self.param_groups)
        kept: dict[Any, Any] = {key: value for key, value in given["state"].items() if key not in states}
        for parameter, (index, entry) in zip(parameters, states.items(), strict=True):
            own = {key: value for key, value in entry.items() if key not in STATE_KEYS}
            if own or (index in given["state"] and not entry):  # torch's state has empty entries too
                kept[parameter] = own
        self.state.replaced(kept)

    def _resume(self, ours: dict[str, Any]) -> None:
        """Resume the session of a handle, and close the optimizer's session before."""
        old = self.session
        refuse_among_workers(old, "load_state_dict", "the dict is a handle; a worker joins by its job and its index")
        self.backing.life.check()
        self.backing.resume(ours["session_id"], self.param_groups)
        if old.own_id != self.session.own_id:
            old.close()
        else:
            old.detach()  # the new stream has displaced the old one

    # --- beyond torch ------------------------------------------------------------------------------------

    def upload_parameters(self) -> None:
        """Send the model's parameters to the server, after a change through `.data`, which torch does not count.

        Raises:
            StepwireError: as `Session.load`.
        """
        with with_hints(self._options, self.session):
            self.backing.follow(self.param_groups)
            self.backing.upload(everything=True)

    def detach(self) -> None:
        """Leave the session on the server, for `session=` in another process. The optimizer is closed.

        Raises:
            SessionNotFoundError: as `close`.
        """
        self.backing.end(keep=True)

    def close(self) -> None:
        """Close the session on the server. Closing twice is harmless.

        Raises:
            SessionNotFoundError: a step has failed, and its session is lost, so the model may be of two steps; the
                message names the remedy. The optimizer is closed all the same.
        """
        self.backing.end(keep=False)

    def __enter__(self) -> Any:
        """Use the optimizer for a block, and close it after."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; an error of the block gets a failure to do so as a note."""
        try:
            self.close()
        except SessionNotFoundError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse: two optimizers would step one session."""
        raise _no_copy("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse `pickle` and `copy.copy` for the same reason."""
        raise _no_copy("pickled, or copied by copy.copy")


def _no_copy(what: str) -> TypeError:
    return TypeError(
        f"an optimizer with a session cannot be {what}: two would step one session. Save state_dict(), or handle() for "
        "the session alone, and load it into a new optimizer"
    )
