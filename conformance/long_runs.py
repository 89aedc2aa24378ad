"""Runs that several frameworks have in common: long ones with large parameters, and gradients that rise and fall."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["ALTERNATING", "ALTERNATING_WORDS", "LONG", "LONG_WORDS"]

LONG: Final[dict[str, Any]] = {
    "bank": "large",
    "checkpoints": (1, 2, 10, 1000, 3000),
    # A cycle of 20 gradients would be rounded alike in each round. These factors make a round of 1540 steps of it.
    "steps": [
        {"first": 1, "every": 7, "gradient_factor": 2.0},
        {"first": 4, "every": 11, "gradient_factor": 0.5},
    ],
    "tolerance": {"relative": 5e-6},
    "states": False,
}
"""Fields of a case of 3,000 steps from parameters near 100. States are those of other cases."""

LONG_WORDS: Final = "every 7th gradient twice, from the first on, every 11th half, from the fourth on"

ALTERNATING: Final[list[dict[str, Any]]] = [{"first": 1, "every": 2, "gradient_factor": 2.0**20}]
"""Special steps: of two gradients the first is 2^20 times as large."""

ALTERNATING_WORDS: Final = "every other gradient, from the first on, times 2^20"
