"""Conversion between a session's state and torch.optim's state of each parameter, both ways and bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.tensors import ParameterTensor

__all__ = ["PARAM", "Entry", "Imported", "Slots", "SnapshotView", "imported", "initial"]

Entry = Mapping[str, Any]
"""Torch's state of one parameter."""

Slots = dict[str, dict[str, npt.NDArray[np.float32]]]

PARAM: Final = "param"


class Imported(NamedTuple):
    """The state of some tensors but for the parameters, by slot or by name of a tensor.

    Attributes:
        slots: the arrays of each slot.
        steps: the number of updates of each tensor.
        scalars: the scalar of each tensor; empty if the rule keeps none.
    """

    slots: Slots
    steps: dict[str, int]
    scalars: dict[str, float]


class SnapshotView:
    """A snapshot of a session, as torch's state of each parameter. An implementation of `StateView`.

    Attributes:
        snapshot: the snapshot.
    """

    def __init__(self, snapshot: Snapshot, tensors: Sequence[ParameterTensor], rule: TorchRule) -> None:
        """Show a snapshot.

        Args:
            snapshot: the state of the session.
            tensors: the parameters.
            rule: the rule.
        """
        self.snapshot = snapshot
        self._tensors = {id(tensor.parameter): tensor for tensor in tensors}
        self._rule = rule

    def keys(self, parameter: Any) -> tuple[str, ...]:
        """See `StateView`; in torch's order."""
        tensor = self._tensors.get(id(parameter))
        if tensor is None or not self._has_begun(tensor.name):
            return ()
        counted = ("step",) if self._rule.counts else ()
        product = (self._rule.product,) if self._rule.product else ()
        return counted + product + tuple(slot for slot in self._rule.slots if slot in self.snapshot.slots)

    def value(self, parameter: Any, key: str) -> Any:
        """See `StateView`."""
        tensor = self._tensors[id(parameter)]
        if key in self._rule.slots:
            return tensor.tensor(self.snapshot.slots[key][tensor.name])
        numbers: Mapping[str, float] = self.snapshot.tensor_steps if key == "step" else self.snapshot.tensor_scalars
        return _scalar(float(numbers[tensor.name]))

    def _has_begun(self, name: str) -> bool:
        if not self._rule.counts:
            return bool(self.snapshot.tensor_scalars.get(name))
        return self._rule.eager or self.snapshot.tensor_steps[name] > 0


def imported(
    entries: Mapping[str, Entry],
    tensors: Sequence[ParameterTensor],
    rule: TorchRule,
    groups: Mapping[str, Group],
    slots: Sequence[str],
) -> Imported:
    """Return the session's state without the parameters.

    Args:
        entries: torch's state of some parameters, by name.
        tensors: the parameters.
        rule: the rule.
        groups: the group of each parameter, by name.
        slots: the names of the session's slots.

    Returns:
        The state of the parameters with an entry.

    Raises:
        InvalidRequestError: a state lacks a slot, has a slot of another rule, or does not fit its parameter.
    """
    wanted = [slot for slot in rule.slots if slot in slots]
    made = Imported({slot: {} for slot in wanted}, {}, {})
    for index, tensor in enumerate(tensors):
        if (entry := entries.get(tensor.name)) is None:
            continue
        field = f"state[{index}]"
        present = {key: value for key, value in entry.items() if value is not None}
        steps = made.steps[tensor.name] = _steps(present, rule, field)
        if rule.keeps_scalars(slots):
            made.scalars[tensor.name] = _product(present, rule, field) if rule.product else float(steps)
        for slot in wanted:
            if slot in present:
                made.slots[slot][tensor.name] = tensor.values(present[slot], f"{field}[{slot!r}]")
            elif steps:
                raise InvalidRequestError.of(f"{field}[{slot!r}]", f"is missing; the state has {sorted(present)}")
            else:
                made.slots[slot][tensor.name] = initial(tensor, rule, groups[tensor.name])
    return made


def initial(tensor: ParameterTensor, rule: TorchRule, group: Group) -> npt.NDArray[np.float32]:
    """Return a slot of a parameter before its first step."""
    return np.full(tensor.shape, rule.structure_of([group]).get("initial_accumulator_value", 0.0), np.float32)


def _steps(entry: Mapping[str, Any], rule: TorchRule, field: str) -> int:
    """Return the number of updates of a parameter, after a check that the state is of this rule."""
    known = {*rule.keys, "step"}
    if unknown := sorted(set(entry) - known):
        raise InvalidRequestError.of(
            f"{field}[{unknown[0]!r}]", f"{rule.optimizer.__name__} has no such slot; is the state another optimizer's?"
        )
    if not rule.counts:
        return 1 if entry else 0  # torch keeps no count for this rule; 1 says that the buffer has begun
    if "step" not in entry:
        if entry:
            raise InvalidRequestError.of(f"{field}['step']", f"is missing; the state has {sorted(entry)}")
        return 0
    try:
        steps = float(entry["step"])
    except (TypeError, ValueError):
        raise InvalidRequestError.of(f"{field}['step']", f"{entry['step']!r:.60} is no number of steps") from None
    if not 0 <= steps < math.inf or steps != int(steps):
        raise InvalidRequestError.of(f"{field}['step']", f"{steps!r} is no number of steps")
    return int(steps)


def _product(entry: Mapping[str, Any], rule: TorchRule, field: str) -> float:
    """Return the running product of a parameter; 1 before its first update."""
    if rule.product not in entry:
        if entry:
            raise InvalidRequestError.of(f"{field}[{rule.product!r}]", f"is missing; the state has {sorted(entry)}")
        return 1.0
    try:
        product = float(entry[rule.product])
    except (TypeError, ValueError):
        product = math.nan
    if not 0.0 <= product <= 1.0:
        shown = f"{entry[rule.product]!r:.60}"
        raise InvalidRequestError.of(f"{field}[{rule.product!r}]", f"{shown} is no product of momenta, in [0, 1]")
    return product


def _scalar(value: float) -> Any:
    """Return a number as torch keeps it: on the CPU, and at least in float32."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device="cpu")
