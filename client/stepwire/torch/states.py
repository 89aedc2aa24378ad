"""Conversion between a session's state and torch.optim's state of each parameter, both ways and bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.tensors import ParameterTensor

__all__ = ["PARAM", "Entry", "Slots", "SnapshotView", "imported", "initial"]

Entry = Mapping[str, Any]
"""Torch's state of one parameter."""

Slots = dict[str, dict[str, npt.NDArray[np.float32]]]

PARAM: Final = "param"
_MU: Final = "mu_product"
_AGREEMENT: Final = 1e-4
"""The largest relative error of a running product of float32."""


class SnapshotView:
    """A snapshot of a session, as torch's state of each parameter. An implementation of `StateView`.

    Attributes:
        snapshot: the snapshot.
    """

    def __init__(
        self, snapshot: Snapshot, tensors: Sequence[ParameterTensor], rule: TorchRule, groups: Mapping[str, Group]
    ) -> None:
        """Show a snapshot.

        Args:
            snapshot: the state of the session.
            tensors: the parameters.
            rule: the rule.
            groups: the group of each parameter, by name.
        """
        self.snapshot = snapshot
        self._tensors = {id(tensor.parameter): tensor for tensor in tensors}
        self._rule = rule
        self._groups = groups

    def keys(self, parameter: Any) -> tuple[str, ...]:
        """See `StateView`; in torch's order."""
        tensor = self._tensors.get(id(parameter))
        if tensor is None or not (self.snapshot.tensor_steps[tensor.name] or self._rule.eager):
            return ()
        counted = ("step",) if self._rule.counts else ()
        product = (_MU,) if "momentum_decay" in self._rule.numbers else ()
        return counted + product + tuple(slot for slot in self._rule.slots if slot in self.snapshot.slots)

    def value(self, parameter: Any, key: str) -> Any:
        """See `StateView`."""
        tensor = self._tensors[id(parameter)]
        if key in self._rule.slots:
            return tensor.tensor(self.snapshot.slots[key][tensor.name])
        steps = self.snapshot.tensor_steps[tensor.name]
        return _scalar(float(steps) if key == "step" else _mu_product(self._groups[tensor.name], steps))


def imported(
    entries: Mapping[str, Entry],
    tensors: Sequence[ParameterTensor],
    rule: TorchRule,
    groups: Mapping[str, Group],
    slots: Sequence[str],
) -> tuple[Slots, dict[str, int]]:
    """Return the session's slots without the parameters, and the number of updates of each tensor.

    Args:
        entries: torch's state of some parameters, by name.
        tensors: the parameters.
        rule: the rule.
        groups: the group of each parameter, by name.
        slots: the names of the session's slots.

    Returns:
        The slots, and the numbers of updates, of the parameters with an entry.

    Raises:
        InvalidRequestError: a state lacks a slot, has a slot of another rule, or does not fit its parameter.
    """
    wanted = [slot for slot in rule.slots if slot in slots]
    made: Slots = {slot: {} for slot in wanted}
    steps = {}
    for index, tensor in enumerate(tensors):
        if (entry := entries.get(tensor.name)) is None:
            continue
        field = f"state[{index}]"
        present = {key: value for key, value in entry.items() if value is not None}
        steps[tensor.name] = _steps(present, rule, groups[tensor.name], field)
        for slot in wanted:
            if slot in present:
                made[slot][tensor.name] = tensor.values(present[slot], f"{field}[{slot!r}]")
            elif steps[tensor.name]:
                raise InvalidRequestError.of(f"{field}[{slot!r}]", f"is missing; the state has {sorted(present)}")
            else:
                made[slot][tensor.name] = initial(tensor, rule, groups[tensor.name])
    return made, steps


def initial(tensor: ParameterTensor, rule: TorchRule, group: Group) -> npt.NDArray[np.float32]:
    """Return a slot of a parameter before its first step."""
    return np.full(tensor.shape, rule.structure_of([group]).get("initial_accumulator_value", 0.0), np.float32)


def _steps(entry: Mapping[str, Any], rule: TorchRule, group: Group, field: str) -> int:
    """Return the number of updates of a parameter, after a check that the state is of this rule."""
    known = {*rule.keys, "step", _MU}
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
    if _MU in entry:
        _check_product(float(entry[_MU]), _mu_product(group, int(steps)), field)
    return int(steps)


def _check_product(given: float, expected: float, field: str) -> None:
    """Refuse a product of other numbers than the present ones, from which a session computes the product."""
    if abs(given - expected) > _AGREEMENT * abs(expected):
        raise InvalidRequestError.of(
            f"{field}[{_MU!r}]",
            f"{given!r} is not {expected!r}, the product of the group's betas and momentum_decay. The numbers were "
            "changed on the way, and a session cannot continue such a state",
        )


def _mu_product(group: Group, steps: int) -> float:
    """Return the product of NAdam's momenta as torch computes it: one factor after another, in float32."""
    product, beta1 = np.float32(1.0), float(group["betas"][0])
    for t in range(1, steps + 1):
        mu = beta1 * (1.0 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))
        product = np.float32(product * np.float32(mu))
    return float(product)


def _scalar(value: float) -> Any:
    """Return a number as torch keeps it: on the CPU, and at least in float32."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device="cpu")
