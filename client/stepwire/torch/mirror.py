"""The values and the state of a model in its session: float32 masters, and torch's state of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot
from stepwire.session import Session
from stepwire.torch.block_scales import levelled
from stepwire.torch.parameters import Arrays, Parameters
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.states import PARAM, Entry, Imported, Slots, SnapshotView, imported, initial
from stepwire.torch.tensors import ParameterTensor, from_numpy, to_numpy
from stepwire.torch.workers import WorkerLoads
from stepwire.wire.dtypes import FLOAT32

__all__ = ["ExtraState", "Mirror", "Wanted"]


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


class Wanted(NamedTuple):
    """The state that a session is to have.

    Attributes:
        entries: torch's state of the parameters whose state is a new one, by name.
        before: the state of the session before, for everything else; None without one.
        olds: the names in `before` of the parameters that both sessions have, by their present names.
        step: the step number to go on from.
        extra: the state beyond torch's, for `entries`; None for none.
    """

    entries: Mapping[str, Entry]
    before: Snapshot | None
    olds: Mapping[str, str]
    step: int
    extra: ExtraState | None = None


class Mirror:
    """One session and the parameters that it follows. Only `upload` changes the session.

    Attributes:
        session: the session.
        parameters: the parameters.
        is_exact: True if the model shows all bits of its masters.
    """

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
        self.session = session
        self.parameters = parameters
        self._rule = rule
        self._reply_dtype = reply_dtype
        self._timeout = timeout
        self._several = None if session.config.aggregation is None else WorkerLoads(session, parameters, timeout)
        dtypes = {tensor.dtype for tensor in parameters.tensors}
        self.is_exact = reply_dtype == FLOAT32 and dtypes == {FLOAT32}
        self._offered: dict[str, Any] = {}

    def upload(self) -> None:
        """Send the model's values.

        Raises:
            StepwireError: as `Session.load`.
        """
        values = self._values(self._pulled())
        self._send(lambda: self.session.load(values, timeout=self._timeout), state=False)

    def load_state(self, state: Snapshot) -> None:
        """Load a state into the session.

        Raises:
            StepwireError: as `Session.load_state`.
        """
        self._send(lambda: self.session.load_state(state, timeout=self._timeout), state=True)

    def _send(self, load: Callable[[], None], *, state: bool) -> None:
        if self._several is None:
            load()
        else:
            self._several.load(load, state=state)

    @property
    def is_shared(self) -> bool:
        """The session has several workers."""
        return self._several is not None

    def join(self) -> None:
        """Join the workers of a session with several, and write its parameters into the model.

        Raises:
            StepwireError: as `Session.attach`, `Session.pull`.
        """
        if self._several is not None:
            self._several.join()

    def stepped(self) -> None:
        """Note a step: masters that were offered are older, and loads of other workers are known."""
        self.forget()
        if self._several is not None:
            self._several.stepped()

    def offer(self, extra: ExtraState) -> None:
        """Use masters of a state dict for parameters that equal their rounding, until `forget`.

        So a user may load the model's own state dict after its optimizer's: the masters fit from then on.

        Raises:
            InvalidRequestError: the masters are of another model.
        """
        tensors = self.parameters.tensors
        if unknown := [index for index in extra.masters if index not in range(len(tensors))]:
            raise InvalidRequestError.of(
                "state_dict.masters",
                f"position {unknown[0]!r} is none of the {len(tensors)} parameters; the state is another model's",
            )
        self._offered = {
            tensors[index].name: tensors[index].values(value, f"masters[{index}]")
            for index, value in extra.masters.items()
            if not self.is_exact
        }

    def forget(self) -> None:
        """Forget the offered masters: they are older than a step."""
        self._offered = {}

    def inherit(self, other: Mirror, olds: Mapping[str, str]) -> None:
        """Use the offered masters of the mirror before; `olds` has its names, by the present ones."""
        self._offered = {name: other._offered[old] for name, old in olds.items() if old in other._offered}

    def view(self) -> SnapshotView:
        """Return the session's state as torch has it.

        Raises:
            StepwireError: as `Session.state`.
        """
        snapshot = self.session.state(timeout=self._timeout)
        return SnapshotView(snapshot, self.parameters.tensors, self._rule)

    def extra(self, snapshot: Snapshot) -> ExtraState:
        """Return the state beyond torch's."""
        tensors = self.parameters.tensors
        masters = {} if self.is_exact else {i: t.tensor(snapshot.slots[PARAM][t.name]) for i, t in enumerate(tensors)}
        # As tensors: `torch.load` refuses arrays by default, as a risk of an untrusted file.
        slots = {
            slot: {name: from_numpy(values) for name, values in snapshot.slots[slot].items()}
            for slot in self._beside_torch()
        }
        return ExtraState(masters, slots, dict(snapshot.tensor_scalars) if self._rule.product else {})

    def composed(self, wanted: Wanted, groups: Sequence[Group]) -> Snapshot:
        """Return the state to load into the session, with the model's values.

        Args:
            wanted: the state.
            groups: torch's parameter groups.

        Raises:
            InvalidRequestError: an entry is of another rule or another model.
            StepwireError: as `Session.pull`.
        """
        by_name = self._by_name(groups)
        made: Slots = {slot: {} for slot in self.session.slots if slot != PARAM}
        imports = imported(wanted.entries, self.parameters.tensors, self._rule, by_name, self.session.slots)
        made.update(imports.slots)
        self._keep(imports._replace(slots=made), wanted, by_name)
        self._scale(made, wanted)
        scalars = imports.scalars
        if wanted.extra is not None:
            self.offer(wanted.extra)
            exact = wanted.extra.scalars
            scalars |= {name: exact[name] for name in exact if _same(exact[name], scalars.get(name))}
        made[PARAM] = self._values(self._masters(wanted))
        return Snapshot(step=wanted.step, slots=made, tensor_steps=imports.steps, tensor_scalars=scalars)

    def _keep(self, made: Imported, wanted: Wanted, by_name: Mapping[str, Group]) -> None:
        """Add the state of the parameters without an entry."""
        kept = self._rule.keeps_scalars(self.session.slots)
        for tensor in self.parameters.tensors:
            if (name := tensor.name) in wanted.entries:
                continue
            assert wanted.before is not None
            old = wanted.olds[name]
            made.steps[name] = wanted.before.tensor_steps[old]
            if kept:
                made.scalars[name] = wanted.before.tensor_scalars.get(old, 0.0)  # a slot that is new has not begun
            for slot, arrays in made.slots.items():
                had = wanted.before.slots.get(slot)
                arrays[name] = initial(tensor, self._rule, by_name[name]) if had is None else had[old]

    def _scale(self, made: Slots, wanted: Wanted) -> None:
        """Complete the slots that moments of fewer bits need besides torch's.

        Raises:
            InvalidRequestError: the state beyond torch's lacks such a slot.
        """
        for slot in self._beside_torch():
            if wanted.extra is None:
                values = made[slot.removesuffix("_scale")]
                scales = {name: made[slot].get(name, np.zeros_like(values[name])) for name in values}
                made[slot] = levelled(values, scales, self.parameters.members_by_group())
                continue
            given = wanted.extra.slots.get(slot, {})
            if set(given) != set(self.session.shapes):
                raise InvalidRequestError.of(
                    f"state_dict.{slot}",
                    "is missing, and this session's state_precision needs it; use a state dict of a session with the "
                    "same state_precision",
                )
            made[slot] = {name: to_numpy(values.cpu()) for name, values in given.items()}

    def _masters(self, wanted: Wanted) -> Mapping[str, Any]:
        if self.is_exact:
            return {}
        if wanted.before is None:
            return self._pulled()
        return {name: wanted.before.slots[PARAM][old] for name, old in wanted.olds.items()}

    def _pulled(self) -> Mapping[str, Any]:
        pulled: Any = {} if self.is_exact else self.session.pull(timeout=self._timeout)
        return cast(Mapping[str, Any], pulled)

    def _values(self, masters: Mapping[str, Any]) -> Arrays:
        """Return the model's values, each replaced by a master that rounds to it: a given one or an offered one."""
        local = self.parameters.fetch()
        if self.is_exact:
            return local
        return {
            tensor.name: self._merged(
                [known[tensor.name] for known in (masters, self._offered) if tensor.name in known],
                local[tensor.name],
                tensor,
            )
            for tensor in self.parameters.tensors
        }

    def _merged(self, masters: Sequence[Any], local: npt.NDArray[Any], tensor: ParameterTensor) -> npt.NDArray[Any]:
        merged: npt.NDArray[Any] = local.astype(np.float32)
        for master in masters:
            with np.errstate(over="ignore", invalid="ignore"):
                shown = master.astype(self._reply_dtype).astype(tensor.dtype)
            merged = np.where(shown == local, master, merged)
        return merged

    def _beside_torch(self) -> list[str]:
        return [slot for slot in self.session.slots if slot not in (PARAM, *self._rule.slots)]

    def _by_name(self, groups: Sequence[Group]) -> dict[str, Group]:
        return {name: groups[index] for name, index in self.parameters.membership.items()}


def _same(exact: float, shown: float | None) -> bool:
    """Tell whether torch's state has this number, rounded."""
    return shown is not None and np.float32(exact) == np.float32(shown)
