"""The formulas against torch itself, in float64, where only a different formula could differ visibly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepwire.optimizers import Adam
from stepwire_server.rules import rule_for

torch = pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")

SIZE, STEPS = 19, 40


@pytest.mark.parametrize(
    ("decoupled", "decay", "amsgrad", "maximize"),
    list(itertools.product([False, True], [0.0, 0.1], [False, True], [False, True])),
)
def test_update_is_that_of_torch(decoupled: bool, decay: float, amsgrad: bool, maximize: bool) -> None:
    optimizer = Adam(
        lr=0.02,
        betas=(0.8, 0.95),
        eps=1e-4,
        weight_decay=decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=decoupled,
    )
    random = np.random.default_rng(3)
    start, grads = random.standard_normal(SIZE), random.standard_normal((STEPS, SIZE))
    grads[STEPS // 2 :] /= 20.0

    theirs = torch.nn.Parameter(torch.tensor(start))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs_optimizer = kind(
        [theirs], lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=decay, amsgrad=amsgrad, maximize=maximize
    )
    hyper = optimizer.hyperparameters()
    rule = rule_for(optimizer, hyper)
    state = (start, *(np.zeros(SIZE) for _ in rule.slots))
    for t, grad in enumerate(grads, start=1):
        theirs.grad = torch.tensor(grad)
        theirs_optimizer.step()
        state = rule.update(state[0], grad, *state[1:], *rule.scalars(hyper, t))
        np.testing.assert_allclose(state[0], theirs.detach().numpy(), rtol=1e-12, atol=1e-14)
    for slot, value in zip(rule.slots, state[1:], strict=True):
        np.testing.assert_allclose(value, theirs_optimizer.state[theirs][slot].numpy(), rtol=1e-12, atol=1e-15)
