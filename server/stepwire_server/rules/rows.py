"""The meanings of a step for the rows of a table, by name.

A step has gradients of some rows: they came. The other rows slept. T counts the steps that had a gradient of the table,
and t_r those of them that had one of row r. k_r counts the steps that row r slept since it last came, or since the
first.

    torch_sparse   rows that came: the rule with t = T; Adam as below
                   rows that slept: parameters and moments stay, nothing decays
    row_counter    rows that came: the rule with t = t_r
                   rows that slept: parameters and moments stay, nothing decays
    skipped        rows that came: m ← β^k_r·m for each moment m and its β, then the rule with t = T
                   rows that slept: parameters stay; moments are decayed when the row comes
    global         all rows: the rule with t = T, and a gradient of 0 for rows that slept
                   so parameters move by old moments, and moments and weights decay in every step
    row_wise       rows that came: Adagrad with t = T and one sum for the row, as below
                   rows that slept: parameters and sums stay

Adam of `torch_sparse` is that of torch's SparseAdam, with c1 = 1 − β1ᵀ and c2 = 1 − β2ᵀ:

    m ← m + (1 − β1)·(g − m)
    v ← v + (1 − β2)·(g² − v)
    p ← p − (lr·√c2 / c1)·m / (√v + eps)

Adagrad of `row_wise` has a number s for a row of n elements in the place of n of them. s starts as the initial
accumulator value:

    s ← s + (g_1² + … + g_n²) / n
    p ← p − lr / (1 + (T − 1)·η) / (√s + eps)·g

The mean and the step size of a row are computed in float64, and s and the step size are rounded to float32.

The other meanings have the rule of the session. The β of `skipped` is β1 for m and β2 for v of Adam, and μ for the
buffer of SGD. Adagrad's sum and AMSGrad's maximum do not decay in a dense step with zeros either. β is that of the step
in which the row comes.

So the moments of `skipped` are those of `global` up to rounding, as long as a row sleeps; and where every row comes in
every step, `skipped`, `row_counter` and `global` are one.

Weight decay has no meaning for rows that slept, nor has dampening, whose first buffer is special. They are refused but
for `global`.

Sources: the code of torch 2.13, SparseAdam, SGD and Adagrad; of `row_wise` TorchRec's RowWiseAdagrad, FBGEMM's
EXACT_ROWWISE_ADAGRAD, and Mudigere et al. 2022, "Software-hardware co-design for fast and scalable training of deep
learning recommendation models".
"""

from __future__ import annotations

import enum
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from numpy import sqrt

from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire_server.rules.adam import sparse_scalars
from stepwire_server.rules.adaptive import ADAGRAD
from stepwire_server.rules.moments import first_moment
from stepwire_server.rules.momentum import SGD, SGD_MOMENTUM, sgd
from stepwire_server.rules.rule import Rule, Value

__all__ = [
    "ADAGRAD_ROW_WISE",
    "ADAM_SPARSE",
    "RowSemantics",
    "adam_sparse",
    "faded_slots",
    "row_obstacle",
    "row_rule",
    "row_wise_step_sizes",
    "row_wise_sums",
]


class RowSemantics(enum.Enum):
    """The meaning of a step for rows; see the module."""

    TORCH_SPARSE = "torch_sparse"
    ROW_COUNTER = "row_counter"
    SKIPPED = "skipped"
    GLOBAL = "global"
    ROW_WISE = "row_wise"

    @property
    def counts_rows(self) -> bool:
        """A number is kept for each row: t_r, the T of the step in which the row last came, or the row's sum."""
        return self in (RowSemantics.ROW_COUNTER, RowSemantics.SKIPPED, RowSemantics.ROW_WISE)


def adam_sparse(
    p: Value, g: Value, m: Value, v: Value, rate1: Value, rate2: Value, step_size: Value, eps: Value
) -> tuple[Value, Value, Value]:
    """Update as torch's SparseAdam; step_size = lr·√c2 / c1. See the module."""
    m = first_moment(m, g, rate1)
    v = first_moment(v, g * g, rate2)
    return p - step_size * (m / (sqrt(v) + eps)), m, v


