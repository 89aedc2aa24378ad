"""The judgement of a case: nothing worse than twice the framework's own distance from its float64 numbers.

The error of an element is its largest of all steps, in ulps of the largest magnitude that the element has had so far.
The distance of a float32 run is the error that nine elements of ten in a regime stay below. The tenth may be one where
two terms cancel, and luck decides whose rounding is the better; it may be off a hundred times as far. Below
`FLOOR_ULPS` a distance is that of any rounding. Where the framework's float32 is finite, stepwire's is.

Moments in 16 or 8 bits have no counterpart in the frameworks. Their distance is that from the float64 numbers, as a
part of the way that the parameters went, and their largest single change is compared with that of the float64 numbers.
At the edges of float32 the change alone counts, and below its least number with all bits, that they are finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from conformance.sweep.regimes import EXTREME, SUBNORMAL
from conformance.sweep.running import Runs
from conformance.sweep.variant import Variant

__all__ = ["FLOOR_ULPS", "Finding", "judge"]

FLOOR_ULPS: Final = 8.0
_TIMES: Final = 2.0
_QUANTILE: Final = 0.9
_TIMES_OF_ONE: Final = 100.0
_PART_OF_THE_WAY: Final = {"bfloat16": 0.05, "int8": 0.5}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The distances of one regime of one case.

    Attributes:
        case: the name of the case.
        regime: the name of the regime.
        stepwire: stepwire's distance from the float64 numbers.
        framework: the distance of the framework's float32; of reduced precision, the largest allowed distance.
        unit: the unit of both.
        jump: of reduced precision, the largest single change by the largest of the float64 numbers.
        fault: what is wrong; empty where nothing is.
    """

    case: str
    regime: str
    stepwire: float
    framework: float
    unit: str
    jump: float = 0.0
    fault: str = ""

    @property
    def share(self) -> float:
        """The distance as a part of what is allowed; infinite where stepwire is not finite and should be."""
        if self.fault.startswith("not finite"):
            return math.inf
        allowed = max(_TIMES * self.framework, FLOOR_ULPS) if self.unit == "ulps" else self.framework
        return self.stepwire / allowed


def judge(variant: Variant, runs: Runs) -> Iterator[Finding]:
    """Yield the findings of a case, a regime each."""
    for regime, elements in runs.regimes.items():
        exact, framework, stepwire = (
            values[:, elements].astype(np.float64) for values in (runs.exact, runs.framework, runs.stepwire)
        )
        with np.errstate(all="ignore"):
            finding = _finding(variant, regime, exact, framework, stepwire)
        lost = int(np.count_nonzero(np.isfinite(framework[-1]) & ~np.isfinite(stepwire[-1])))
        if lost:
            fault = f"not finite: {lost} of {exact.shape[1]} elements, where the framework's float32 is"
            finding = dataclasses.replace(finding, fault=fault)
        yield finding


def _finding(variant: Variant, regime: str, exact: np.ndarray, framework: np.ndarray, stepwire: np.ndarray) -> Finding:
    if variant.precision == "float32":
        theirs, ours = _ulps(exact, framework, framework), _ulps(exact, stepwire, framework)
        finding = Finding(variant.name, regime, _most(ours), _most(theirs), "ulps")
        if finding.share > 1.0:
            return dataclasses.replace(finding, fault="too far")
        if ours.max() > _TIMES_OF_ONE * max(theirs.max(), FLOOR_ULPS):
            return dataclasses.replace(
                finding, fault=f"one element too far: {ours.max():.2g} of {theirs.max():.2g} ulps"
            )
        return finding
    finite = np.isfinite(framework[-1]) & np.isfinite(stepwire[-1]) & np.isfinite(exact[-1])
    if not finite.any():
        return Finding(variant.name, regime, 0.0, 1.0, "of the way")
    exact, stepwire = exact[:, finite], stepwire[:, finite]
    steps, moves = np.abs(np.diff(exact, axis=0)), np.abs(np.diff(stepwire, axis=0))
    allowed = math.inf if regime in EXTREME else _PART_OF_THE_WAY[variant.precision]
    way = _rms(steps.sum(axis=0))
    part = _rms(stepwire[-1] - exact[-1]) / way if way else 0.0
    move, largest = float(moves.max()), float(steps.max())
    finding = Finding(variant.name, regime, part, allowed, "of the way", move / largest if largest else 0.0)
    if regime in SUBNORMAL:
        return finding
    if move > _TIMES * largest:
        return dataclasses.replace(finding, fault=f"a single change of {move:.2g}, where the largest is {largest:.2g}")
    return finding if finding.share <= 1.0 else dataclasses.replace(finding, fault="too far")


def _ulps(exact: np.ndarray, values: np.ndarray, framework: np.ndarray) -> np.ndarray:
    """Return each element's largest error of all steps, in ulps of its magnitude so far.

    Elements count that the framework's float32 has, and stepwire's.
    """
    reached = np.maximum.accumulate(np.abs(exact), axis=0)
    ulp = np.spacing(np.minimum(reached, 3e38).astype(np.float32)).astype(np.float64)
    errors = np.abs(values - exact) / ulp
    known = np.isfinite(framework) & np.isfinite(exact) & (reached <= 3e38) & np.isfinite(values)
    return np.max(errors, axis=0, where=known, initial=0.0)


def _most(errors: np.ndarray) -> float:
    return float(np.quantile(errors, _QUANTILE))


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(values**2)))
