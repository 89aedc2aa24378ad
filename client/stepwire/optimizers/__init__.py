"""Optimizers: the records of a session's rule and its numbers, which a step may override.

The formulas are in the server's `rules`. Client and server check the ranges of numbers in this package alone.
"""

from __future__ import annotations

from typing import Final

from stepwire.optimizers.adam import Adam, Adamax, AdamW, NAdam, RAdam
from stepwire.optimizers.adaptive import Adadelta, Adagrad, RMSprop
from stepwire.optimizers.hyperparameters import LARGEST_NUMBER, OVERRIDABLE, Hyperparameters
from stepwire.optimizers.layerwise import LAMB, LARS
from stepwire.optimizers.momentum import SGD, Lion
from stepwire.optimizers.optimizer import Formula, Optimizer, RuleStructure

__all__ = [
    "LAMB",
    "LARGEST_NUMBER",
    "LARS",
    "OPTIMIZERS",
    "OVERRIDABLE",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Formula",
    "Hyperparameters",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "RuleStructure",
]

OPTIMIZERS: Final[dict[str, type[Optimizer]]] = {
    kind.rule: kind for kind in (Adam, NAdam, RAdam, Adamax, SGD, RMSprop, Adagrad, Adadelta, Lion, LAMB, LARS)
}
"""Every rule by its name in the contract. AdamW is Adam with decoupled decay."""
