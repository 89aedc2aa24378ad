"""What a session holds of a model: the model's values with the bits it does not show, and torch's state of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot
from stepwire.session import Session
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.rules import Family, Group
from stepwire.torch.states import PARAM, exported, imported
from stepwire.torch.tensors import HeldTensor, from_numpy, to_numpy
from stepwire.wire.dtypes import FLOAT32

__all__ = ["Kept", "Mirror"]


class Kept(NamedTuple):
    """What torch has no place for in its state.

    Attributes:
        masters: float32 parameters by position, where the model's are of fewer bits.
        slots: what goes with moments in fewer bits, by slot and name.
    """

    masters: dict[int, Any]
    slots: dict[str, dict[str, Any]]


class Mirror:
    """One session and the parameters that it follows. Changes neither, but for `upload`."""

    def __init__(
        self, session: Session, parameters: Parameters, family: Family, reply_dtype: np.dtype[Any], timeout: float
    ) -> None:
        """Compare a session with parameters that are answered in `reply_dtype`."""
        self._session = session
        self._parameters = parameters
        self._family = family
        self._reply_dtype = reply_dtype
        self._timeout = timeout
        held = {tensor.dtype for tensor in parameters.tensors}
        self._exact = reply_dtype == FLOAT32 and held == {FLOAT32}
        self._offered: dict[str, Any] = {}

    def upload(self) -> None:
        """Send the model's values.

        Raises:
            StepwireError: as `Session.load`.
        """
        self._session.load(self._values(), timeout=self._timeout)

    def offer(self, kept: Kept) -> None:
        """Take masters of a state dict for what the model shows of them, now and until `forget`.

        So the model's own state dict may be loaded after that of its optimizer: the masters fit from then on.

        Raises:
            InvalidRequestError: they are another model's.
        """
        tensors = self._parameters.tensors
        if unknown := [index for index in kept.masters if index not in range(len(tensors))]:
            raise InvalidRequestError(
                f"state_dict: masters[{unknown[0]!r}] is of no parameter here, of which there are {len(tensors)}; the "
                "state is another model's",
                metadata={"field": "state_dict.masters"},
            )
        self._offered = {
            tensors[index].name: tensors[index].values(value, f"masters[{index}]")
            for index, value in kept.masters.items()
            if not self._exact
        }

    def forget(self) -> None:
        """Offer no masters any more: after a step they are those of another time."""
        self._offered = {}

    def state(self) -> Snapshot:
        """Return the session's state.

        Raises:
            StepwireError: as `Session.state`.
        """
        return self._session.state(timeout=self._timeout)

    def exported(self, groups: Sequence[Group]) -> tuple[list[dict[str, Any]], Kept]:
        """Return torch's state of each parameter in order, and what it has no place for.

        Raises:
            StepwireError: as `Session.state`.
        """
        state, tensors = self.state(), self._parameters.tensors
        entries = exported(state, tensors, self._family, self._by_name(groups))
        masters = {} if self._exact else {i: t.tensor(state.slots[PARAM][t.name]) for i, t in enumerate(tensors)}
        # As tensors: `torch.load` takes no arrays unless told that the file can be trusted.
        slots = {
            slot: {name: from_numpy(values) for name, values in state.slots[slot].items()}
            for slot in self._beside_torch(self._session)
        }
        return entries, Kept(masters, slots)

    def loadable(
        self, session: Session, entries: Sequence[Mapping[str, Any]], kept: Kept, groups: Sequence[Group]
    ) -> Snapshot:
        """Return what a session is to hold, this one or its successor: torch's state, and the model's values.

        Raises:
            InvalidRequestError: the state is another rule's or another model's.
            StepwireError: as `Session.pull`.
        """
        tensors = self._parameters.tensors
        slots, steps = imported(entries, tensors, self._family, self._by_name(groups), session.slots)
        for slot in self._beside_torch(session):
            if set(kept.slots.get(slot, ())) != set(session.shapes):
                raise InvalidRequestError(
                    f"state_dict: {slot!r} is missing, which this session's state_precision needs; it is in state "
                    "dicts of such sessions only",
                    metadata={"field": f"state_dict.{slot}"},
                )
            slots[slot] = {name: to_numpy(values.cpu()) for name, values in kept.slots[slot].items()}
        self.offer(kept)
        slots[PARAM] = self._values()
        return Snapshot(step=self._session.applied_step, slots=slots, tensor_steps=steps)

    def carried(self, fresh: Snapshot, parameters: Parameters) -> Snapshot:
        """Return the state of a new session of other groups, with all that this one has of the same parameters.

        Args:
            fresh: the new session's.
            parameters: its own.

        Raises:
            StepwireError: as `Session.state`.
        """
        before = self.state()
        # By what they are: names change with a state dict that has others, and positions with what comes before.
        olds = {id(tensor.parameter): tensor.name for tensor in self._parameters.tensors}
        names = {t.name: olds[id(t.parameter)] for t in parameters.tensors if id(t.parameter) in olds}
        for slot, arrays in fresh.slots.items():
            if slot in before.slots:
                arrays |= {name: before.slots[slot][old] for name, old in names.items()}
        steps = {name: before.tensor_steps[names[name]] if name in names else 0 for name in fresh.tensor_steps}
        return Snapshot(step=before.step, slots=fresh.slots, tensor_steps=steps)

    def _values(self) -> Arrays:
        """Return the model's values; where offered masters, or else the session's, round to those, the masters."""
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

    def _merged(self, masters: Sequence[Any], local: npt.NDArray[Any], tensor: HeldTensor) -> npt.NDArray[Any]:
        merged: npt.NDArray[Any] = local.astype(np.float32)
        for master in masters:
            with np.errstate(over="ignore", invalid="ignore"):
                shown = master.astype(self._reply_dtype).astype(tensor.dtype)
            merged = np.where(shown == local, master, merged)
        return merged

    def _beside_torch(self, session: Session) -> list[str]:
        return [slot for slot in session.slots if slot not in (PARAM, *self._family.slots)]

    def _by_name(self, groups: Sequence[Group]) -> dict[str, Group]:
        return {name: groups[index] for name, index in self._parameters.membership.items()}
