"""What each class of torch.optim is to a server: its rule, and what of a parameter group is sent with every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import stepwire.optimizers as configurations
from stepwire.errors import InvalidRequestError
from stepwire.optimizers import Optimizer

__all__ = ["FAMILIES", "Family", "Group"]

Group = Mapping[str, Any]
"""An entry of `Optimizer.param_groups`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One rule as torch.optim has it.

    Attributes:
        rule: its configuration here.
        numbers: what of a group is sent with every step, by names that both sides have.
        structure: what must be the same in all groups and stays as the session was created, with defaults for releases
            of torch whose groups do not have it.
        slots: what torch keeps for a parameter, under the server's own names, in torch's order. Some of it only with
            certain structures.
        counts: torch keeps `step` for each parameter.
        eager: torch keeps state for a parameter before its first step.
    """

    rule: type[Optimizer]
    numbers: tuple[str, ...]
    structure: Mapping[str, Any]
    slots: tuple[str, ...]
    counts: bool = True
    eager: bool = False

    def numbers_of(self, group: Group) -> dict[str, Any]:
        """Return what is sent of a group, as plain numbers: torch takes tensors for most of them.

        Raises:
            InvalidRequestError: the group is another rule's.
        """
        if missing := [name for name in self.numbers if name not in group]:
            raise InvalidRequestError(
                f"param_groups: a group has no {missing[0]!r}, which {self.rule.__name__} needs; is it of another "
                "optimizer's state dict?",
                metadata={"field": f"param_groups.{missing[0]}"},
            )
        numbers = {name: _plain(group[name]) for name in self.numbers}
        if "dampening" in numbers and not numbers["momentum"]:
            numbers["dampening"] = 0.0  # which torch ignores without momentum, and a server refuses
        return numbers

    def structure_of(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return what is fixed with the session.

        Raises:
            InvalidRequestError: two groups differ in it.
        """
        found: dict[str, Any] = {}
        for name, default in self.structure.items():
            values = [group.get(name, default) for group in groups]
            for index, value in enumerate(values):
                if value != values[0]:
                    raise InvalidRequestError(
                        f"param_groups[{index}][{name!r}] is {value!r} and param_groups[0][{name!r}] {values[0]!r}; a "
                        "session has one for all its groups: make them equal, or use an optimizer for each",
                        metadata={"field": f"param_groups[{index}].{name}"},
                    )
            found[name] = values[0]
        return found

    def keeps_momentum(self, groups: Sequence[Group]) -> bool | None:
        """Tell whether a momentum buffer is kept; None for rules that always or never do."""
        return any(_plain(group["momentum"]) for group in groups) if "momentum" in self.numbers else None

    def configuration(self, groups: Sequence[Group]) -> Optimizer:
        """Return what a session of these groups is created with; its numbers are the first group's.

        Raises:
            InvalidRequestError: a number out of range, or groups that differ in what they must share.
        """
        return self.rule(**self.numbers_of(groups[0]), **self.structure_of(groups))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value if isinstance(value, bool) else float(value)


_BETAS: Final = ("lr", "betas", "eps", "weight_decay")
_ADAM: Final = Family(
    configurations.Adam,
    (*_BETAS, "maximize"),
    {"amsgrad": False, "decoupled_weight_decay": False},
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
)

FAMILIES: Final[dict[str, Family]] = {
    "Adam": _ADAM,
    "AdamW": dataclasses.replace(_ADAM, structure={"amsgrad": False, "decoupled_weight_decay": True}),
    "NAdam": Family(
        configurations.NAdam,
        (*_BETAS, "momentum_decay", "maximize"),
        {"decoupled_weight_decay": False},
        ("exp_avg", "exp_avg_sq"),
    ),
    "RAdam": Family(
        configurations.RAdam, (*_BETAS, "maximize"), {"decoupled_weight_decay": False}, ("exp_avg", "exp_avg_sq")
    ),
    "Adamax": Family(configurations.Adamax, (*_BETAS, "maximize"), {}, ("exp_avg", "exp_inf")),
    "SGD": Family(
        configurations.SGD,
        ("lr", "momentum", "dampening", "weight_decay", "maximize"),
        {"nesterov": False},
        ("momentum_buffer",),
        counts=False,
    ),
    "RMSprop": Family(
        configurations.RMSprop,
        ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize"),
        {"centered": False},
        ("square_avg", "momentum_buffer", "grad_avg"),
    ),
    "Adagrad": Family(
        configurations.Adagrad,
        ("lr", "lr_decay", "weight_decay", "eps", "maximize"),
        {"initial_accumulator_value": 0.0},
        ("sum",),
        eager=True,
    ),
    "Adadelta": Family(
        configurations.Adadelta, ("lr", "rho", "eps", "weight_decay", "maximize"), {}, ("square_avg", "acc_delta")
    ),
    "Lion": Family(configurations.Lion, ("lr", "betas", "weight_decay", "maximize"), {}, ("exp_avg",)),
    "LAMB": Family(configurations.LAMB, (*_BETAS, "trust_coefficient", "maximize"), {}, ("exp_avg", "exp_avg_sq")),
    "LARS": Family(
        configurations.LARS,
        ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "maximize"),
        {"nesterov": False},
        ("momentum_buffer",),
    ),
}
"""By the name of the class here, and in torch.optim where that has it."""
