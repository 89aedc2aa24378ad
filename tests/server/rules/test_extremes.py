"""Finite gradients never end in NaN where the framework's own float32 stays finite, however large or small."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import (
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_optax = pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="optax is not installed")

SIZES = [0.0, 1e-45, 1e-38, 1e-22, 1e-8, 1.0, 1e10, 1.8e19, 1.9e20, 6e20, 1e25, 1e30, 1e38, 3e38]
PARAMETERS = [0.0, 1e-45, 1.0, 1e19, 3e38]
PATTERNS = [[1] * 8, [1, -1] * 4, [1, *[0] * 7], [1, 1, 1, 1, 1, -1, -1, -1]]
CASES = list(itertools.product(SIZES, PARAMETERS, PATTERNS))
START = np.array([parameter for _, parameter, _ in CASES], np.float32)
with np.errstate(under="ignore"):
    GRADIENTS = np.array([[size * sign for sign in signs] for size, _, signs in CASES], np.float32).T

BETAS: list[dict[str, Any]] = [{}, {"betas": (0.0, 0.999)}, {"betas": (0.0, 0.0)}, {"weight_decay": 0.1}]
OF_TORCH: list[tuple[type[Optimizer], dict[str, Any]]] = [
    *[
        (kind, options | {"lr": lr})
        for kind in (Adam, AdamW, NAdam, RAdam, Adamax)
        for options in BETAS
        for lr in (1e-3, 1.0)
    ],
    *[(kind, {"decoupled_weight_decay": True, "weight_decay": 0.1}) for kind in (NAdam, RAdam)],
    *[(Adam, {"eps": eps}) for eps in (1e-45, 1e-44, 0.0)],
    *[(Adam, {"amsgrad": True}), (SGD, {}), (SGD, {"momentum": 0.9, "dampening": 0.5}), (Adagrad, {}), (Adadelta, {})],
    *[
        (RMSprop, {"centered": centered, "momentum": momentum, "alpha": alpha})
        for centered in (False, True)
        for momentum in (0.0, 0.9)
        for alpha in (0.99, 0.0)
    ],
]


def case_id(value: Any) -> str:
    return (
        value.__name__ if isinstance(value, type) else ",".join(f"{name}={value[name]}" for name in value) or "default"
    )


def check(optimizer: Optimizer, theirs: list[np.ndarray], run: Any) -> None:
    with np.errstate(all="ignore"):
        states = run(optimizer, START, GRADIENTS)
    for step, (state, wanted) in enumerate(zip(states, theirs, strict=True), start=1):
        wrong = np.isfinite(wanted) & ~np.isfinite(state["param"])
        assert not wrong.any(), f"step {step}: {[CASES[at] for at in np.flatnonzero(wrong)[:3]]}"


@needs_torch
@pytest.mark.parametrize(("kind", "options"), OF_TORCH, ids=case_id)
def test_where_torch_is_finite(kind: type[Optimizer], options: dict[str, Any], run: Any) -> None:
    import torch

    parameter = torch.nn.Parameter(torch.tensor(START))
    optimizer, theirs = getattr(torch.optim, kind.__name__)([parameter], foreach=False, **options), []
    for gradient in GRADIENTS:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        theirs.append(parameter.detach().numpy().copy())
    check(kind(**options), theirs, run)


@needs_optax
@pytest.mark.parametrize(
    ("optimizer", "name", "options"),
    [
        (Adam(formula="optax"), "adam", {}),
        (Adam(formula="optax", betas=(0.0, 0.99)), "adam", {"b1": 0.0, "b2": 0.99}),
        (Adam(formula="optax", amsgrad="corrected"), "amsgrad", {}),
        (Adam(formula="optax", nesterov=True), "nadam", {}),
        (AdamW(formula="optax", weight_decay=0.1), "adamw", {"weight_decay": 0.1}),
        (Lion(lr=1e-3, weight_decay=0.1), "lion", {"weight_decay": 0.1}),
    ],
    ids=str,
)
def test_where_optax_is_finite(optimizer: Optimizer, name: str, options: dict[str, Any], run: Any) -> None:
    import jax
    import optax

    transformation = getattr(optax, name)(1e-3, **options)

    def step(carry: Any, gradient: Any) -> Any:
        parameters, state = carry
        updates, state = transformation.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        return (parameters, state), parameters

    start = jax.numpy.asarray(START)
    _, theirs = jax.jit(lambda: jax.lax.scan(step, (start, transformation.init(start)), GRADIENTS))()
    check(optimizer, list(np.asarray(theirs)), run)


@pytest.mark.parametrize("optimizer", [LARS(lr=0.1), LARS(lr=0.1, nesterov=True), LAMB(), LAMB(eps=1.0)], ids=str)
@pytest.mark.parametrize("size", [1e-45, 3e-43, 1e-41, 1e-38, 1e-20, 1e10, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("parameter", [1.0, 1e3, 1e19])
def test_an_update_by_a_trust_ratio_beyond_float32_is_within(
    optimizer: Optimizer, size: float, parameter: float, run: Any
) -> None:
    """The update is lr·η·‖p‖ in the direction u, whatever the size of u; near the ends of float32 u has few bits."""
    start, gradient = np.full(64, parameter, np.float32), np.full(64, size, np.float32)
    numbers, ahead = optimizer.hyperparameters(), 1.9 if optimizer.structure().nesterov else 1.0
    with np.errstate(all="ignore"):
        first, second = run(optimizer, start, [gradient, gradient])
    assert np.isfinite(second["param"]).all()
    step = numbers.lr * (numbers.trust_coefficient or 0.0) * parameter * ahead
    if optimizer.rule == "lamb" and not 1e-44 < size < 1e20:  # m is lost, or v infinite, and so u is 0
        step = 0.0
    moved = float(start[0]) - float(first["param"][0])
    assert moved == pytest.approx(step, rel=0.05, abs=1e-7 * parameter)
