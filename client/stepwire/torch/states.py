"""Between a session's state and what torch.optim keeps for each parameter, both ways and bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from stepwire.errors import InvalidRequestError
from stepwire.results import Snapshot
from stepwire.torch.rules import Family, Group
from stepwire.torch.tensors import HeldTensor

__all__ = ["exported", "imported"]

Slots = dict[str, dict[str, npt.NDArray[np.float32]]]

PARAM: Final = "param"
_MU: Final = "mu_product"
_AGREEMENT: Final = 1e-4
"""How far a running product of float32 may be from the product itself."""


def exported(
    state: Snapshot, tensors: Sequence[HeldTensor], family: Family, groups: Mapping[str, Group]
) -> list[dict[str, Any]]:
    """Return torch's state of each parameter, in order; empty where torch has none.

    Args:
        state: the session's.
        tensors: the parameters.
        family: the rule.
        groups: the group of each parameter, by name.
    """
    return [_entry(state, tensor, family, groups[tensor.name]) for tensor in tensors]


def _entry(state: Snapshot, tensor: HeldTensor, family: Family, group: Group) -> dict[str, Any]:
    steps = state.tensor_steps[tensor.name]
    if not steps and not family.eager:
        return {}
    entry: dict[str, Any] = {"step": _scalar(float(steps))} if family.counts else {}
    if "momentum_decay" in family.numbers:
        entry[_MU] = _scalar(_mu_product(group, steps))
    for slot in family.slots:
        if slot in state.slots:
            entry[slot] = tensor.tensor(state.slots[slot][tensor.name])
    return entry


def imported(
    entries: Sequence[Mapping[str, Any]],
    tensors: Sequence[HeldTensor],
    family: Family,
    groups: Mapping[str, Group],
    slots: Sequence[str],
) -> tuple[Slots, dict[str, int]]:
    """Return the session's slots but the parameters, and the updates of each tensor.

    Args:
        entries: torch's state of each parameter, in order.
        tensors: the parameters.
        family: the rule.
        groups: the group of each parameter, by name.
        slots: those that the session has.

    Raises:
        InvalidRequestError: a state lacks something, has something of another rule, or does not fit its parameter.
    """
    wanted = [slot for slot in family.slots if slot in slots]
    made: Slots = {slot: {} for slot in wanted}
    steps = {}
    for index, (entry, tensor) in enumerate(zip(entries, tensors, strict=True)):
        field = f"state[{index}]"
        present = {key: value for key, value in entry.items() if value is not None}
        steps[tensor.name] = _steps(present, family, groups[tensor.name], field)
        for slot in wanted:
            if slot in present:
                made[slot][tensor.name] = tensor.values(present[slot], f"{field}[{slot!r}]")
            elif steps[tensor.name]:
                raise _invalid(f"{field}[{slot!r}]", f"is missing; the state has {sorted(present)}")
            else:
                start = family.structure_of([groups[tensor.name]]).get("initial_accumulator_value", 0.0)
                made[slot][tensor.name] = np.full(tensor.shape, start, np.float32)
    return made, steps


def _steps(entry: Mapping[str, Any], family: Family, group: Group, field: str) -> int:
    """Return how many updates a parameter has had, after looking for what is of another rule."""
    known = {*family.slots, "step", _MU}
    if unknown := sorted(set(entry) - known):
        raise _invalid(f"{field}[{unknown[0]!r}]", f"is nothing that {family.rule.__name__} keeps; is it another's?")
    if not family.counts:
        return 1 if entry else 0  # torch does not count here; what matters is whether the buffer has begun
    if "step" not in entry:
        if entry:
            raise _invalid(f"{field}['step']", f"is missing; the state has {sorted(entry)}")
        return 0
    try:
        steps = float(entry["step"])
    except (TypeError, ValueError):
        raise _invalid(f"{field}['step']", f"{entry['step']!r:.60} is no number of steps") from None
    if not 0 <= steps < math.inf or steps != int(steps):
        raise _invalid(f"{field}['step']", f"{steps!r} is no number of steps")
    if _MU in entry:
        _check_product(float(entry[_MU]), _mu_product(group, int(steps)), field)
    return int(steps)


def _check_product(given: float, expected: float, field: str) -> None:
    """A session computes the product from the present numbers; one that was made with others cannot be continued."""
    if abs(given - expected) > _AGREEMENT * abs(expected):
        raise _invalid(
            f"{field}[{_MU!r}]",
            f"{given!r}, and the group's betas and momentum_decay make {expected!r}: they were changed on the way, "
            "which a session cannot continue",
        )


def _mu_product(group: Group, steps: int) -> float:
    """Multiply NAdam's momenta as torch does: one after another, in float32."""
    product, beta1 = np.float32(1.0), float(group["betas"][0])
    for t in range(1, steps + 1):
        mu = beta1 * (1.0 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))
        product = np.float32(product * np.float32(mu))
    return float(product)


def _scalar(value: float) -> Any:
    """Return a number as torch keeps it: whatever the default device is, and at least in float32."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device="cpu")


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"state_dict: {field} {problem}", metadata={"field": field})
