"""The treatment of a gradient before the rule: the record, its ranges, and its message in the contract."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Final, Literal, get_args

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.arguments import check_choice
from stepwire.optimizers.hyperparameters import number, whole_number
from stepwire.v1 import optimizer_pb2 as pb

__all__ = [
    "LARGEST_SCALE",
    "SMALLEST_SCALE",
    "ClipFormula",
    "GradientTreatment",
    "LossScaling",
    "MissingGradient",
    "NonFinite",
    "check_scale",
    "treatment_from_wire",
    "treatment_to_wire",
]

NonFinite = Literal["reject", "skip", "allow"]
ClipFormula = Literal["torch", "optax", "keras"]
MissingGradient = Literal["reject", "keep"]

_NON_FINITE: Final = {
    "reject": pb.NON_FINITE_POLICY_REJECT,
    "skip": pb.NON_FINITE_POLICY_SKIP,
    "allow": pb.NON_FINITE_POLICY_ALLOW,
}
_CLIP: Final = {"torch": pb.CLIP_FORMULA_TORCH, "optax": pb.CLIP_FORMULA_OPTAX, "keras": pb.CLIP_FORMULA_KERAS}
_MISSING: Final = {"reject": pb.MISSING_GRADIENT_POLICY_REJECT, "keep": pb.MISSING_GRADIENT_POLICY_KEEP}
_MOST_STEPS: Final = 2**32

SMALLEST_SCALE: Final = 1e-37
LARGEST_SCALE: Final = 1e37
"""The bounds of a loss scale: between them float32 has the scale and its reciprocal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScaling:
    """Dynamic loss scaling on the server, by the rule and with the defaults of `torch.amp.GradScaler`.

    Attributes:
        initial_scale: the factor of the first gradient, in [1e-37, 1e37].
        growth_factor: the factor of the scale after `growth_interval` updates, finite, > 1.
        backoff_factor: the factor of the scale after an update that NaN or Inf prevented, in (0, 1).
        growth_interval: the number of updates in a row before growth, ≥ 1. An accumulation is one.
    """

    initial_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def check(self, field: str) -> None:
        """Refuse values out of range.

        Raises:
            InvalidRequestError: the message names the field, the value and the allowed range.
        """
        check_scale(self.initial_scale, f"{field}.initial_scale")
        _check(self, field, "growth_factor", "finite and > 1", 1.0, math.inf)
        _check(self, field, "backoff_factor", "in (0, 1)", 0.0, 1.0)
        _check_count(self.growth_interval, f"{field}.growth_interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTreatment:
    """The treatment of gradients, in this order: unscale, finite check, accumulation, norms, clipping.

    Attributes:
        non_finite: the policy for NaN and Inf: refuse the step, use up its number without an update, or apply it.
            Default `"reject"`; with loss scaling `"skip"` alone.
        clip_grad_norm: the bound of the global norm, finite, > 0; None for none.
        clip_formula: the formula of clipping by norm; default torch's.
        clip_grad_value: the bound of each element's magnitude, finite, > 0; None for none.
        accumulation_steps: the number of gradients summed into one update, ≥ 1. The policy for NaN and Inf is that of
            the sum: where it skips, a sum with one such gradient is dropped as a whole, at its end.
        loss_scaling: dynamic loss scaling on the server; None for none.
        missing_gradient: `"keep"` if a step may omit tensors. Their values, their moments and their t stay.
        parameter_average_decay: the decay d of the parameters' moving average, in (0, 1); None for none. The average is
            a float32: it stays where it is once it is within 2⁻²⁴ / (1 − d) of a parameter, by its own size. That is
            0.06 % for d = 0.9999, and 0.6 % for d = 0.99999.
        two_phase: True for a gradient that is divided over several sessions. Their client decides by its norm; the
            server keeps the bounds of norms for that client and does not apply them.
    """

    non_finite: NonFinite | None = None
    clip_grad_norm: float | None = None
    clip_formula: ClipFormula | None = None
    clip_grad_value: float | None = None
    accumulation_steps: int = 1
    loss_scaling: LossScaling | None = None
    missing_gradient: MissingGradient = "reject"
    parameter_average_decay: float | None = None
    two_phase: bool = False

    @functools.cached_property
    def policy(self) -> NonFinite:
        """The policy for NaN and Inf."""
        return self.non_finite or ("skip" if self.loss_scaling else "reject")

    def check(self, field: str, *, group_clips: bool = False) -> None:
        """Refuse values that are out of range or contradictory.

        Args:
            field: the path of the record; empty if its fields are the user's own arguments.
            group_clips: True if some group is clipped by its own norm.

        Raises:
            InvalidRequestError: the message names the field, the value and the allowed values.
        """
        if self.non_finite is not None:
            check_choice(_path(field, "non_finite"), self.non_finite, get_args(NonFinite))
        if self.clip_formula is not None:
            check_choice(_path(field, "clip_formula"), self.clip_formula, get_args(ClipFormula))
        check_choice(_path(field, "missing_gradient"), self.missing_gradient, get_args(MissingGradient))
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(self, name) is not None:
                _check(self, field, name, "finite and > 0", 0.0, math.inf)
        if self.parameter_average_decay is not None:
            _check(self, field, "parameter_average_decay", "in (0, 1)", 0.0, 1.0)
        _check_count(self.accumulation_steps, _path(field, "accumulation_steps"))
        self._check_together(field, group_clips)

    def _check_together(self, field: str, group_clips: bool) -> None:
        if self.clip_formula is not None and self.clip_grad_norm is None and not group_clips:
            raise InvalidRequestError.of(
                _path(field, "clip_formula"), f"{self.clip_formula!r} without clip_grad_norm clips nothing"
            )
        if self.accumulation_steps > 1 and self.missing_gradient == "keep":
            raise InvalidRequestError.of(
                _path(field, "missing_gradient"),
                "'keep' and accumulation_steps > 1 contradict each other; send zeros for tensors without a gradient, "
                "or accumulate on the client",
            )
        if self.loss_scaling is not None:
            if not isinstance(self.loss_scaling, LossScaling):
                raise InvalidRequestError.of(
                    _path(field, "loss_scaling"), f"{self.loss_scaling!r:.80} is not a LossScaling"
                )
            self.loss_scaling.check(_path(field, "loss_scaling"))
            if self.policy != "skip":
                raise InvalidRequestError.of(
                    _path(field, "non_finite"),
                    f"{self.non_finite!r} contradicts loss_scaling, which skips steps with NaN or Inf; leave it out",
                )


def treatment_to_wire(treatment: GradientTreatment) -> pb.GradientTreatment:
    """Encode a checked record."""
    message = pb.GradientTreatment(
        non_finite=_NON_FINITE[treatment.policy],
        missing_gradient=_MISSING[treatment.missing_gradient],
        accumulation_steps=int(treatment.accumulation_steps),
        two_phase=treatment.two_phase,
    )
    if treatment.clip_formula is not None:
        message.clip_formula = _CLIP[treatment.clip_formula]
    for name in ("clip_grad_norm", "clip_grad_value", "parameter_average_decay"):
        if getattr(treatment, name) is not None:
            setattr(message, name, float(getattr(treatment, name)))
    if (scaling := treatment.loss_scaling) is not None:
        message.loss_scaling.CopyFrom(
            pb.LossScaling(
                initial_scale=float(scaling.initial_scale),
                growth_factor=float(scaling.growth_factor),
                backoff_factor=float(scaling.backoff_factor),
                growth_interval=int(scaling.growth_interval),
            )
        )
    return message


def treatment_from_wire(message: pb.GradientTreatment, field: str, *, group_clips: bool) -> GradientTreatment:
    """Decode a record, set its defaults, and check it.

    Raises:
        InvalidRequestError: the message names the field, the value and the allowed values.
    """
    values: dict[str, Any] = {
        "non_finite": _name(message.non_finite, _NON_FINITE, f"{field}.non_finite"),
        "clip_formula": _name(message.clip_formula, _CLIP, f"{field}.clip_formula"),
        "missing_gradient": _name(message.missing_gradient, _MISSING, f"{field}.missing_gradient") or "reject",
        "accumulation_steps": message.accumulation_steps or 1,
        "two_phase": message.two_phase,
    }
    for name in ("clip_grad_norm", "clip_grad_value", "parameter_average_decay"):
        values[name] = getattr(message, name) if message.HasField(name) else None
    if message.HasField("loss_scaling"):
        given = {name.name: value for name, value in message.loss_scaling.ListFields()}
        values["loss_scaling"] = LossScaling(**given)
    treatment = GradientTreatment(**values)
    treatment.check(field, group_clips=group_clips)
    clips = group_clips or treatment.clip_grad_norm is not None
    formula = treatment.clip_formula or ("torch" if clips else None)
    return dataclasses.replace(treatment, non_finite=treatment.policy, clip_formula=formula)


def check_scale(value: object, field: str) -> None:
    """Refuse a loss scale with a reciprocal that float32 does not have.

    Raises:
        InvalidRequestError: the message names the field and the value.
    """
    if not SMALLEST_SCALE <= number(value, field) <= LARGEST_SCALE:
        raise InvalidRequestError.of(field, f"{value!r}; a loss scale must be in [1e-37, 1e37]")


def _path(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _name(value: int, names: dict[Any, Any], field: str) -> Any:
    if value == 0:
        return None
    for name, number_of in names.items():
        if number_of == value:
            return name
    raise InvalidRequestError.of(field, f"{value} is unknown; use one of: {', '.join(map(str, names.values()))}")


def _check(record: object, field: str, name: str, words: str, low: float, high: float) -> None:
    value = getattr(record, name)
    if not low < number(value, _path(field, name)) < high:
        raise InvalidRequestError.of(_path(field, name), f"{name} is {value!r}; it must be {words}")


def _check_count(value: object, field: str) -> None:
    if not 1 <= whole_number(value, field) < _MOST_STEPS:
        raise InvalidRequestError.of(field, f"{value!r:.80} is not an integer in [1, 2^32)")
