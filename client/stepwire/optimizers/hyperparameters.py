"""The numbers of one parameter group, and the check of their ranges for client and server."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from stepwire.errors import InvalidRequestError

__all__ = ["LARGEST_NUMBER", "OVERRIDABLE", "Hyperparameters", "number", "pair", "whole_number"]

LARGEST_NUMBER: Final = (2.0 - 2.0**-23) * 2.0**127
"""The largest float32, about 3.4e38: a larger number would be infinity in the arithmetic of an element."""


class _Bounds(NamedTuple):
    """The bounds of a number, as a check and in the words of an error."""

    allow: Callable[[float], bool]
    words: str


_WEIGHT = _Bounds(lambda value: 0.0 <= value < 1.0, "in [0, 1)")
_FRACTION = _Bounds(lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
_NOT_NEGATIVE = _Bounds(lambda value: math.isfinite(value) and value >= 0.0, "finite and >= 0")
_SINGLE = _Bounds(lambda value: 0.0 <= value <= LARGEST_NUMBER, "finite and >= 0 in float32")
_POSITIVE_SINGLE = _Bounds(lambda value: 0.0 < value <= LARGEST_NUMBER, "finite and > 0 in float32")

_RANGES: Final[dict[str, _Bounds]] = {
    "lr": _SINGLE,
    "beta1": _WEIGHT,
    "beta2": _WEIGHT,
    "eps": _SINGLE,
    "weight_decay": _SINGLE,
    "momentum": _WEIGHT,
    "dampening": _FRACTION,
    "alpha": _WEIGHT,
    "decay": _NOT_NEGATIVE,
    "trust_coefficient": _POSITIVE_SINGLE,
    "eps_root": _SINGLE,
}


_NO_SYNONYMS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """The numbers of one parameter group in one step, all float64 on the host. The rule does not have a number of None.

    The arithmetic of an element is float32. So lr, eps, weight_decay, trust_coefficient and eps_root are finite in
    float32 too, at most `LARGEST_NUMBER`, and so are lr / (1 − beta1) and lr·weight_decay.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        beta1: weight of the past in the first moment, in [0, 1). Larger is smoother and steadier,
            smaller follows the gradient more closely.
        beta2: weight of the past in the second moment, in [0, 1).
        eps: term added to the denominator, finite, ≥ 0.
        weight_decay: decay coefficient, finite, ≥ 0.
        maximize: ascend instead of descend.
        momentum: weight of the past in the momentum buffer, in [0, 1).
        dampening: fraction of the gradient that momentum leaves out, in [0, 1].
        alpha: weight of the past in the mean square (Adadelta's rho), in [0, 1).
        decay: of Adagrad's learning rate, or of NAdam's momentum, per update; finite, ≥ 0.
        trust_coefficient: factor of the layerwise trust ratio, finite, > 0.
        eps_root: term added inside the root, finite, ≥ 0.
    """

    lr: float
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    maximize: bool = False
    momentum: float | None = None
    dampening: float | None = None
    alpha: float | None = None
    decay: float | None = None
    trust_coefficient: float | None = None
    eps_root: float | None = None

    def used(self) -> tuple[str, ...]:
        """Name the numbers that the rule has."""
        return tuple(name for name in OVERRIDABLE if getattr(self, name) is not None)

    def replace(
        self, overrides: Mapping[str, Any], field: str = "hyperparameters", synonyms: Mapping[str, str] = _NO_SYNONYMS
    ) -> Hyperparameters:
        """Return a checked copy with some values replaced.

        Args:
            overrides: the new values, by names from `used()`; `betas` stands for `beta1` and `beta2` together.
            field: the path that an error names.
            synonyms: the names of numbers in an error that differ from the names of this record.

        Returns:
            The copy.

        Raises:
            InvalidRequestError: a name is unknown, the rule does not use a name, or a value is out of range. The
                message has the name and the value.
        """
        values = dict(overrides)
        if "betas" in values and self.beta1 is not None:
            values["beta1"], values["beta2"] = pair(values.pop("betas"), f"{field}.betas")
        for name, value in values.items():
            if name not in OVERRIDABLE or getattr(self, name) is None:
                raise InvalidRequestError.of(
                    f"{field}.{name}", f"{self._refusal(name)}; use one of: {', '.join(self._names())}"
                )
            values[name] = _checked(name, value, f"{field}.{synonyms.get(name, name)}")
        return dataclasses.replace(self, **values)

    def check(self, field: str = "hyperparameters", synonyms: Mapping[str, str] = _NO_SYNONYMS) -> None:
        """Refuse values out of range; for the arguments see `replace`.

        Raises:
            InvalidRequestError: the message names the field, the value and the allowed range.
        """
        self.checked(field, synonyms)

    def checked(self, field: str = "hyperparameters", synonyms: Mapping[str, str] = _NO_SYNONYMS) -> Hyperparameters:
        """Return the numbers as Python's own; for the arguments see `replace`.

        Raises:
            InvalidRequestError: a value is out of range. The message names the field, the value and the allowed range.
        """
        return self.replace({name: getattr(self, name) for name in self.used()}, field, synonyms)

    def _names(self) -> tuple[str, ...]:
        return self.used() if self.beta1 is None else ("betas", *self.used())

    def _refusal(self, name: str) -> str:
        known = name in OVERRIDABLE or name == "betas"
        return f"{name!r} is a hyper-parameter of other rules" if known else f"unknown hyper-parameter {name!r}"


OVERRIDABLE: Final = tuple(field.name for field in dataclasses.fields(Hyperparameters))
"""The names of all hyper-parameters; a rule uses some of them."""


def number(value: object, field: str) -> float:
    """Return a number as a float; scalars and 0-d arrays of NumPy and others count.

    Raises:
        InvalidRequestError: the value is not a number, or too large for a float.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError.of(field, f"{value!r:.80} is not a number that a float can represent") from None


def whole_number(value: object, field: str) -> int:
    """Return a whole number as an int; NumPy's integers count.

    Raises:
        InvalidRequestError: the value is not a whole number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidRequestError.of(field, f"{value!r:.80} is not a whole number") from None


def pair(value: object, field: str) -> tuple[float, float]:
    """Return two numbers as floats.

    Raises:
        InvalidRequestError: the value is not a tuple or list of two numbers.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InvalidRequestError.of(field, f"betas is {value!r}; it must be two numbers, such as (0.9, 0.999)")
    return number(value[0], f"{field}[0]"), number(value[1], f"{field}[1]")


def _checked(name: str, value: object, field: str) -> float:
    if name == "maximize":
        if not isinstance(value, bool):
            raise InvalidRequestError.of(field, f"maximize is {value!r}; it must be True or False")
        return value
    if not _RANGES[name].allow(plain := number(value, field)):
        shown = field.rpartition(".")[2]
        raise InvalidRequestError.of(field, f"{shown} is {value!r}; it must be {_RANGES[name].words}")
    return plain
