"""The common base of all optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import LARGEST_NUMBER, OVERRIDABLE, Hyperparameters, pair

__all__ = ["Formula", "Optimizer", "RuleStructure", "TwoBetas"]

Formula = Literal["torch", "keras", "optax", "no_bias_correction", "decay_after"]


class RuleStructure(NamedTuple):
    """The options of an optimizer besides its numbers; fixed for the session's life.

    Attributes:
        formula: the form of the rule.
        amsgrad: the second moment that never falls: `"none"`, `"raw"` or `"corrected"`.
        decoupled_weight_decay: True to subtract the decay from the parameter, False to add it to the gradient.
        nesterov: Nesterov momentum.
        centered: divide by the standard deviation instead of the root mean square.
        initial_accumulator_value: the first value of Adagrad's sum.
    """

    formula: Formula = "torch"
    amsgrad: str = "none"
    decoupled_weight_decay: bool = False
    nesterov: bool = False
    centered: bool = False
    initial_accumulator_value: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The base of all optimizers: records only. The formulas are in the server's `rules`.

    Class attributes:
        rule: the rule's name in the contract.
        published: the formula of a rule with a single one.
        synonyms: the constructor's names that differ from the contract's, by the contract's name.
    """

    rule: ClassVar[str]
    published: ClassVar[Formula] = "torch"
    synonyms: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Make the numbers Python's own, and refuse a value out of range with an error that names the value."""
        for name in (field.name for field in dataclasses.fields(self)):
            if getattr(self, name) is None:  # None in a record of numbers says that the rule has no such number
                raise InvalidRequestError.of(f"optimizer.{name}", f"{name} is None; leave it out for the default")
        for name in ("decoupled_weight_decay", "nesterov", "centered"):
            if not isinstance(getattr(self, name, False), bool):
                raise InvalidRequestError.of(
                    f"optimizer.{name}", f"{name} is {getattr(self, name)!r}; use True or False"
                )
        if self.structure().formula not in get_args(Formula):
            allowed = ", ".join(get_args(Formula))
            raise InvalidRequestError.of(
                "optimizer.formula", f"formula is {self.structure().formula!r}; use one of: {allowed}"
            )
        numbers = self.hyperparameters().checked("optimizer", self.synonyms)
        self.check_numbers(numbers, "optimizer")
        for name, value in self.arguments(numbers).items():
            object.__setattr__(self, name, value)

    def structure(self) -> RuleStructure:
        """Return the options of the optimizer besides its numbers."""
        defaults = RuleStructure(formula=self.published)
        return defaults._replace(**{name: getattr(self, name) for name in RuleStructure._fields if hasattr(self, name)})

    def hyperparameters(self) -> Hyperparameters:
        """Return the numbers alone, as every group starts with them."""
        names = {field.name: field.name for field in dataclasses.fields(self)}
        names |= {self.synonyms[name]: name for name in self.synonyms}
        return Hyperparameters(**{to: getattr(self, name) for name, to in names.items() if to in OVERRIDABLE})

    def override(self, base: Hyperparameters, overrides: Mapping[str, Any], field: str) -> Hyperparameters:
        """Return a checked copy of `base` with some values replaced.

        Args:
            base: the numbers to start from.
            overrides: the new values, by the names of the constructor or the contract.
            field: the path that an error names.

        Returns:
            The new numbers.

        Raises:
            InvalidRequestError: the rule does not use a name, a value is out of range, or values contradict each other.
                The message names the values.
        """
        contract = {self.contract_name(name): value for name, value in overrides.items()}
        changed = base.replace(contract, field, self.synonyms)
        self.check_numbers(changed, field)
        return changed

    def contract_name(self, name: str) -> str:
        """Return the contract's name of a hyper-parameter, from that name or the constructor's."""
        return next((contract for contract, own in self.synonyms.items() if own == name), name)

    def arguments(self, numbers: Hyperparameters) -> dict[str, Any]:
        """Return the constructor's arguments for these numbers."""
        values = {name: getattr(numbers, name) for name in numbers.used()}
        arguments = {self.synonyms.get(name, name): value for name, value in values.items()}
        if "beta1" in arguments:
            arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
        return arguments

    def check_numbers(self, numbers: Hyperparameters, field: str) -> None:
        """Refuse numbers that contradict each other or the structure. The ranges are checked before.

        Raises:
            InvalidRequestError: the message names the field.
        """
        if numbers.lr > (largest := self.largest_lr(numbers)):
            raise InvalidRequestError.of(
                f"{field}.lr",
                f"lr is {numbers.lr!r}, and beside the other numbers float32 has step sizes up to lr = {largest:.3g} "
                "alone; use a smaller one",
            )

    def largest_lr(self, numbers: Hyperparameters) -> float:
        """Return the learning rate up to which float32 has every step size of the rule: lr itself and lr·λ."""
        return LARGEST_NUMBER / max(numbers.weight_decay or 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoBetas(Optimizer):
    """The base of optimizers with two weights of the past."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    maximize: bool = False

    def hyperparameters(self) -> Hyperparameters:
        """Return the numbers alone, as every group starts with them."""
        beta1, beta2 = pair(self.betas, "optimizer.betas")
        return dataclasses.replace(super().hyperparameters(), beta1=beta1, beta2=beta2)

    def largest_lr(self, numbers: Hyperparameters) -> float:
        """Return the bound of all optimizers, which holds for lr / (1 − β1) too, the factor of the first update."""
        return super().largest_lr(numbers) * (1.0 - (numbers.beta1 or 0.0))
