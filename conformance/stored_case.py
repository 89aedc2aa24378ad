"""A stored case for a runner: the parsed config, the tensors, and the special steps."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from google.protobuf import json_format

from conformance.tensor_file import read_tensors
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2

__all__ = ["VECTORS", "Special", "StoredCase", "stored_cases"]

VECTORS: Final = pathlib.Path(__file__).parent / "vectors"

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Special:
    """The specialities of one step: fields of its `StepBegin`, and changes of the stored gradient."""

    begin: step_pb2.StepBegin
    factor: float = 1.0
    first_element: float | None = None


@dataclasses.dataclass(frozen=True)
class StoredCase:
    """One case of one file. `expected` is float64, by slot and tensor, checkpoints along the first axis."""

    name: str
    family: str
    reference: str
    config: session_pb2.SessionConfig
    initial: Tensors
    gradients: Tensors
    expected: Mapping[str, Tensors]
    expected_float32: Mapping[str, Tensors]
    checkpoints: tuple[int, ...]
    tolerance: Mapping[str, float]
    entry: Mapping[str, Any]

    @property
    def rule(self) -> str:
        """The rule's name without its prefix."""
        return optimizer_pb2.Rule.Name(self.config.optimizer.rule).removeprefix("RULE_")

    @property
    def slots(self) -> tuple[str, ...]:
        """The state arrays with expected values, without "param"."""
        return tuple(self.entry["slots"])

    @property
    def poisons(self) -> bool:
        """True if some gradients contain NaN or Inf."""
        return any("first_element" in special for special in self.entry["steps"])

    def special(self, number: int) -> Special:
        """Return the specialities of a step, merged from all entries that apply to the step."""
        begin, factor, first_element = step_pb2.StepBegin(), 1.0, None
        for entry in self.entry["steps"]:
            first, last, every = entry["first"], entry.get("last", number), entry.get("every", 1)
            if not first <= number <= last or (number - first) % every:
                continue
            begin.MergeFrom(json_format.ParseDict(entry.get("begin", {}), step_pb2.StepBegin()))
            factor *= entry.get("gradient_factor", 1.0)
            first_element = float(entry["first_element"]) if "first_element" in entry else first_element
        return Special(begin, factor, first_element)

    def telemetry(self, number: int) -> step_pb2.Telemetry:
        """Return the fields of a checkpoint's telemetry that are known; the others are unset."""
        known = self.entry.get("telemetry", {}).get(str(number), {})
        return json_format.ParseDict(known, step_pb2.Telemetry())

    def tensor_steps(self, number: int) -> Mapping[str, int]:
        """Return the updates that each tensor has had at a checkpoint, where the case tells."""
        found: Mapping[str, int] = self.entry.get("tensor_steps", {}).get(str(number), {})
        return found


def stored_cases(folder: pathlib.Path = VECTORS) -> Iterator[StoredCase]:
    """Yield every case of every file of a folder, in the order of names."""
    for path in sorted(folder.glob("*.json")):
        tensors = read_tensors(path.with_suffix(".safetensors"))
        for entry in json.loads(path.read_text()):
            yield _parsed(path.stem, entry, tensors)


def _parsed(family: str, entry: Mapping[str, Any], tensors: Tensors) -> StoredCase:
    keys = entry["tensors"]
    return StoredCase(
        name=entry["name"],
        family=family,
        reference=entry["reference"],
        config=json_format.ParseDict(entry["config"], session_pb2.SessionConfig()),
        initial=_below(tensors, keys["initial"]),
        gradients=_below(tensors, keys["gradients"]),
        expected=_by_slot(tensors, keys["expected"] + "float64/"),
        expected_float32=_by_slot(tensors, keys["expected"] + "float32/"),
        checkpoints=tuple(entry["checkpoints"]),
        tolerance=entry["tolerance"],
        entry=entry,
    )


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _by_slot(tensors: Tensors, prefix: str) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for key, value in _below(tensors, prefix).items():
        slot, _, name = key.partition("/")
        found.setdefault(slot, {})[name] = value
    return found
