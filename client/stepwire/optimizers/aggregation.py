"""The aggregation of several workers' gradients: the record, its ranges, and its message in the contract."""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Literal, get_args

from google.protobuf.duration_pb2 import Duration

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.arguments import checked_instance
from stepwire.optimizers.hyperparameters import number, whole_number
from stepwire.v1 import aggregation_pb2 as pb

__all__ = [
    "LEAST_WEIGHT",
    "MOST_WEIGHT",
    "Aggregation",
    "AggregationMode",
    "Reduction",
    "aggregation_from_wire",
    "aggregation_to_wire",
]

AggregationMode = Literal["sync", "async"]
Reduction = Literal["mean", "sum", "weighted_mean", "median", "trimmed_mean", "norm_bounded_mean"]

LEAST_WEIGHT: Final = 1e-30
MOST_WEIGHT: Final = 1e30
"""The range of the weights of a weighted mean."""

_MODES: Final = {"sync": pb.AGGREGATION_MODE_SYNC, "async": pb.AGGREGATION_MODE_ASYNC}
_REDUCTIONS: Final[dict[Reduction, Any]] = {
    name: pb.Reduction.Value(f"REDUCTION_{name.upper()}") for name in get_args(Reduction)
}
_MODE_NAMES: Final[dict[int, AggregationMode]] = dict(zip(_MODES.values(), get_args(AggregationMode), strict=True))
_REDUCTION_NAMES: Final[dict[int, Reduction]] = {value: name for name, value in _REDUCTIONS.items()}
_REDUCTION_NAMES[pb.REDUCTION_UNSPECIFIED] = "mean"
_MOST_WORKERS: Final = 4096
_MOST_STEPS: Final = 2**53
_MOST_SECONDS: Final = 1e6
_LEAST_NORM, _MOST_NORM = 1e-37, 1e37


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The way that the gradients of several workers on one session meet.

    In mode `"sync"` the gradients of a round become one: their exact sum, times weights, is divided once and rounded
    once to float32. No order of arrival changes a bit. In mode `"async"` each gradient is a step.

    Attributes:
        workers: the number of workers, in [1, 4096]; their indices are [0, workers).
        mode: `"sync"` or `"async"`.
        required_workers: the gradients that a round needs, in [1, workers]; None for all. With fewer, a round ends
            when every present worker has contributed, or so many have and the grace is over. Sync alone.
        reduction: `"mean"`, `"sum"`, or `"weighted_mean"` by the weights of the steps. Against bad workers `"median"`,
            `"trimmed_mean"` or `"norm_bounded_mean"`, which keep every gradient of a round. Sync alone.
        trimmed: the gradients that `"trimmed_mean"` leaves out on either side, >= 1, less than half of the required.
        norm_bound: the bound of each gradient's norm for `"norm_bounded_mean"`; None for the median of the round's.
        max_staleness_steps: the largest age of a gradient that is applied, in steps; None for no bound. Async alone.
        max_clock_lead: the contributions that a worker may be ahead of the slowest present one; None for no bound.
            Async alone.
        staleness_correction: divide the learning rate of a step by 1 + its staleness. Async alone.
        round_timeout: the seconds after which a round without enough workers fails, in (0, 1e6].
        least_grace: the shortest grace for stragglers, in seconds from a round's first contribution.
        most_grace: the longest grace, in seconds. Within both it is the median of past arrivals + 3 MAD.
        uploads_at_once: the gradients that the server receives at a time, in [1, 4096].
    """

    workers: int
    mode: AggregationMode = "sync"
    required_workers: int | None = None
    reduction: Reduction = "mean"
    trimmed: int | None = None
    norm_bound: float | None = None
    max_staleness_steps: int | None = None
    max_clock_lead: int | None = None
    staleness_correction: bool = False
    round_timeout: float = 60.0
    least_grace: float = 0.002
    most_grace: float = 10.0
    uploads_at_once: int = 2

    @property
    def required(self) -> int:
        """The gradients that a round needs."""
        return self.workers if self.required_workers is None else self.required_workers

    @property
    def is_robust(self) -> bool:
        """The reduction keeps every gradient of a round."""
        return self.reduction in ("median", "trimmed_mean", "norm_bounded_mean")

    def check(self, field: str) -> None:
        """Check the values.

        Args:
            field: the path of the aggregation.

        Raises:
            InvalidRequestError: a value is out of range, or does not go with the mode; the message names it.
        """
        if self.mode not in _MODES:
            raise InvalidRequestError.of(f"{field}.mode", f"{self.mode!r:.80} is none of {', '.join(_MODES)}")
        if self.reduction not in _REDUCTIONS:
            known = ", ".join(_REDUCTIONS)
            raise InvalidRequestError.of(f"{field}.reduction", f"{self.reduction!r:.80} is none of {known}")
        _check_count(self.workers, 1, _MOST_WORKERS, f"{field}.workers")
        _check_count(self.uploads_at_once, 1, _MOST_WORKERS, f"{field}.uploads_at_once")
        if self.required_workers is not None:
            _check_count(self.required_workers, 1, self.workers, f"{field}.required_workers")
        for name, least in (("round_timeout", 1e-9), ("least_grace", 0.0), ("most_grace", 0.0)):
            seconds = number(getattr(self, name), f"{field}.{name}")
            if not least <= seconds <= _MOST_SECONDS:
                raise InvalidRequestError.of(f"{field}.{name}", f"{seconds!r} is not in [{least:g}, 1e6] seconds")
        if self.most_grace < self.least_grace:
            raise InvalidRequestError.of(f"{field}.most_grace", f"{self.most_grace!r} is below least_grace")
        self._check_mode(field)
        self._check_reduction(field)

    def _check_mode(self, field: str) -> None:
        alone = {"async": ("max_staleness_steps", "max_clock_lead", "staleness_correction")}
        alone["sync"] = ("required_workers", "trimmed", "norm_bound")
        for mode, names in alone.items():
            for name in names:
                if self.mode != mode and getattr(self, name) not in (None, False):
                    raise InvalidRequestError.of(f"{field}.{name}", f"it is for mode {mode!r}; leave it out")
        if self.mode == "async" and self.reduction != "mean":
            raise InvalidRequestError.of(f"{field}.reduction", "each gradient is a step with 'async'; leave it out")
        for name in ("max_staleness_steps", "max_clock_lead"):
            if getattr(self, name) is not None:
                _check_count(getattr(self, name), 0, _MOST_STEPS, f"{field}.{name}")

    def _check_reduction(self, field: str) -> None:
        if (self.trimmed is not None) != (self.reduction == "trimmed_mean"):
            raise InvalidRequestError.of(f"{field}.trimmed", "it goes with the reduction 'trimmed_mean' alone")
        if self.trimmed is not None:
            _check_count(self.trimmed, 1, (self.required - 1) // 2, f"{field}.trimmed")
        if self.norm_bound is not None:
            if self.reduction != "norm_bounded_mean":
                raise InvalidRequestError.of(f"{field}.norm_bound", "it is for the reduction 'norm_bounded_mean'")
            bound = number(self.norm_bound, f"{field}.norm_bound")
            if not _LEAST_NORM <= bound <= _MOST_NORM:
                raise InvalidRequestError.of(f"{field}.norm_bound", f"{bound!r} is not in [1e-37, 1e37]")


def _check_count(value: int, least: int, most: int, field: str) -> None:
    count = whole_number(value, field)
    if not least <= count <= most:
        raise InvalidRequestError.of(field, f"{count} is not in [{least}, {most}]")


def aggregation_to_wire(aggregation: Aggregation) -> pb.Aggregation:
    """Encode an aggregation.

    Raises:
        InvalidRequestError: as `Aggregation.check`.
    """
    checked_instance(aggregation, Aggregation, "aggregation", "give one such as stepwire.Aggregation(workers=2)")
    aggregation.check("aggregation")
    return pb.Aggregation(
        mode=_MODES[aggregation.mode],
        workers=aggregation.workers,
        required_workers=aggregation.required_workers or 0,
        reduction=_REDUCTIONS[aggregation.reduction],
        max_staleness_steps=aggregation.max_staleness_steps,
        max_clock_lead=aggregation.max_clock_lead,
        staleness_correction=aggregation.staleness_correction,
        round_timeout=_duration(aggregation.round_timeout),
        least_grace=_duration(aggregation.least_grace),
        most_grace=_duration(aggregation.most_grace),
        uploads_at_once=aggregation.uploads_at_once,
        trimmed=aggregation.trimmed or 0,
        norm_bound=aggregation.norm_bound,
    )


def aggregation_from_wire(message: pb.Aggregation, field: str) -> Aggregation | None:
    """Decode an aggregation; None for one worker.

    Raises:
        InvalidRequestError: as `Aggregation.check`.
    """
    if message.mode == pb.AGGREGATION_MODE_UNSPECIFIED:
        if message.ByteSize():
            raise InvalidRequestError.of(field, "`mode` is unset beside other fields; set it, or leave all out")
        return None
    aggregation = Aggregation(
        mode=_MODE_NAMES[message.mode],
        workers=message.workers or 1,
        required_workers=message.required_workers or None,
        reduction=_REDUCTION_NAMES[message.reduction],
        trimmed=message.trimmed or None,
        norm_bound=message.norm_bound if message.HasField("norm_bound") else None,
        max_staleness_steps=message.max_staleness_steps if message.HasField("max_staleness_steps") else None,
        max_clock_lead=message.max_clock_lead if message.HasField("max_clock_lead") else None,
        staleness_correction=message.staleness_correction,
        round_timeout=_seconds(message, "round_timeout", Aggregation.round_timeout),
        least_grace=_seconds(message, "least_grace", Aggregation.least_grace),
        most_grace=_seconds(message, "most_grace", Aggregation.most_grace),
        uploads_at_once=message.uploads_at_once or Aggregation.uploads_at_once,
    )
    aggregation.check(field)
    return aggregation


def _duration(seconds: float) -> Duration:
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def _seconds(message: pb.Aggregation, field: str, default: float) -> float:
    if not message.HasField(field):
        return default
    duration: Duration = getattr(message, field)
    return duration.seconds + duration.nanos / 1e9
