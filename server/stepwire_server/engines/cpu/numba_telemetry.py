"""The text of telemetry's sums of squares in generated kernels: float32 in the loop, float64 where that is too narrow.

A block's sum in float32 costs next to nothing beside the pass; float64 cost a noticeable part of it. The sum counts
within `TRUSTED_SUMS`. Another block is squared once more in float64, while it is in the cache. That needs the
parameters before the update, which the loop overwrites. So a block that may need them keeps a copy: one before which
the pass has found next to nothing, or very much. As a rule that is the first block of a pass alone, because squares
that are lost do not show beside a larger sum.

One case is left: a block without a copy whose parameters jump by more than 2⁵⁸, where no block before it moved so far.
Their new values stand for the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stepwire_server.engines.measured_sums import TRUSTED_SUMS
from stepwire_server.rules import Recipe

__all__ = ["keep_block", "kept_arrays", "sums_of_element", "totals_of_block"]

# A sum beside which what is lost below the bound does not show, however many blocks there are, and one after which the
# next block may be beyond the other bound.
_ENOUGH: Final = 2.0**20 * TRUSTED_SUMS[0]
_MUCH: Final = 2.0**-27 * TRUSTED_SUMS[1]
# 4,096 squares of it are within the bounds.
_SAFE_LIMIT: Final = 2.0**57

_KEEP: Final = """keeps = not ({usual})
        if keeps:
            for i in range(high - low):
                {copies}"""

_TOTALS: Final = """{usual}
        if {all_usual}:
            {quick}
        else:
            {zeros}
            for i in range(high - low):
                {exact}
            {chosen}"""


def kept_arrays(recipe: Recipe, count: int) -> list[str]:
    """Write the statements that make room for the copies of a block."""
    return [f"{name}_kept = empty({count}, float32)" for name in _kept(recipe)]


def keep_block(recipe: Recipe) -> list[str]:
    """Write the statements before the loop over a block, which stands in the loop over blocks."""
    if not recipe.measures:
        return []
    moved = [k for k, total in enumerate(recipe.sums) if total != "param"]
    conditions = [f"{_ENOUGH!r} <= sums[{k}] <= {_MUCH!r}" for k in moved]
    if recipe.limits and recipe.accumulates:  # a gradient that is clipped to less needs no copy of the sum
        conditions.append(f"limit <= {_SAFE_LIMIT!r}")
    usual = " and ".join(conditions)
    copies = [f"{name}_kept[i] = {name}_now[i]" for name in _kept(recipe)]
    return [_KEEP.format(usual=usual, copies=_lines(copies, 16))]


def sums_of_element(recipe: Recipe) -> list[str]:
    """Write the statements at the end of the loop over a block: squares of what the element's variables hold."""
    values = {"update": "(p - before)", "param": "p", "gradient": "treated"}
    return [f"sum_{total} += {values[total]} * {values[total]}" for total in recipe.sums]


def totals_of_block(recipe: Recipe, treated: Sequence[str]) -> list[str]:
    """Write the statements after the loop over a block.

    Args:
        recipe: the arithmetic.
        treated: the statements that make `g` element i of the clipped gradient again, from `accumulated`.
    """
    if not recipe.measures:
        return []
    low, high = (f"float32({bound!r})" for bound in TRUSTED_SUMS)
    accumulated = [f"accumulated = {_before('accumulated')}"] if recipe.accumulates else []
    values = {
        "update": [f"update = p_now[i] - {_before('p')}"],
        "param": ["param = p_now[i]"],
        "gradient": [*accumulated, *treated, "gradient_again = g"],
    }
    usual, exact = [], []
    for total in recipe.sums:
        small = "" if total == "param" else f" or (not keeps and sum_{total} < {low})"
        usual.append(f"usual_{total} = {low} <= sum_{total} <= {high}{small}")
        value = values[total][-1].partition(" = ")[0]
        exact += [*values[total], f"exact_{total} += float64({value}) * float64({value})"]
    quick = [f"sums[{k}] += float64(sum_{total})" for k, total in enumerate(recipe.sums)]
    chosen = [
        f"sums[{k}] += float64(sum_{total}) if usual_{total} else exact_{total}" for k, total in enumerate(recipe.sums)
    ]
    return [
        _TOTALS.format(
            usual=_lines(usual, 8),
            all_usual=" and ".join(f"usual_{total}" for total in recipe.sums),
            quick=_lines(quick, 12),
            zeros=_lines([f"exact_{total} = 0.0" for total in recipe.sums], 12),
            exact=_lines(exact, 16),
            chosen=_lines(chosen, 12),
        )
    ]


def _kept(recipe: Recipe) -> list[str]:
    if not recipe.measures:
        return []
    return ["p", "accumulated"] if recipe.limits and recipe.accumulates else ["p"]


def _before(name: str) -> str:
    return f"({name}_kept[i] if keeps else float32(0.0))"


def _lines(lines: Sequence[str], indent: int) -> str:
    return ("\n" + " " * indent).join(lines)
