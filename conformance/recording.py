"""Runs a case's reference over its steps and records the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from conformance.case import Case, Json, Reference
from conformance.inputs import Tensors, blocks, half_gradients, large, outliers, small, whole
from conformance.tolerance import tolerance

__all__ = ["BANKS", "record", "stored_inputs"]

BANKS: Final = ("blocks", "half", "large", "near", "opposed", "outliers", "small", "whole")
"""Sets of initial parameters and gradients. "opposed" is "small" with its gradients negated, "half" rounded; "near" is
"large" with parameters below 1."""

_MAKERS: Final = {"blocks": blocks, "large": large, "near": large, "outliers": outliers, "whole": whole}

_DTYPES: Final = ("float64", "float32")


def stored_inputs(bank: str) -> tuple[Tensors, Tensors]:
    """Return the initial parameters and the gradients of a bank."""
    initial, gradients = _MAKERS.get(bank, small)()
    if bank == "near":
        initial = {name: value / np.float32(128.0) for name, value in initial.items()}
    if bank == "opposed":
        gradients = {name: -gradient for name, gradient in gradients.items()}
    return initial, half_gradients(gradients) if bank == "half" else gradients


def record(case: Case) -> tuple[Json, Tensors]:
    """Run a case in float64 and in float32; return its JSON and its expected tensors."""
    entry: Json = {
        "name": case.name,
        "reference": case.reference,
        "config": case.config,
        "tensors": {
            "initial": f"initial/{case.bank}/",
            "gradients": f"gradients/{case.bank}/",
            "expected": f"expected/{case.name}/",
        },
        "checkpoints": list(case.checkpoints),
        "steps": list(case.steps),
        "tolerance": tolerance(case),
    }
    expected: Tensors = {}
    for dtype in _DTYPES:
        snapshots, told = _run(case, dtype)
        entry["slots"] = [slot for slot in snapshots[0] if slot != "param"]
        expected |= _stacked(f"expected/{case.name}/{dtype}/", snapshots)
        if dtype == "float64":
            entry |= told
    return entry, expected


def _run(case: Case, dtype: str) -> tuple[list[dict[str, Tensors]], Json]:
    """Apply every step of a case; return the slots and the telemetry at each checkpoint."""
    initial, gradients = stored_inputs(case.bank)
    reference = case.build(initial, dtype)
    snapshots, telemetry, counts = [], {}, {}
    for number in range(1, max(case.checkpoints) + 1):
        told = reference.step(number, _gradients(case, gradients, number, dtype))
        if number in case.checkpoints:
            snapshots.append(_snapshot(case, reference, initial, dtype))
            counts[str(number)] = reference.tensor_steps()
            if told:
                telemetry[str(number)] = told
    return _aligned(snapshots, initial, dtype), (
        ({"telemetry": telemetry} if telemetry else {}) | ({"tensor_steps": counts} if case.counts else {})
    )


def _snapshot(case: Case, reference: Reference, initial: Tensors, dtype: str) -> dict[str, Tensors]:
    states = reference.slots() if case.states else {}
    return {"param": reference.parameters(), **states}


def _aligned(snapshots: list[dict[str, Tensors]], initial: Tensors, dtype: str) -> list[dict[str, Tensors]]:
    """Give every checkpoint the same slots: state that a framework makes at its first update is zero before."""
    zeros = {name: np.zeros(value.shape, dtype) for name, value in initial.items()}
    return [
        {
            slot: {name: snapshot.get(slot, {}).get(name, zeros[name]) for name in tensors}
            for slot, tensors in snapshots[-1].items()
        }
        for snapshot in snapshots
    ]


def _stacked(prefix: str, snapshots: list[dict[str, Tensors]]) -> Tensors:
    """Put checkpoints one after another along a new first axis."""
    return {
        f"{prefix}{slot}/{name}": np.stack([snapshot[slot][name] for snapshot in snapshots])
        for slot, tensors in snapshots[0].items()
        for name in tensors
    }


def _gradients(case: Case, stored: Tensors, number: int, dtype: str) -> dict[str, np.ndarray | None]:
    """Return the gradients of a step as the optimizer is to see them, special steps included."""
    names = [tensor["name"] for tensor in case.config["tensors"]]
    absent = {tensor["name"] for tensor in case.config["tensors"] if tensor.get("frozen")}
    factor, first_element = 1.0, None
    for special in _specials(case, number):
        begin: Mapping[str, Any] = special.get("begin", {})
        absent |= {names[index] for index in begin.get("missingTensors", [])}
        factor *= special.get("gradient_factor", 1.0) / begin.get("lossScale", 1.0)
        first_element = special.get("first_element", first_element)
    found: dict[str, np.ndarray | None] = {}
    for name, cycle in stored.items():
        found[name] = None if name in absent else cycle[(number - 1) % len(cycle)].astype(dtype) * factor
    if first_element is not None:
        poisoned = np.array(found[names[0]])
        poisoned.flat[0] = float(first_element)
        found[names[0]] = poisoned
    return found


def _specials(case: Case, number: int) -> Iterator[Json]:
    for special in case.steps:
        first, last, every = special["first"], special.get("last", number), special.get("every", 1)
        if first <= number <= last and (number - first) % every == 0:
            yield special
