"""The formulas against torch itself, in float64, where only a different formula could differ visibly."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire.optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

torch = pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")

STEPS = 40
TRUE_FALSE = [False, True]


@pytest.fixture(autouse=True)
def double_precision():
    """NAdam keeps its product in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def options(**choices: list[Any]) -> list[dict[str, Any]]:
    """Return every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


BETAS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4}
COMMON = {"weight_decay": [0.0, 0.1], "maximize": TRUE_FALSE}
CASES = [
    *[(Adam, BETAS | more) for more in options(**COMMON, amsgrad=TRUE_FALSE)],
    *[(AdamW, BETAS | more) for more in options(**COMMON, amsgrad=TRUE_FALSE)],
    *[
        (NAdam, BETAS | more)
        for more in options(**COMMON, decoupled_weight_decay=TRUE_FALSE, momentum_decay=[0.0, 0.1])
    ],
    *[(RAdam, BETAS | more) for more in options(**COMMON, decoupled_weight_decay=TRUE_FALSE)],
    *[(RAdam, BETAS | {"betas": (0.8, 0.5)} | more) for more in options(**COMMON)],
    *[(Adamax, BETAS | more) for more in options(**COMMON)],
    *[(SGD, {"lr": 0.02} | more) for more in options(**COMMON)],
    *[(SGD, {"lr": 0.02, "momentum": 0.9} | more) for more in options(**COMMON, dampening=[0.0, 0.3, 1.0])],
    *[(SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True} | more) for more in options(**COMMON)],
    *[
        (RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-4} | more)
        for more in options(**COMMON, momentum=[0.0, 0.9], centered=TRUE_FALSE)
    ],
    *[
        (Adagrad, {"lr": 0.02, "eps": 1e-4} | more)
        for more in options(**COMMON, lr_decay=[0.0, 0.1], initial_accumulator_value=[0.0, 0.5])
    ],
    *[(Adadelta, {"lr": 0.5, "eps": 1e-4} | more) for more in options(**COMMON, rho=[0.0, 0.9])],
    *[(kind, {}) for kind in (Adam, AdamW, NAdam, RAdam, Adamax, SGD, RMSprop, Adagrad, Adadelta)],
]


def case_id(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(f"{name}={value[name]}" for name in value)


@pytest.mark.parametrize(("kind", "chosen"), CASES, ids=case_id)
def test_update_is_that_of_torch(kind: type[Optimizer], chosen: dict[str, Any], run, gradients) -> None:
    start, grads = np.random.default_rng(3).standard_normal(23), gradients(STEPS)
    theirs = torch.nn.Parameter(torch.tensor(start))
    their_optimizer = getattr(torch.optim, kind.__name__)([theirs], foreach=False, **chosen)
    for state, grad in zip(run(kind(**chosen), start, grads), grads, strict=True):
        theirs.grad = torch.tensor(grad)
        their_optimizer.step()
        np.testing.assert_allclose(state["param"], theirs.detach().numpy(), rtol=1e-12, atol=1e-14)
    for slot in state.keys() - {"param"}:
        value = their_optimizer.state[theirs][slot].numpy()
        np.testing.assert_allclose(state[slot], value, rtol=1e-12, atol=1e-15, err_msg=slot)
