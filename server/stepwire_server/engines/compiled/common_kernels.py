"""The kernels that most sessions need, so that they can be compiled ahead."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from stepwire.optimizers import AdamW
from stepwire_server.rules import Decay, Recipe, rule_for

__all__ = ["Asked", "commonest"]


class Asked(NamedTuple):
    """The arguments of `Engine.prepare`."""

    recipe: Recipe
    gradient: np.dtype[Any]
    reply: np.dtype[Any] | None


def commonest(*, shared: bool = False) -> list[Asked]:
    """Return Adam as most sessions ask for it, with and without weight decay, in float32 and in bfloat16.

    Args:
        shared: include sessions whose parameters lie in memory shared on the host, which need no reply.
    """
    rule, decay = rule_for(AdamW(), momentum=False)
    dtypes = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
    recipes = [Recipe(rule, each, measures=True) for each in (Decay.NONE, decay)]
    asked = [Asked(recipe, dtype, dtype) for recipe in recipes for dtype in dtypes]
    return asked + [Asked(recipe, dtypes[0], None) for recipe in recipes if shared]
