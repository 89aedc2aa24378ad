"""The kernels of a session's steps, compiled before anybody waits for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwire.optimizers import Hyperparameters
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines.protocol import Engine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.rules import Precision, RowSemantics
from stepwire_server.steps.summed_rows import prepare_sums

__all__ = ["compile_kernels"]


def compile_kernels(
    engine: Engine,
    config: SessionConfig,
    groups: tuple[Hyperparameters, ...],
    gradient: np.dtype[Any],
    reply: np.dtype[Any] | None,
    rows: bool,
) -> None:
    """Compile what a step needs; kernels that are there already cost next to nothing.

    Args:
        engine: the engine.
        config: the session's config.
        groups: the numbers of each group, in the step.
        gradient: the encoding of the gradient.
        reply: the encoding of the reply; None without one.
        rows: rows of tables go back too.

    Raises:
        ResourceExhaustedError: there is no room for one more kernel.
    """
    for hyper, precisions in zip(groups, config.held_precisions, strict=True):
        recipe = config.recipe(hyper)
        for precision in precisions if recipe.rule.slots else (Precision.FLOAT32,):
            engine.prepare(recipe.held(precision), gradient, reply)
    if config.tables:
        prepare_sums()
    for index, semantics in config.tables.items():
        recipe = config.row_recipe(groups[config.layout.tensors[index].spec.group], semantics)
        if semantics is RowSemantics.GLOBAL:
            engine.prepare(recipe.in_float32, FLOAT32, None)
        else:
            engine.prepare_table(recipe, reply if rows else None)
