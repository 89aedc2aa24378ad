"""The placement of a model's parameters in a session: made for one session, replaced with the next."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from stepwire.client import Client
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.session import Session
from stepwire.torch.known_groups import KnownGroups
from stepwire.torch.mirror import Mirror
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.recovery import Recovery
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.sessions import PRECISION, create_session, find_session
from stepwire.torch.tables import SparseGradients
from stepwire.torch.views import SharedViews, check_dtypes
from stepwire.wire.dtypes import INT8, dtype_named

__all__ = ["Memory", "Placement", "Placer"]

_LOG = logging.getLogger(__name__)

_WHOLE = ("packets", "shm", "cuda_ipc")
"""The transports whose steps go as a whole, with nothing gained by an early beginning."""

Memory: TypeAlias = Parameters | SharedViews
"""The memory that a session steps: the model's own, or memory shared with the server."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """One session and the parameters that it steps.

    Attributes:
        session: the session.
        parameters: the parameters, in the order of the session.
        memory: the memory of their values.
        mirror: their values and their state in the session.
        recovery: the model after a step that failed.
        rule: the rule.
        structure: the options that are fixed with the session.
        numbers: the numbers of each group at the session's creation.
        precisions: the precision of the moments of each group, where the group names one.
        gradient_dtype: the wire dtype of gradients.
        reply_dtype: the wire dtype of parameters in replies.
        known: the groups of the step before.
    """

    session: Session
    parameters: Parameters
    memory: Memory
    mirror: Mirror
    recovery: Recovery
    rule: TorchRule
    structure: dict[str, Any]
    numbers: list[dict[str, Any]]
    precisions: list[Any]
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    known: KnownGroups = dataclasses.field(default_factory=KnownGroups)

    def fits(self, groups: Sequence[Group]) -> bool:
        """Tell whether groups have the parameters of the session, as the session has them."""
        return len(groups) == len(self.numbers) and self.parameters.are_of(groups)

    def can_begin(self, groups: Sequence[Group]) -> bool:
        """Tell whether a step can begin with its first gradient: messages carry gradients, and nothing goes before.

        With a step in doubt nothing can begin, because a whole gradient tells whether it is that step again.
        """
        choice = self.session.transport
        if choice is None or choice.name in _WHOLE or self.parameters.tables:
            return False
        if len(self.session.shards) > 1:  # it has moved to several servers, which a gradient is split for
            return False
        if not self.fits(groups) or self.parameters.counted():
            return False
        return self.session.statistics().step_in_doubt is None

    def overrides(self, groups: Sequence[Group]) -> list[dict[str, Any]] | None:
        """Return the numbers of each group that differ from those of the session's creation; None for no difference.

        Raises:
            InvalidRequestError: an option that is fixed at the session's creation was changed.
        """
        if self.known.are(groups):
            return self.known.overrides
        if changed := self.structure_change(groups):
            raise InvalidRequestError.of(
                "param_groups",
                f"{changed}, which is fixed at a session's creation. Call "
                "optimizer.load_state_dict(optimizer.state_dict()) for another session, or make a new optimizer if the "
                "state has no such slot",
            )
        now = [self.rule.numbers_of(group) for group in groups]
        differing = [
            {name: value for name, value in numbers.items() if value != then[name]}
            for numbers, then in zip(now, self.numbers, strict=True)
        ]
        overrides = differing if any(differing) else None
        self.known.note(groups, overrides)
        return overrides

    def structure_change(self, groups: Sequence[Group]) -> str:
        """Return the change of the groups that needs another session, in words; empty for none."""
        now = self.rule.structure_of(groups)
        for name, value in now.items():
            if value != self.structure[name]:
                return f"{name} was changed from {self.structure[name]!r} to {value!r}"
        if self.rule.keeps_momentum(groups) and "momentum_buffer" not in self.session.slots:
            return "momentum was changed from 0 in all groups"
        for index, (group, precision) in enumerate(zip(groups, self.precisions, strict=False)):
            if group.get(PRECISION) != precision:
                return f"{PRECISION} of group {index} was changed from {precision!r} to {group.get(PRECISION)!r}"
        return ""


class Placer:
    """Makes the sessions and the placements of one optimizer.

    Attributes:
        sparse: the ways of sparse gradients.
    """

    def __init__(self, client: Client, options: RemoteOptions, rule: TorchRule) -> None:
        """Use a client.

        Args:
            client: the client.
            options: the options of the optimizer.
            rule: the rule.
        """
        self._client = client
        self._options = options
        self._rule = rule
        self.sparse = SparseGradients(rule, options)

    def created(self, parameters: Parameters, groups: Sequence[Group]) -> Session:
        """Create a session with the parameters' present values.

        Raises:
            UnsupportedFeatureError: an option does not work with these parameters.
            StepwireError: as `Client.create_session`.
        """
        self._check(parameters)
        return create_session(self._client, self._options, self._rule, parameters, groups)

    def found(self, session_id: str, parameters: Parameters, groups: Sequence[Group]) -> Session:
        """Attach to an existing session, and copy its parameters into the model.

        Raises:
            UnsupportedFeatureError: an option does not work with these parameters.
            StepwireError: as `find_session` and `Session.pull`.
        """
        self._check(parameters)
        session = find_session(self._client, session_id, self._options, self._rule, parameters, groups)
        parameters.expect_sparse(session.config.tables, by_rows=True)
        pulled: Any = session.pull()
        parameters.adopt(pulled)
        return session

    def mirror(self, session: Session, parameters: Parameters) -> Mirror:
        """Return the mirror of parameters in a session, for the state to load before they are placed there."""
        return Mirror(session, parameters, self._rule, self._dtypes(parameters)[1], self._options.timeout)

    def placed(self, mirror: Mirror, groups: Sequence[Group], *, again: bool = False) -> Placement:
        """Return the placement of parameters in a session that has their values.

        Args:
            mirror: the mirror of the parameters; with shared views they move into the memory of its session.
            groups: torch's parameter groups.
            again: True for the successor of another session: without shared memory its parameters are ordinary memory.

        Raises:
            UnsupportedFeatureError: shared views were asked for, and the first session shares no memory.
            StepwireError: the session cannot be reached.
        """
        session, parameters = mirror.session, mirror.parameters
        memory: Memory = parameters
        if self._options.shared_views:
            try:
                memory = SharedViews(session, parameters)
            except UnsupportedFeatureError as error:
                if not again:
                    raise
                _LOG.warning("parameters are ordinary memory from now on, and each step copies them: %s", error)
        sent, received = self._dtypes(parameters)
        config = session.config
        return Placement(
            session,
            parameters,
            memory,
            mirror,
            Recovery(session, parameters, memory, received, self._options.timeout),
            self._rule,
            self._rule.structure_of(groups),
            [config.arguments(index) for index in range(len(config.groups))],
            [group.get(PRECISION) for group in groups],
            sent,
            received,
        )

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
        if self._options.send_in_backward and self._dtypes(parameters)[0] == INT8:
            raise UnsupportedFeatureError(
                "send_in_backward: a gradient of int8 is encoded anew if it changes before the step, which loses its "
                "error feedback; leave out one of send_in_backward and gradient_dtype='int8'",
                metadata={"field": "send_in_backward", "feature": "torch_send_in_backward"},
            )

    def _dtypes(self, parameters: Parameters) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Return the wire dtypes of gradients and of replies."""
        sent, received = self._options.gradient_dtype, self._options.reply_dtype
        return (
            dtype_named(sent or parameters.dtype, "gradient_dtype", gradients=True),
            dtype_named(received or parameters.dtype, "reply_dtype"),
        )
