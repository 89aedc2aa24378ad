"""What turns an optimizer of torch into one whose state and arithmetic are a server's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NoReturn

import torch

from stepwire.errors import UnsupportedFeatureError
from stepwire.results import StepResult, TransportChoice
from stepwire.session import Session
from stepwire.torch.backing import Backing
from stepwire.torch.error_hints import advising
from stepwire.torch.mirror import Kept
from stepwire.torch.options import RemoteOptions, split_options
from stepwire.torch.rules import FAMILIES, Family

__all__ = ["RemoteOptimizer"]

_KEY = "stepwire"
_REFUSED = {
    "differentiable": "no gradient flows through a step that a server takes",
    "capturable": "a CUDA graph cannot contain a call to a server",
}


class RemoteOptimizer(torch.optim.Optimizer):
    """Mixed into an optimizer class, before torch's own, whose constructor and parameter groups it keeps.

    `step` reads `param_groups` anew every time, so schedulers and users may change numbers as ever. A parameter without
    a gradient keeps its state. Parameters that somebody changed in place are noticed by torch's version counters and
    sent first; a change through `.data` is not counted: call `upload_parameters` after it.
    """

    family: ClassVar[Family]
    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]
    _backing: Backing | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Find the rule, and show torch's own signature with ours behind it."""
        super().__init_subclass__(**options)
        if cls.__name__ in FAMILIES:
            cls.family = FAMILIES[cls.__name__]
        cls.__signature__ = _signature(cls)

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """Make the optimizer and its session.

        Args:
            params: as torch takes them: parameters, named parameters, or groups.
            args: torch's own.
            kwargs: torch's own, and those of `RemoteOptions`.

        Raises:
            UnsupportedFeatureError: an option or a parameter that cannot be served; the message says why.
            InvalidRequestError: a number out of range; or a session to go on with that is another model's.
            UnavailableError: the server cannot be reached.
        """
        self._options, own = split_options(kwargs)
        super().__init__(params, *args, **own)
        _refuse(self.param_groups)
        self.state.clear()  # Adagrad makes some; it lives on the server
        with advising(self._options, None):
            self._backing = Backing(self.family, self._options, self.param_groups)
        # For who compiles a whole training step: nothing in a call to a server can be traced.
        self._take_step = torch.compiler.disable(self._backing.step)
        self._step_supports_amp_scaling = self._options.amp_scaling

    # --- what it is doing --------------------------------------------------------------------------------

    @property
    def backing(self) -> Backing:
        """What stands between the parameters and their session."""
        assert self._backing is not None  # since the constructor
        return self._backing

    @property
    def session(self) -> Session:
        """The session, for what an optimizer of torch has no name for: averages, shared memory, listings."""
        return self.backing.session

    @property
    def session_id(self) -> str:
        """What a later process goes on by, as `session=`; another after `add_param_group`."""
        return self.session.session_id

    @property
    def applied_step(self) -> int:
        """The last step that was applied; after a resume, where the run goes on."""
        return self.session.applied_step

    @property
    def last_result(self) -> StepResult | None:
        """What the last step did: norms, clipping, times; None before the first."""
        return self.session.last_result

    @property
    def transport(self) -> TransportChoice | None:
        """Which way gradients go, and why no better one; None before the first step."""
        return self.session.transport

    # --- torch's methods ---------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the server, exactly once; the parameters are its outcome when this returns.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            NonFiniteGradientError: NaN or Inf with `non_finite="reject"`; nothing was applied.
            InvalidRequestError: a gradient or a number that is not served; nothing was applied.
            FencedError: another process took the session.
            StepwireError: as `Session.step`; call `step` again with the same gradients after `UnavailableError`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None or not float(found_inf):  # GradScaler has looked; it lowers the scale if it was set
            with advising(self._options, self.session_id):
                self._take_step(self.param_groups, None if scale is None else float(scale))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; once there is a session, by moving to a new one with all that the old one has.

        Raises:
            StepwireError: as the constructor; the groups are as before.
        """
        super().add_param_group(param_group)
        if self._backing is None:
            return
        try:
            _refuse(self.param_groups)
            self._backing.regroup(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own state dict, for this optimizer or the local one of the same name.

        Beside `state` and `param_groups` it has `"stepwire"`: the session, its step, and what torch has no place for.
        With `light_state_dict` it has that alone and no tensors: for as long as the session lives.

        Raises:
            StepwireError: as `Session.state`.
        """
        if self._options.light_state_dict:
            return self.handle()
        with advising(self._options, self.session_id):
            entries, kept = self.backing.exported(self.param_groups)
        tensors = self.backing.parameters.tensors
        self.state.update({tensor.parameter: entry for tensor, entry in zip(tensors, entries, strict=True) if entry})
        try:
            return self._packed({"masters": kept.masters, "slots": kept.slots})
        finally:
            self.state.clear()

    def handle(self) -> dict[str, Any]:
        """Return a state dict without tensors, by which `load_state_dict` goes on with the session."""
        return self._packed({"handle": True})

    def _packed(self, ours: dict[str, Any]) -> dict[str, Any]:
        ours = {"session_id": self.session_id, "step": self.applied_step, **ours}
        with _hooked(self.register_state_dict_post_hook, lambda _, made: {**made, _KEY: ours}):
            packed: dict[str, Any] = super().state_dict()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict: of this optimizer, or of the one of torch that has the same name.

        The model's parameters are what they are, as with torch; load the model's own state dict too. With what `handle`
        returned, the session is taken again instead, and its parameters are pulled into the model.

        Raises:
            InvalidRequestError: it is another rule's or another model's.
            StepwireError: as `Session.load_state`.
        """
        given: dict[str, Any] = {}

        def keep(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            given.update(incoming)
            return {**incoming, "state": {}}  # torch would cast moments to the parameters' dtype

        def load(_: Any) -> None:
            for group in self.param_groups:  # of an optimizer that computed otherwise; its state is as good
                group.update({name: False for name in _REFUSED if name in group})
            self._load(given)

        before, self.param_groups = self.param_groups, [{**group} for group in self.param_groups]
        try:
            with (
                _hooked(self.register_load_state_dict_pre_hook, keep),
                _hooked(self.register_load_state_dict_post_hook, load, prepend=True),
            ):
                super().load_state_dict(state_dict)
        except BaseException:
            self.param_groups = before
            raise

    def _load(self, given: dict[str, Any]) -> None:
        ours = given.get(_KEY) or {}
        if ours.get("handle"):
            self._retake(ours)
            return
        positions = [index for group in given["param_groups"] for index in group["params"]]
        entries = [given["state"].get(index, {}) for index in positions]
        self.backing.load(entries, Kept(ours.get("masters", {}), ours.get("slots", {})), self.param_groups)

    def _retake(self, ours: dict[str, Any]) -> None:
        """Go on with the session of a handle, and end the one that this optimizer was made with."""
        old = self.session
        self.backing.check_open()
        self.backing.resume(ours["session_id"], self.param_groups)
        if old.session_id != self.session_id:
            old.close()
        else:
            old.detach()  # its stream, which the new one has displaced

    # --- beyond torch ------------------------------------------------------------------------------------

    def upload_parameters(self) -> None:
        """Send the model's parameters to the server, after a change that torch does not count: one through `.data`.

        Raises:
            StepwireError: as `Session.load`.
        """
        self.backing.check_open()
        with advising(self._options, self.session_id):
            self.backing.upload(everything=True)

    def detach(self) -> None:
        """Leave the session on the server, for `session=` in another process, and use it no more."""
        self.backing.end(keep=True)

    def close(self) -> None:
        """End the session on the server. Closing twice is harmless."""
        self.backing.end(keep=False)

    def __enter__(self) -> Any:
        """Use the optimizer for a block, and close it after."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse: two optimizers would step one session."""
        raise _no_copy("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse likewise; this is what pickle and `copy.copy` ask."""
        raise _no_copy("pickled")


def _no_copy(what: str) -> TypeError:
    return TypeError(
        f"an optimizer with a session cannot be {what}: two would step one session. Save state_dict(), or handle() for "
        "the session alone, and load it into an optimizer made anew"
    )


def _refuse(groups: list[dict[str, Any]]) -> None:
    """Refuse options of torch that would promise what a server cannot do."""
    for index, group in enumerate(groups):
        for name, reason in _REFUSED.items():
            if group.get(name):
                raise UnsupportedFeatureError(
                    f"param_groups[{index}][{name!r}] is True, and {reason}; leave it out",
                    metadata={"field": f"param_groups[{index}].{name}", "feature": f"torch_{name}"},
                )


@contextlib.contextmanager
def _hooked(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> Iterator[None]:
    """Register a hook for a block: the last of its kind, or the first."""
    handle = register(hook, **options)
    try:
        yield
    finally:
        handle.remove()


def _signature(cls: type) -> inspect.Signature:
    """Return torch's signature with the names of `RemoteOptions` behind it."""
    own = next((base for base in cls.__mro__ if not issubclass(base, RemoteOptimizer)), object)
    theirs = [
        parameter
        for name, parameter in inspect.signature(own.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    ours = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(RemoteOptions).parameters.values()
    ]
    return inspect.Signature([*theirs, *ours])
