"""The values and the state of a model in its session: float32 masters, and torch's state of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot
from stepwire.session import Session
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.states import PARAM, exported, imported
from stepwire.torch.tensors import ParameterTensor, from_numpy, to_numpy
from stepwire.wire.dtypes import FLOAT32

__all__ = ["ExtraState", "Mirror"]


class ExtraState(NamedTuple):
    """The state beyond torch's own.

    Attributes:
        masters: float32 parameters by position, for a model with parameters of fewer bits.
        slots: the slots that moments of fewer bits need besides torch's, by slot and name.
        scalars: the server's scalar of each tensor, by name, where torch has a product rounded to float32.
    """

    masters: dict[int, Any]
    slots: dict[str, dict[str, Any]]
    scalars: dict[str, float]


class Mirror:
    """One session and the parameters that it follows. Only `upload` changes the session."""

    def __init__(
        self, session: Session, parameters: Parameters, rule: TorchRule, reply_dtype: np.dtype[Any], timeout: float
    ) -> None:
        """Compare a session with parameters that come back in `reply_dtype`.

        Args:
            session: the session.
            parameters: the model's parameters.
            rule: the rule.
            reply_dtype: the wire dtype of parameters in replies.
            timeout: the time limit of a call, in seconds.
        """
        self._session = session
        self._parameters = parameters
        self._rule = rule
        self._reply_dtype = reply_dtype
        self._timeout = timeout
        dtypes = {tensor.dtype for tensor in parameters.tensors}
        self._exact = reply_dtype == FLOAT32 and dtypes == {FLOAT32}
        self._offered: dict[str, Any] = {}

    def upload(self) -> None:
        """Send the model's values.

        Raises:
            StepwireError: as `Session.load`.
        """
        self._session.load(self._values(), timeout=self._timeout)

    def offer(self, extra: ExtraState) -> None:
        """Use masters of a state dict for parameters that equal their rounding, until `forget`.

        So a user may load the model's own state dict after its optimizer's: the masters fit from then on.

        Raises:
            InvalidRequestError: the masters are of another model.
        """
        tensors = self._parameters.tensors
        if unknown := [index for index in extra.masters if index not in range(len(tensors))]:
            raise InvalidRequestError.of(
                "state_dict.masters",
                f"position {unknown[0]!r} is none of the {len(tensors)} parameters; the state is another model's",
            )
        self._offered = {
            tensors[index].name: tensors[index].values(value, f"masters[{index}]")
            for index, value in extra.masters.items()
            if not self._exact
        }

    def forget(self) -> None:
        """Forget the offered masters: they are older than a step."""
        self._offered = {}

    def state(self) -> Snapshot:
        """Return the session's state.

        Raises:
            StepwireError: as `Session.state`.
        """
        return self._session.state(timeout=self._timeout)

    def exported(self) -> tuple[list[dict[str, Any]], ExtraState]:
        """Return torch's state of each parameter in order, and the state beyond torch's.

        Raises:
            StepwireError: as `Session.state`.
        """
        state, tensors = self.state(), self._parameters.tensors
        entries = exported(state, tensors, self._rule)
        masters = {} if self._exact else {i: t.tensor(state.slots[PARAM][t.name]) for i, t in enumerate(tensors)}
        # As tensors: `torch.load` refuses arrays by default, as a risk of an untrusted file.
        slots = {
            slot: {name: from_numpy(values) for name, values in state.slots[slot].items()}
            for slot in self._beside_torch(self._session)
        }
        return entries, ExtraState(masters, slots, dict(state.tensor_scalars) if self._rule.product else {})

    def loadable(
        self, session: Session, entries: Sequence[Mapping[str, Any]], extra: ExtraState, groups: Sequence[Group]
    ) -> Snapshot:
        """Return the state to load into a session: torch's state, and the model's values.

        Args:
            session: this session, or its successor.
            entries: torch's state of each parameter, in order.
            extra: the state beyond torch's.
            groups: torch's parameter groups.

        Raises:
            InvalidRequestError: the state is of another rule or another model.
            StepwireError: as `Session.pull`.
        """
        tensors = self._parameters.tensors
        slots, steps, scalars = imported(entries, tensors, self._rule, self._by_name(groups), session.slots)
        for slot in self._beside_torch(session):
            if set(extra.slots.get(slot, ())) != set(session.shapes):
                raise InvalidRequestError.of(
                    f"state_dict.{slot}",
                    "is missing, and this session's state_precision needs it; use a state dict of a session with the "
                    "same state_precision",
                )
            slots[slot] = {name: to_numpy(values.cpu()) for name, values in extra.slots[slot].items()}
        self.offer(extra)
        slots[PARAM] = self._values()
        exact = {name: value for name, value in extra.scalars.items() if _same(value, scalars.get(name))}
        step = self._session.applied_step
        return Snapshot(step=step, slots=slots, tensor_steps=steps, tensor_scalars=scalars | exact)

    def carried(self, fresh: Snapshot, parameters: Parameters) -> Snapshot:
        """Return the state of a new session of other groups, with this session's state of the parameters of both.

        Args:
            fresh: the state of the new session.
            parameters: the parameters of the new session.

        Raises:
            StepwireError: as `Session.state`.
        """
        before = self.state()
        # Parameters are matched by identity: a state dict may change names, and a new group may change positions.
        olds = {id(tensor.parameter): tensor.name for tensor in self._parameters.tensors}
        names = {t.name: olds[id(t.parameter)] for t in parameters.tensors if id(t.parameter) in olds}
        for slot, arrays in fresh.slots.items():
            if slot in before.slots:
                arrays |= {name: before.slots[slot][old] for name, old in names.items()}
        steps = {name: before.tensor_steps[names[name]] if name in names else 0 for name in fresh.tensor_steps}
        scalars = {
            name: before.tensor_scalars.get(names.get(name, ""), value) for name, value in fresh.tensor_scalars.items()
        }
        return Snapshot(step=before.step, slots=fresh.slots, tensor_steps=steps, tensor_scalars=scalars)

    def _values(self) -> Arrays:
        """Return the model's values, each replaced by a master that rounds to it: an offered one or the session's."""
        local = self._parameters.fetch()
        if self._exact:
            return local
        pulled: Any = self._session.pull(timeout=self._timeout)
        return {
            tensor.name: self._merged(
                [masters[tensor.name] for masters in (pulled, self._offered) if tensor.name in masters],
                local[tensor.name],
                tensor,
            )
            for tensor in self._parameters.tensors
        }

    def _merged(self, masters: Sequence[Any], local: npt.NDArray[Any], tensor: ParameterTensor) -> npt.NDArray[Any]:
        merged: npt.NDArray[Any] = local.astype(np.float32)
        for master in masters:
            with np.errstate(over="ignore", invalid="ignore"):
                shown = master.astype(self._reply_dtype).astype(tensor.dtype)
            merged = np.where(shown == local, master, merged)
        return merged

    def _beside_torch(self, session: Session) -> list[str]:
        return [slot for slot in session.slots if slot not in (PARAM, *self._rule.slots)]

    def _by_name(self, groups: Sequence[Group]) -> dict[str, Group]:
        return {name: groups[index] for name, index in self._parameters.membership.items()}


def _same(exact: float, shown: float | None) -> bool:
    """Tell whether torch's state has this number, rounded."""
    return shown is not None and np.float32(exact) == np.float32(shown)
