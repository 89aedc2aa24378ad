"""LAMB and LARS."""

from __future__ import annotations

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.optimizers import LAMB, LARS, Hyperparameters


def test_defaults_are_optaxs() -> None:
    assert LAMB().hyperparameters() == Hyperparameters(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, eps_root=0.0, weight_decay=0.0, trust_coefficient=1.0
    )
    assert LARS().hyperparameters() == Hyperparameters(
        lr=1.0, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=0.0
    )
    assert {LAMB().structure().formula, LARS().structure().formula} == {"optax"}


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_trust_is_positive(kind: type[LAMB] | type[LARS]) -> None:
    with pytest.raises(InvalidRequestError, match=r"trust_coefficient is 0\.0; it must be finite and > 0"):
        kind(trust_coefficient=0.0)
    assert kind(trust_coefficient=1e-300).hyperparameters().trust_coefficient == 1e-300


def test_nesterov_is_larss_choice() -> None:
    assert LARS(nesterov=True).structure().nesterov
    assert not LARS().structure().nesterov
