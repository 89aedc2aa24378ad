"""The server's rule for each class of torch.optim, and the numbers of a parameter group that every step sends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import stepwire.optimizers as optimizers
from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Optimizer

__all__ = ["STATE_KEYS", "TORCH_RULES", "Group", "TorchRule"]

Group = Mapping[str, Any]
"""An entry of `Optimizer.param_groups`."""


@dataclasses.dataclass(frozen=True)
class TorchRule:
    """One rule as torch.optim has it.

    Attributes:
        optimizer: the class of the rule's record in `stepwire.optimizers`.
        numbers: the numbers of a group that every step sends, by names that torch and the record have.
        structure: the options that are the same in all groups and fixed at the session's creation, with defaults for
            releases of torch without them.
        slots: the slots that torch keeps for a parameter, by the server's names, in torch's order. Some depend on the
            structure.
        counts: True if torch keeps `step` for each parameter. Otherwise a parameter has state once its slots have
            begun, which is the server's scalar of a tensor.
        product: the name of the number in torch's state that is the server's scalar of a tensor; empty for none.
        eager: True if torch keeps state for a parameter before its first step.
        takes_rows: True if torch's class steps the rows of sparse gradients; the others of torch refuse them.
    """

    optimizer: type[Optimizer]
    numbers: tuple[str, ...]
    structure: Mapping[str, Any]
    slots: tuple[str, ...]
    counts: bool = True
    product: str = ""
    eager: bool = False
    takes_rows: bool = False

    @property
    def keys(self) -> frozenset[str]:
        """The keys that torch's state of a parameter may have."""
        product = [self.product] if self.product else []
        return frozenset({*self.slots, *product, *(["step"] if self.counts else [])})

    def keeps_scalars(self, slots: Sequence[str]) -> bool:
        """Tell whether a session with these slots keeps a scalar for each tensor."""
        return any(slot in slots for slot in self.slots) and (bool(self.product) or not self.counts)

    def numbers_of(self, group: Group) -> dict[str, Any]:
        """Return the numbers of a group as plain numbers; torch allows tensors for most of them.

        Raises:
            InvalidRequestError: the group is of another rule.
        """
        if missing := [name for name in self.numbers if name not in group]:
            raise InvalidRequestError(
                f"param_groups: a group has no {missing[0]!r}, which {self.optimizer.__name__} needs; is it of another "
                "optimizer's state dict?",
                metadata={"field": f"param_groups.{missing[0]}"},
            )
        numbers = {name: _plain(group[name]) for name in self.numbers}
        if "dampening" in numbers and not numbers["momentum"]:
            numbers["dampening"] = 0.0  # torch ignores dampening without momentum, and a server refuses it
        return numbers

    def structure_of(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return the options that are fixed with the session.

        Raises:
            InvalidRequestError: two groups differ in an option.
        """
        found: dict[str, Any] = {}
        for name, default in self.structure.items():
            values = [group.get(name, default) for group in groups]
            for index, value in enumerate(values):
                if value != values[0]:
                    raise InvalidRequestError(
                        f"param_groups[{index}][{name!r}] is {value!r} and param_groups[0][{name!r}] {values[0]!r}; a "
                        "session has one value for all its groups: make them equal, or use an optimizer for each",
                        metadata={"field": f"param_groups[{index}].{name}"},
                    )
            found[name] = values[0]
        return found

    def keeps_momentum(self, groups: Sequence[Group]) -> bool | None:
        """Tell whether a momentum buffer is kept; None for a rule that always or never keeps one."""
        return any(_plain(group["momentum"]) for group in groups) if "momentum" in self.numbers else None

    def optimizer_for(self, groups: Sequence[Group]) -> Optimizer:
        """Return the optimizer of a session of these groups, with the numbers of the first group.

        Raises:
            InvalidRequestError: a number is out of range, or groups differ in an option that is fixed with the session.
        """
        return self.optimizer(**self.numbers_of(groups[0]), **self.structure_of(groups))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value if isinstance(value, bool) else float(value)


_BETAS: Final = ("lr", "betas", "eps", "weight_decay")
_ADAM: Final = TorchRule(
    optimizers.Adam,
    (*_BETAS, "maximize"),
    {"amsgrad": False, "decoupled_weight_decay": False},
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
)

TORCH_RULES: Final[dict[str, TorchRule]] = {
    "Adam": _ADAM,
    "AdamW": dataclasses.replace(_ADAM, structure={"amsgrad": False, "decoupled_weight_decay": True}),
    "NAdam": TorchRule(
        optimizers.NAdam,
        (*_BETAS, "momentum_decay", "maximize"),
        {"decoupled_weight_decay": False},
        ("exp_avg", "exp_avg_sq"),
        product="mu_product",
    ),
    "RAdam": TorchRule(
        optimizers.RAdam, (*_BETAS, "maximize"), {"decoupled_weight_decay": False}, ("exp_avg", "exp_avg_sq")
    ),
    "Adamax": TorchRule(optimizers.Adamax, (*_BETAS, "maximize"), {}, ("exp_avg", "exp_inf")),
    "SGD": TorchRule(
        optimizers.SGD,
        ("lr", "momentum", "dampening", "weight_decay", "maximize"),
        {"nesterov": False},
        ("momentum_buffer",),
        counts=False,
        takes_rows=True,
    ),
    "RMSprop": TorchRule(
        optimizers.RMSprop,
        ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize"),
        {"centered": False},
        ("square_avg", "momentum_buffer", "grad_avg"),
    ),
    "Adagrad": TorchRule(
        optimizers.Adagrad,
        ("lr", "lr_decay", "weight_decay", "eps", "maximize"),
        {"initial_accumulator_value": 0.0},
        ("sum",),
        eager=True,
        takes_rows=True,
    ),
    "Adadelta": TorchRule(
        optimizers.Adadelta, ("lr", "rho", "eps", "weight_decay", "maximize"), {}, ("square_avg", "acc_delta")
    ),
    "Lion": TorchRule(optimizers.Lion, ("lr", "betas", "weight_decay", "maximize"), {}, ("exp_avg",)),
    "LAMB": TorchRule(optimizers.LAMB, (*_BETAS, "trust_coefficient", "maximize"), {}, ("exp_avg", "exp_avg_sq")),
    "LARS": TorchRule(
        optimizers.LARS,
        ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "maximize"),
        {"nesterov": False},
        ("momentum_buffer",),
    ),
}
"""The rules by the name of their class in `stepwire.torch`, and in torch.optim if torch has the class."""

STATE_KEYS: Final = frozenset().union(*(rule.keys for rule in TORCH_RULES.values()))
"""The keys of torch's state of a parameter under any rule; other keys are of other code."""
