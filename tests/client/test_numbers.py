"""Numbers as people have them: scalars and 0-d arrays of any library are numbers everywhere, or refused in words."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire.links.server import RemoteServer

pytestmark = pytest.mark.many

ONE = {"w": np.ones(3, np.float32)}


class Scalar:
    """A scalar of a library that is not here, such as a tensor of torch's."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __float__(self) -> float:
        return self._value


def created(client: stepwire.Client, **options: Any) -> Any:
    with client.create_session(ONE, **options) as session:
        return session.step(ONE)["w"][0]  # type: ignore[call-overload]


def stepped(client: stepwire.Client, **options: Any) -> Any:
    with client.create_session(ONE) as session:
        return session.step(ONE, **options)["w"][0]  # type: ignore[call-overload]


class Asked(Exception):
    """A session was asked for."""


def leased(client: stepwire.Client, value: Any) -> Any:
    """Return the lease that is asked for: a session of a quarter of a second might end before its load."""
    leases = []

    def create(server: RemoteServer, config: Any, *arguments: Any, **options: Any) -> Any:
        leases.append(config.lease.seconds + config.lease.nanos / 1e9)
        raise Asked

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RemoteServer, "create", create)
        with pytest.raises(Asked):
            client.create_session(ONE, lease_seconds=value)
    return leases[0]


PLACES: dict[str, Callable[[stepwire.Client, Any], Any]] = {
    "lr": lambda client, value: created(client, optimizer=stepwire.Adam(lr=value)),
    "betas": lambda client, value: created(client, optimizer=stepwire.Adam(betas=(value, value))),
    "initial accumulator": lambda client, value: created(
        client, optimizer=stepwire.Adagrad(lr=0.5, initial_accumulator_value=value)
    ),
    "a group": lambda client, value: created(client, groups=[{"params": ["w"], "lr": value}]),
    "a group's clipping": lambda client, value: created(client, groups=[{"params": ["w"], "clip_grad_norm": value}]),
    "clip_grad_norm": lambda client, value: created(
        client, optimizer=stepwire.SGD(lr=1.0), clip_grad_norm=value, clip_formula="optax"
    ),
    "clip_grad_value": lambda client, value: created(client, optimizer=stepwire.SGD(lr=1.0), clip_grad_value=value),
    "loss_scaling": lambda client, value: created(
        client, loss_scaling=stepwire.LossScaling(initial_scale=value, backoff_factor=value)
    ),
    "parameter_average_decay": lambda client, value: created(client, parameter_average_decay=value),
    "a schedule": lambda client, value: created(
        client, schedule=stepwire.Schedule.linear(10, final_factor=value, warmup_steps=2, warmup_start_factor=value)
    ),
    "lr of a step": lambda client, value: stepped(client, lr=value),
    "hyperparameters of a step": lambda client, value: stepped(client, hyperparameters={"eps": value}),
    "loss_scale": lambda client, value: stepped(client, loss_scale=value),
    "lease_seconds": leased,
}
NUMBERS: dict[str, Any] = {
    "float64": np.float64(0.25),
    "float16": np.float16(0.25),
    "bfloat16": ml_dtypes.bfloat16(0.25),
    "0-d": np.array(0.25),
    "0-d float32": np.array(0.25, np.float32),
    "0-d bfloat16": np.array(0.25, ml_dtypes.bfloat16),
    "Decimal": decimal.Decimal("0.25"),
    "Fraction": fractions.Fraction(1, 4),
    "another library's": Scalar(0.25),
}
NO_NUMBERS: dict[str, Any] = {
    "text": "0.25",
    "bytes": b"0.25",
    "bool": True,
    "a list": [0.25],
    "1-d": np.array([0.25, 0.25]),
    "complex": 0.25j,
    "huge": 10**400,
    "nan": float("nan"),
    "an object": object(),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_scalar_is_the_number(client: stepwire.Client, place: str) -> None:
    want = PLACES[place](client, 0.25)
    for name, value in NUMBERS.items():
        assert PLACES[place](client, value) == want, name


@pytest.mark.parametrize("place", PLACES)
def test_everything_else_is_refused_before_it_is_sent(client: stepwire.Client, place: str) -> None:
    for name, value in NO_NUMBERS.items():
        with pytest.raises(InvalidRequestError) as refused:
            PLACES[place](client, value)
        assert len(str(refused.value)) < 300, name


def test_a_record_has_numbers_of_pythons_own() -> None:
    adam = stepwire.AdamW(lr=np.array(0.25), betas=[np.float32(0.5), np.array(0.75)], eps=Scalar(0.5))  # type: ignore[arg-type]
    assert adam == stepwire.AdamW(lr=0.25, betas=(0.5, 0.75), eps=0.5)
    assert {type(value) for value in (adam.lr, *adam.betas, adam.eps)} == {float}
    assert dataclasses.replace(adam, lr=np.array(1)).lr == 1.0  # type: ignore[arg-type]


COUNTS: dict[str, Callable[[stepwire.Client, Any], Any]] = {
    "accumulation_steps": lambda client, value: created(client, accumulation_steps=value),
    "channels": lambda client, value: stepwire.connect("localhost:1", channels=value).close(),
    "growth_interval": lambda client, value: created(client, loss_scaling=stepwire.LossScaling(growth_interval=value)),
    "steps_in_flight": lambda client, value: client.create_session(ONE).step_async(ONE, steps_in_flight=value).result(),
}


@pytest.mark.parametrize("place", COUNTS)
def test_counts_are_whole_numbers_of_any_kind(client: stepwire.Client, place: str) -> None:
    for value in (2, np.int64(2), np.uint8(2), np.array(2)):
        COUNTS[place](client, value)
    for wrong in (2.0, "2", True, 0, -1, np.float32(2)):
        with pytest.raises(InvalidRequestError, match="is not a|positive|integer"):
            COUNTS[place](client, wrong)
