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

__all__ = ["Imported", "exported", "imported"]

Slots = dict[str, dict[str, npt.NDArray[np.float32]]]

PARAM: Final = "param"


class Imported(NamedTuple):
    """The state of a session but for the parameters, by slot or by name of a tensor.

    Attributes:
        slots: the arrays of each slot.
        steps: the number of updates of each tensor.
        scalars: the scalar of each tensor; empty if the rule keeps none.
    """

    slots: Slots
    steps: dict[str, int]
    scalars: dict[str, float]


def exported(state: Snapshot, tensors: Sequence[ParameterTensor], rule: TorchRule) -> list[dict[str, Any]]:
    """Return torch's state of each parameter, in order; empty for a parameter without state.

    Args:
        state: the state of the session.
        tensors: the parameters.
        rule: the rule.
    """
    return [_entry(state, tensor, rule) for tensor in tensors]


def _entry(state: Snapshot, tensor: ParameterTensor, rule: TorchRule) -> dict[str, Any]:
    steps = state.tensor_steps[tensor.name]
    begun = steps or rule.eager if rule.counts else state.tensor_scalars.get(tensor.name)
    if not begun:
        return {}
    entry: dict[str, Any] = {"step": _scalar(float(steps))} if rule.counts else {}
    if rule.product:
        entry[rule.product] = _scalar(state.tensor_scalars[tensor.name])
    for slot in rule.slots:
        if slot in state.slots:
            entry[slot] = tensor.tensor(state.slots[slot][tensor.name])
    return entry


def imported(
    entries: Sequence[Mapping[str, Any]],
    tensors: Sequence[ParameterTensor],
    rule: TorchRule,
    groups: Mapping[str, Group],
    slots: Sequence[str],
) -> Imported:
    """Return the session's state without the parameters.

    Args:
        entries: torch's state of each parameter, in order.
        tensors: the parameters.
        rule: the rule.
        groups: the group of each parameter, by name.
        slots: the names of the session's slots.

    Raises:
        InvalidRequestError: a state lacks a slot, has a slot of another rule, or does not fit its parameter.
    """
    wanted = [slot for slot in rule.slots if slot in slots]
    made = Imported({slot: {} for slot in wanted}, {}, {})
    for index, (entry, tensor) in enumerate(zip(entries, tensors, strict=True)):
        field = f"state[{index}]"
        present = {key: value for key, value in entry.items() if value is not None}
        steps = made.steps[tensor.name] = _steps(present, rule, field)
        if wanted and (rule.product or not rule.counts):
            made.scalars[tensor.name] = _product(present, rule, field) if rule.product else float(steps)
        for slot in wanted:
            if slot in present:
                made.slots[slot][tensor.name] = tensor.values(present[slot], f"{field}[{slot!r}]")
            elif steps:
                raise InvalidRequestError.of(f"{field}[{slot!r}]", f"is missing; the state has {sorted(present)}")
            else:
                start = rule.structure_of([groups[tensor.name]]).get("initial_accumulator_value", 0.0)
                made.slots[slot][tensor.name] = np.full(tensor.shape, start, np.float32)
    return made


def _steps(entry: Mapping[str, Any], rule: TorchRule, field: str) -> int:
    """Return the number of updates of a parameter, after a check that the state is of this rule."""
    known = {*rule.slots, "step", *([rule.product] if rule.product else [])}
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
