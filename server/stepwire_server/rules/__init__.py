"""The formulas. A rule is one pure function of scalars; engines decide how it meets memory.

A new optimizer needs one function with its equation in the module's docstring, and its row in `rule_for` and
`ALL_RULES`. Its record belongs into `stepwire.optimizers`, and its conformance vectors beside the others. Rules check
nothing: `stepwire.optimizers` checks ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire_server.rules.adam import ADAM_RULES, adam_rule_for
from stepwire_server.rules.adam_family import ADAMAX, NADAM, RADAM
from stepwire_server.rules.adaptive import ADADELTA, ADAGRAD, RMSPROP_RULES
from stepwire_server.rules.layerwise import LAMB, LARS, LARS_NESTEROV
from stepwire_server.rules.momentum import LION, SGD, SGD_MOMENTUM, SGD_NESTEROV
from stepwire_server.rules.recipe import (
    ACCUMULATED,
    AVERAGE,
    EIGHT_BIT_SLOTS,
    FLOAT32_SLOTS,
    Precision,
    Recipe,
    Stage,
)
from stepwire_server.rules.rows import (
    ADAM_SPARSE,
    RowSemantics,
    faded_slots,
    row_obstacle,
    row_rule,
    row_wise_step_sizes,
    row_wise_sums,
)
from stepwire_server.rules.rule import Decay, Rule, TensorScalar

__all__ = [
    "ACCUMULATED",
    "ADAM_SPARSE",
    "ALL_RULES",
    "AVERAGE",
    "EIGHT_BIT_SLOTS",
    "FLOAT32_SLOTS",
    "Decay",
    "Precision",
    "Recipe",
    "RowSemantics",
    "Rule",
    "Stage",
    "TensorScalar",
    "faded_slots",
    "has_momentum",
    "row_obstacle",
    "row_rule",
    "row_wise_step_sizes",
    "row_wise_sums",
    "rule_for",
]

ALL_RULES: Final[tuple[Rule, ...]] = (
    *ADAM_RULES,
    NADAM,
    RADAM,
    ADAMAX,
    SGD,
    SGD_MOMENTUM,
    SGD_NESTEROV,
    *RMSPROP_RULES.values(),
    ADAGRAD,
    ADADELTA,
    LION,
    LAMB,
    LARS,
    LARS_NESTEROV,
)
"""Every rule, for tests and warm-up."""

# Rules that leave no choice, each with the place and form of its weight decay.
_PLAIN: Final = {
    "adamax": (ADAMAX, Decay.GRADIENT),
    "adagrad": (ADAGRAD, Decay.GRADIENT),
    "adadelta": (ADADELTA, Decay.GRADIENT),
    "lion": (LION, Decay.WITHIN),
    "lamb": (LAMB, Decay.NONE),
}


def has_momentum(groups: Sequence[Hyperparameters]) -> bool:
    """Tell whether any group has momentum: then a buffer is kept for all."""
    return any(hyper.momentum for hyper in groups)


def rule_for(optimizer: Optimizer, momentum: bool) -> tuple[Rule, Decay]:
    """Return the rule of a group and the place of its weight decay.

    Args:
        optimizer: the optimizer of the session.
        momentum: True where the group has momentum; of effect where that is a choice. The rule without it leaves a
            momentum buffer as it is, as torch does.

    Returns:
        The rule, and the place and form of weight decay in steps that have some.
    """
    structure = optimizer.structure()
    decay = Decay.BEFORE if structure.decoupled_weight_decay else Decay.GRADIENT
    match optimizer.rule:
        case "adam":
            return adam_rule_for(optimizer)
        case "nadam":
            return NADAM, decay
        case "radam":
            return RADAM, decay
        case "sgd" if momentum:
            return (SGD_NESTEROV if structure.nesterov else SGD_MOMENTUM), decay
        case "sgd":
            return SGD, decay
        case "rmsprop":
            return RMSPROP_RULES[structure.centered, momentum], decay
        case "lars":
            return (LARS_NESTEROV if structure.nesterov else LARS), Decay.NONE
        case name:
            return _PLAIN[name]
