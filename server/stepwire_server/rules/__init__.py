"""The formulas. A rule is one pure function of scalars; engines decide how it meets memory.

A new optimizer is one module here: its function, the docstring with its equation, its rows in `ALL_RULES`.
Rules check nothing: ranges are checked by `stepwire.optimizers`, and whoever creates a session compares its
formula with `SERVED_FORMULAS` first.
"""

from __future__ import annotations

from typing import Final

from stepwire_server.rules.adam import ADAM_RULES, CORRECTS_BIAS, rule_for, slots_for
from stepwire_server.rules.rule import Rule

__all__ = ["ALL_RULES", "SERVED_FORMULAS", "Rule", "rule_for", "slots_for"]

ALL_RULES: Final[tuple[Rule, ...]] = ADAM_RULES
"""Every rule, for tests and warm-up."""

SERVED_FORMULAS: Final = frozenset(CORRECTS_BIAS)
"""The values of `Adam.formula` that `rule_for` knows."""
