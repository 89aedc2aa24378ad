"""Adam and its relatives: two moments of the gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, cast

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import Hyperparameters
from stepwire.optimizers.optimizer import Formula, RuleStructure, TwoBetas

__all__ = ["Adam", "AdamW", "Adamax", "NAdam", "RAdam"]

# Defaults as published with each formula: eps, and the decay of AdamW.
_EPS = {"torch": 1e-8, "keras": 1e-7, "optax": 1e-8, "no_bias_correction": 1e-6, "decay_after": 1e-8}
_ADAMW_DECAY = {"torch": 1e-2, "keras": 4e-3, "optax": 1e-4, "no_bias_correction": 1e-2, "decay_after": 1e-2}
_AMSGRAD = {
    "torch": (False, True),
    "keras": (False, True),
    "optax": (False, "corrected"),
    "no_bias_correction": (False, True),
    "decay_after": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(TwoBetas):
    """Adam (Kingma & Ba, 2015, algorithm 1), in the form of one of several frameworks.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        betas: weights of the past in the first and second moment, each in [0, 1). A larger β1 is
            smoother and steadier, a smaller one more responsive.
        eps: term of the denominator, finite, ≥ 0. Default 1e-8; Keras's 1e-7, `"no_bias_correction"`'s 1e-6 (BERT).
        weight_decay: finite, ≥ 0. Added to the gradient (L2), or subtracted from the parameter with
            `decoupled_weight_decay`.
        amsgrad: True (or `"raw"`) to divide by the largest raw second moment so far, as torch and Keras do.
            `"corrected"` for the largest bias-corrected one, as in optax. Of moments in bfloat16 the largest is that of
            many rounded ones, so steps are up to a few percent too small.
        maximize: ascend instead of descend.
        decoupled_weight_decay: AdamW's decay by lr·weight_decay of the parameter, in the form of the formula.
        formula: the form of the rule: `"torch"` (the paper's), `"keras"` (eps beside √v before its correction),
            `"optax"` (eps_root, Nesterov), `"no_bias_correction"`, `"decay_after"` (bitsandbytes: decay after the
            update).
        nesterov: look ahead by one step (Dozat, 2016), as optax does; formula `"optax"` only.
        eps_root: term inside the root, finite, ≥ 0; formula `"optax"` only.
    """

    rule: ClassVar[str] = "adam"

    eps: float = cast(float, None)
    amsgrad: bool | Literal["raw", "corrected"] = False
    decoupled_weight_decay: bool = False
    formula: Formula = "torch"
    nesterov: bool = False
    eps_root: float = 0.0

    def __post_init__(self) -> None:
        """Set the formula's defaults, and refuse options that contradict each other."""
        if cast(Any, self.eps) is None:
            object.__setattr__(self, "eps", _EPS.get(str(self.formula), 1e-8))
        if self.amsgrad == "raw":
            object.__setattr__(self, "amsgrad", True)
        super().__post_init__()
        self._check_structure()

    def structure(self) -> RuleStructure:
        """See `Optimizer.structure`."""
        names = {"False": "none", "True": "raw"}
        return super().structure()._replace(amsgrad=names.get(str(self.amsgrad), str(self.amsgrad)))

    def hyperparameters(self) -> Hyperparameters:
        """Return the numbers that every group starts with."""
        numbers = super().hyperparameters()
        return numbers if self.formula == "optax" else dataclasses.replace(numbers, eps_root=None)

    def check_numbers(self, numbers: Hyperparameters, field: str) -> None:
        """See `Optimizer.check_numbers`."""
        super().check_numbers(numbers, field)
        if numbers.weight_decay and self.formula in ("keras", "decay_after") and not self.decoupled_weight_decay:
            raise InvalidRequestError.of(
                f"{field}.weight_decay",
                f"weight_decay is {numbers.weight_decay!r}, and the formula {self.formula!r} has decoupled decay only; "
                f"use AdamW(formula={self.formula!r}), or 0",
            )

    def _check_structure(self) -> None:
        if not isinstance(self.amsgrad, (bool, str)) or self.amsgrad not in (False, True, "corrected"):
            raise InvalidRequestError.of(
                "optimizer.amsgrad", f"amsgrad is {self.amsgrad!r}; use False, True, 'raw' or 'corrected'"
            )
        if self.amsgrad not in _AMSGRAD[self.formula]:
            allowed = " or ".join(repr(choice) for choice in _AMSGRAD[self.formula])
            raise InvalidRequestError.of(
                "optimizer.amsgrad",
                f"amsgrad is {self.amsgrad!r} and the formula {self.formula!r}, which has only {allowed}. AMSGrad of "
                "torch and Keras uses the raw second moment (True), AMSGrad of optax the corrected one ('corrected')",
            )
        if self.nesterov and (self.formula != "optax" or self.amsgrad):
            raise InvalidRequestError.of(
                "optimizer.nesterov",
                "nesterov is True; Adam has it with formula='optax' and without amsgrad (torch's NAdam is `NAdam`)",
            )
        if self.eps_root and self.formula != "optax":
            raise InvalidRequestError.of(
                "optimizer.eps_root", f"eps_root is {self.eps_root!r}; only formula='optax' has it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019); decay 1e-2, Keras's 4e-3, optax's 1e-4."""

    weight_decay: float = cast(float, None)
    decoupled_weight_decay: bool = True

    def __post_init__(self) -> None:
        """Set the formula's default decay."""
        if cast(Any, self.weight_decay) is None:
            object.__setattr__(self, "weight_decay", _ADAMW_DECAY.get(str(self.formula), 1e-2))
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NAdam(TwoBetas):
    """Adam with Nesterov momentum (Dozat, 2016) as `torch.optim.NAdam` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        betas: as Adam's.
        eps: added to the denominator, finite, ≥ 0.
        weight_decay: finite, ≥ 0; L2, or subtracted from the parameter with `decoupled_weight_decay`.
        momentum_decay: ψ of the momentum's warm-up, finite, ≥ 0.
        decoupled_weight_decay: decay is subtracted from the parameter.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "nadam"
    synonyms: ClassVar = {"decay": "momentum_decay"}

    lr: float = 2e-3
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RAdam(TwoBetas):
    """Adam with a rectified step size (Liu et al., 2020) as `torch.optim.RAdam` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        betas: as Adam's.
        eps: added to the denominator, finite, ≥ 0.
        weight_decay: finite, ≥ 0; L2, or subtracted from the parameter with `decoupled_weight_decay`.
        decoupled_weight_decay: decay is subtracted from the parameter.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "radam"

    eps: float = 1e-8
    decoupled_weight_decay: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adamax(TwoBetas):
    """Adam by the largest gradient (Kingma & Ba, 2015, algorithm 2) as `torch.optim.Adamax` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        betas: weights of the past in the mean gradient and in its largest magnitude.
        eps: added to the magnitude, finite, ≥ 0.
        weight_decay: added to the gradient (L2), finite, ≥ 0.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "adamax"

    lr: float = 2e-3
    eps: float = 1e-8
