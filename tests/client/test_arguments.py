"""Arguments of a wrong kind: each is refused by its name, nothing is sent, and the session stays as it was."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest

import stepwire

WEIGHTS = {"w": np.zeros(5, np.float32)}
GRADIENT = {"w": np.ones(5, np.float32)}
WRONG: list[Any] = ["wrong", 3, ["wrong"], {"wrong": 1}, object(), stepwire.Adam]
NO_PATH: Any = 3
CREATED = {
    "optimizer": WRONG,
    "aggregation": WRONG,
    "loss_scaling": WRONG,
    "schedule": WRONG,
    "groups": WRONG,
    "tables": WRONG,
    "frozen": [*WRONG, None],
    "tensor_precision": WRONG,
    "durability": WRONG,
    "logger": WRONG[:4],
    "state_precision": WRONG,
    "telemetry": WRONG,
    "non_finite": WRONG,
    "gradient_dtype": WRONG,
}
STEPPED = {
    "hyperparameters": [*WRONG, [3]],
    "reply": WRONG,
    "reply_first": WRONG,
    "on_tensor": WRONG[:5],
    "overlap": WRONG,
    "lr": WRONG[:1] + WRONG[2:],
    "loss_scale": WRONG[:1] + WRONG[2:],
    "weight": WRONG[:1] + WRONG[2:],
    "out": WRONG,
}
CONNECTED = {"tls": [*WRONG, stepwire.TLS(ca=NO_PATH)], "token": WRONG[1:], "transport": WRONG, "channels": WRONG[:1]}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{place}")
        for field, values in table.items()
        for place, value in enumerate(values)
    ]


def named(error: stepwire.InvalidRequestError, field: str) -> bool:
    return error.metadata["field"].partition(".")[0].partition("[")[0] == field


@pytest.mark.parametrize(("field", "value"), cases(CREATED))
def test_a_creation_names_it(client: stepwire.Client, field: str, value: Any) -> None:
    options: dict[str, Any] = {"request_id": "wrong-kind", field: value}
    with pytest.raises(stepwire.InvalidRequestError) as refused:
        client.create_session(WEIGHTS, **options)
    assert named(refused.value, field)
    assert "wrong-kind" not in {each.label for each in client.sessions()}


@pytest.mark.parametrize(("field", "value"), cases(STEPPED))
def test_a_step_names_it_and_is_not_applied(client: stepwire.Client, field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with client.create_session(WEIGHTS) as session:
        with pytest.raises(stepwire.InvalidRequestError) as refused:
            session.step(GRADIENT, **options)
        assert named(refused.value, "hyperparameters" if field == "lr" else field)
        assert session.info().applied_step == 0
        parameters: Any = session.step(GRADIENT)
        assert np.all(parameters["w"] != 0.0)


@pytest.mark.parametrize(("field", "value"), cases(CONNECTED))
def test_a_connection_names_it(target: str, field: str, value: Any) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(stepwire.InvalidRequestError) as refused:
        stepwire.connect(target, **options)
    assert named(refused.value, field)


def test_a_token_of_a_wrong_kind_is_not_told(target: str) -> None:
    secret: Any = b"secret"
    with pytest.raises(stepwire.InvalidRequestError, match="of the class bytes") as refused:
        stepwire.connect(target, token=secret)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("value", WRONG)
def test_a_load_of_what_is_no_snapshot_is_refused(client: stepwire.Client, value: Any) -> None:
    with client.create_session(WEIGHTS) as session:
        with pytest.raises(stepwire.InvalidRequestError, match=r"give what Session.state\(\) returns"):
            session.load_state(value)
        assert session.info().applied_step == 0


@pytest.mark.parametrize("value", [3, None, {"a": 1}, [1]])
def test_a_move_of_what_is_no_id_is_refused(target: str, value: Any) -> None:
    with pytest.raises(stepwire.StepwireError):
        stepwire.move_session(value, target, target, timeout=60.0)


@pytest.mark.parametrize(("workers", "index"), [(None, 1), (2, 2), (2, -1)])
def test_a_worker_that_the_session_has_not_is_refused(client: stepwire.Client, workers: int | None, index: int) -> None:
    aggregation = None if workers is None else stepwire.Aggregation(workers=workers)
    with pytest.raises(stepwire.InvalidRequestError, match=f"and {index} is none of them"):
        client.create_session(WEIGHTS, aggregation=aggregation, worker=index)


@pytest.mark.parametrize("kind", [tuple, collections.UserList, collections.deque])
def test_any_sequence_of_groups_and_numbers_will_do(client: stepwire.Client, kind: Any) -> None:
    with client.create_session(WEIGHTS, groups=kind([{"params": ["w"], "lr": 0.5}])) as session:
        session.step(GRADIENT, hyperparameters=kind([{"lr": 0.25}]))
        assert session.history()[-1].learning_rates == (0.25,)


def test_a_worker_below_none_is_refused_of_a_session_that_exists(client: stepwire.Client) -> None:
    with client.create_session(WEIGHTS) as session, pytest.raises(stepwire.InvalidRequestError, match=r"-1 is not in"):
        client.session(session.own_id, worker=-1)