ADAM_SPARSE: Final = Rule(
    "adam_sparse",
    adam_sparse,
    ("exp_avg", "exp_avg_sq"),
    sparse_scalars,
    means=(("exp_avg", "beta1"),),
)


def row_wise_sums(sums: npt.NDArray[np.float32], gradients: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the sums of rows of `row_wise` after a step, `(n,) float32`.

    Args:
        sums: the sums before, `(n,) float32`.
        gradients: the gradients of the rows, `(n, width) float32`, contiguous.
    """
    squares = np.square(gradients, dtype=np.float64)
    means = np.add.reduce(squares, axis=1) / gradients.shape[1]
    after: npt.NDArray[np.float32] = (sums + means).astype(np.float32)
    return after


def row_wise_step_sizes(hyper: Hyperparameters, t: int, sums: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the step sizes of rows of `row_wise`, `(n,) float64`, for their sums after the step."""
    root = sqrt(sums.astype(np.float64))
    sizes: npt.NDArray[np.float64] = _rate(hyper, t)[0] / (root + float(cast(float, hyper.eps)))
    return sizes


def _rate(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return ADAGRAD.scalars(hyper, t)[:1]


ADAGRAD_ROW_WISE: Final = Rule("adagrad_row_wise", sgd, (), _rate)
"""The element's part of `row_wise`; its only scalar is the step size of the row, the rate divided by √s + eps."""

_WEIGHTS: Final = {"exp_avg": "beta1", "exp_avg_sq": "beta2", "momentum_buffer": "momentum"}
_SERVED: Final = ("adam", "sgd", "adagrad")


def row_rule(optimizer: Optimizer, semantics: RowSemantics, rule: Rule) -> Rule:
    """Return the rule that steps the rows which came, for a session and a group with a given dense one."""
    if semantics is RowSemantics.ROW_WISE:
        return ADAGRAD_ROW_WISE
    return ADAM_SPARSE if semantics is RowSemantics.TORCH_SPARSE and optimizer.rule == "adam" else rule


def faded_slots(semantics: RowSemantics, rule: Rule) -> dict[str, str]:
    """Return the slots that sleep decays when a row comes, each with the name of the number that weighs its past."""
    if semantics is not RowSemantics.SKIPPED:
        return {}
    return {slot: _WEIGHTS[slot] for slot in rule.slots if slot in _WEIGHTS}


def row_obstacle(optimizer: Optimizer, semantics: RowSemantics, hyper: Hyperparameters, rule: Rule) -> str | None:
    """Return what keeps a group's tables from being stepped with a meaning; None for nothing."""
    name, structure = semantics.value, optimizer.structure()
    if optimizer.rule not in _SERVED:
        return f"tables are stepped by {', '.join(_SERVED)}, and not by {optimizer.rule!r}"
    if semantics is RowSemantics.ROW_WISE and optimizer.rule != "adagrad":
        return f"one sum a row is Adagrad's, and the rule is {optimizer.rule!r}; use Adagrad, or another name"
    if semantics is RowSemantics.GLOBAL:
        return None
    if hyper.weight_decay:
        return f"weight decay {hyper.weight_decay!r} has no meaning for rows that sleep; use 0 in the groups of tables"
    if hyper.dampening and rule is not SGD:
        return f"dampening {hyper.dampening!r} has no meaning for rows that sleep; use 0 in the groups of tables"
    if structure.nesterov and rule is not SGD:
        return f"Nesterov's momentum is not served with {name!r}; leave it out"
    if semantics is not RowSemantics.TORCH_SPARSE:
        return None
    if rule is SGD_MOMENTUM:
        return "torch moves every row that ever came by its momentum, which is 'global'; use that, or no momentum"
    if optimizer.rule == "adam" and not (structure.formula in ("torch", "keras") and structure.amsgrad == "none"):
        return "SparseAdam has no AMSGrad and no other form than its own; use Adam's formula 'torch', or another name"
    return None
