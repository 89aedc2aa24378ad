"""Optimizer configurations: what a session is told at creation, and what a step may override.

These are records only. The formulas live in the server's `rules`; the ranges are checked here, in one
place, by client and server alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from stepwire.errors import InvalidRequestError

__all__ = ["OVERRIDABLE", "Adam", "AdamW", "Formula", "Hyperparameters"]

Formula = Literal["torch", "keras", "optax", "no_bias_correction", "decay_after"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """The numbers of one parameter group in one step, all float64 on the host.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        beta1: weight of the past in the first moment, in [0, 1). Larger is smoother and steadier,
            smaller follows the gradient more closely.
        beta2: weight of the past in the second moment, in [0, 1).
        eps: term added to the denominator, finite, ≥ 0.
        weight_decay: decay coefficient, finite, ≥ 0.
        maximize: ascend instead of descend.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False

    def replace(self, overrides: Mapping[str, Any], field: str = "hyperparameters") -> Hyperparameters:
        """Return a checked copy with some values replaced.

        Args:
            overrides: names from `OVERRIDABLE`; `betas` stands for `beta1` and `beta2` together.
            field: the path that an error names.

        Raises:
            InvalidRequestError: an unknown name or a value out of range; the message names both.
        """
        values = dict(overrides)
        if "betas" in values:
            values["beta1"], values["beta2"] = _pair(values.pop("betas"), f"{field}.betas")
        for name in values:
            if name not in OVERRIDABLE:
                allowed = ", ".join(("betas", *OVERRIDABLE))
                raise _invalid(f"{field}.{name}", f"unknown hyper-parameter {name!r}; use one of: {allowed}")
        changed = dataclasses.replace(self, **values)
        changed.check(field)
        return changed

    def check(self, field: str = "hyperparameters") -> None:
        """Refuse values out of range.

        Raises:
            InvalidRequestError: names the field, the value and the allowed range.
        """
        for name in ("beta1", "beta2"):
            value = _number(getattr(self, name), f"{field}.{name}")
            if not 0.0 <= value < 1.0:
                raise _invalid(f"{field}.{name}", f"{name} is {value!r}; it must be in [0, 1)")
        for name in ("lr", "eps", "weight_decay"):
            value = _number(getattr(self, name), f"{field}.{name}")
            if not (math.isfinite(value) and value >= 0.0):
                raise _invalid(f"{field}.{name}", f"{name} is {value!r}; it must be finite and >= 0")
        if not isinstance(self.maximize, bool):
            raise _invalid(f"{field}.maximize", f"maximize is {self.maximize!r}; it must be True or False")


OVERRIDABLE: Final = tuple(field.name for field in dataclasses.fields(Hyperparameters))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (Kingma & Ba, 2015, algorithm 1), with the options of `torch.optim.Adam`.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        betas: weights of the past in the first and second moment, each in [0, 1). A larger β1 is
            smoother and steadier, a smaller one more responsive.
        eps: added to the denominator, outside the root, finite, ≥ 0.
        weight_decay: finite, ≥ 0. Added to the gradient (L2), or taken off the parameter when
            `decoupled_weight_decay`.
        amsgrad: divide by the running maximum of the raw second moment, as torch does.
        maximize: ascend instead of descend.
        decoupled_weight_decay: AdamW's decay, p *= 1 − lr·weight_decay before the update.
        formula: which published variant; `"no_bias_correction"` leaves out both corrections.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False
    formula: Formula = "torch"

    def __post_init__(self) -> None:
        """Refuse values out of range with an error that names them."""
        for name in ("amsgrad", "decoupled_weight_decay"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(f"optimizer.{name}", f"{name} is {getattr(self, name)!r}; use True or False")
        if self.formula not in get_args(Formula):
            allowed = ", ".join(get_args(Formula))
            raise _invalid("optimizer.formula", f"formula is {self.formula!r}; use one of: {allowed}")
        self.hyperparameters().check("optimizer")

    def hyperparameters(self) -> Hyperparameters:
        """Return the numbers alone, as every group starts with them."""
        beta1, beta2 = _pair(self.betas, "optimizer.betas")
        return Hyperparameters(
            lr=self.lr,
            beta1=beta1,
            beta2=beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            maximize=self.maximize,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), with torch's defaults."""

    weight_decay: float = 1e-2
    decoupled_weight_decay: bool = True


def _invalid(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {message}", metadata={"field": field})


def _number(value: object, field: str) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]  # NumPy scalars and 0-d arrays too
    except (TypeError, ValueError, OverflowError):
        raise _invalid(field, f"{value!r:.80} is not a number that a float can hold") from None


def _pair(value: object, field: str) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _invalid(field, f"betas is {value!r}; it must be two numbers, such as (0.9, 0.999)")
    return _number(value[0], f"{field}[0]"), _number(value[1], f"{field}[1]")
