"""A client against a real server: sessions made, found, listed, and everything refused that is wrong."""

from __future__ import annotations

from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest

import stepwire
import stepwire_server.testing
from stepwire.links.remote import RemoteLink
from stepwire.optimizers import Formula
from stepwire.optimizers.gradient_treatment import LossScaling
from stepwire.optimizers.schedules import Schedule
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2
from stepwire.version import PROTOCOL_MAX, PROTOCOL_MIN

ONE = {"w": np.ones(3, np.float32)}


def test_a_server_tells_what_it_is(client: stepwire.Client) -> None:
    info = client.info()
    assert info.version == stepwire.__version__
    assert (info.protocol_min, info.protocol_max) == (PROTOCOL_MIN, PROTOCOL_MAX)
    assert list(info.devices) == ["cpu"]
    assert (info.max_chunk_bytes, info.draining) == (64 << 10, False)
    assert info.features == tuple(sorted(info.features))


def test_a_created_session_holds_the_parameters(client: stepwire.Client) -> None:
    parameters = {
        "w": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.array([1.5, -2.25], np.float16),
        "brain": np.array(3.0, ml_dtypes.bfloat16),
    }
    with client.create_session(parameters) as session:
        assert session.shapes == {"w": (3, 4), "half": (2,), "brain": ()}
        assert session.applied_step == 0
        pulled = session.pull()
    assert isinstance(pulled, dict)
    for name, value in parameters.items():
        assert pulled[name].dtype == np.float32
        assert pulled[name].tolist() == value.astype(np.float32).tolist()


def test_a_list_of_parameters_comes_back_as_a_list(client: stepwire.Client) -> None:
    with client.create_session([np.float32([1, 2]), np.float32(3)]) as session:
        pulled = session.pull()
    assert isinstance(pulled, list)
    assert [array.tolist() for array in pulled] == [[1.0, 2.0], 3.0]


def test_a_session_is_found_by_its_id(client: stepwire.Client) -> None:
    with client.create_session(ONE) as session:
        session.step(ONE)
        found = client.session(session.session_id)
        assert (found.applied_step, found.shapes) == (1, {"w": (3,)})
        assert found.pull()["w"].tobytes() == session.pull()["w"].tobytes()  # type: ignore[call-overload]


@pytest.mark.parametrize("session_id", ["", "0" * 32, "../../etc/passwd", "\n", "é" * 100])
def test_an_unknown_session_is_not_found(client: stepwire.Client, session_id: str) -> None:
    with pytest.raises(stepwire.SessionNotFoundError) as failed:
        client.session(session_id)
    assert failed.value.metadata == {"session_id": session_id[:64]}


def test_listing_crosses_pages_in_order_of_ids() -> None:
    """A page is 100; a server of the test's own, so that no other test's sessions are listed."""
    with stepwire_server.testing.serving() as target, stepwire.connect(target) as client:
        made = [client.create_session(ONE, label=f"run {number}").session_id for number in range(103)]
        listed = list(client.sessions())
    assert [info.session_id for info in listed] == sorted(made)
    assert {info.label for info in listed} == {f"run {number}" for number in range(103)}


def test_a_listed_session_tells_how_it_stands(client: stepwire.Client) -> None:
    with client.create_session(ONE, label="α run", lease_seconds=120.0) as session:
        session.step(ONE)
        (info,) = [info for info in client.sessions() if info.session_id == session.session_id]
        assert (info.label, info.applied_step, info.durable_step, info.device) == ("α run", 1, 0, "cpu")
        assert (info.ready, info.attached, info.memory_bytes) == (True, True, 3 * 3 * 4)
        assert 100.0 < (info.expire_time - info.create_time).total_seconds() < 150.0


def test_the_same_request_id_is_the_same_session(client: stepwire.Client) -> None:
    with client.create_session(ONE, request_id="job-7") as first:
        first.step(ONE)
        again = client.create_session({"w": np.zeros(3, np.float32)}, request_id="job-7")
        assert (again.session_id, again.applied_step) == (first.session_id, 1)
        assert again.pull()["w"].tobytes() == first.pull()["w"].tobytes()  # type: ignore[call-overload]


def test_of_two_creators_of_one_session_the_last_to_step_holds_it(client: stepwire.Client) -> None:
    """Perhaps another process; with one token between them, each would take the other's steps for its own."""
    with client.create_session(ONE, request_id="job-9") as first:
        second = client.create_session(ONE, request_id="job-9")
        first.step(ONE)
        second.step(ONE)
        assert second.applied_step == 2
        with pytest.raises(stepwire.FencedError):
            first.step(ONE)


def test_the_same_request_id_with_another_config_is_refused(client: stepwire.Client) -> None:
    with (
        client.create_session(ONE, request_id="job-8"),
        pytest.raises(stepwire.InvalidRequestError, match="'job-8' created another session before") as refused,
    ):
        client.create_session(ONE, optimizer=stepwire.Adam(lr=0.5), request_id="job-8")
    assert refused.value.metadata == {"field": "request_id"}


def test_a_session_lives_on_the_device_that_is_named(client: stepwire.Client) -> None:
    with client.create_session(ONE, device="cpu") as session:
        assert session.info().device == "cpu"
    with pytest.raises(
        stepwire.UnsupportedFeatureError, match="asks for 'cuda:9', and this server has cpu;"
    ) as refused:
        client.create_session(ONE, device="cuda:9")
    assert refused.value.metadata == {"field": "config.device", "feature": "device_cuda:9"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"non_finite": "ignore"}, "non_finite"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"clip_formula": "optax"}, "clip_formula"),
        ({"clip_grad_value": float("nan")}, "clip_grad_value"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"parameter_average_decay": 1.0}, "parameter_average_decay"),
        ({"missing_gradient": "zero"}, "missing_gradient"),
        ({"loss_scaling": LossScaling(growth_factor=1.0)}, "loss_scaling.growth_factor"),
        ({"loss_scaling": LossScaling(), "non_finite": "allow"}, "non_finite"),
        ({"state_precision": "float16"}, "state_precision"),
        ({"state_precision": "int8", "optimizer": stepwire.Adam(amsgrad=True)}, "config.state_precision"),
        ({"telemetry": "off"}, "telemetry"),
        ({"frozen": ["v"]}, "frozen"),
        ({"schedule": "cosine"}, "schedule"),
        ({"groups": [{"params": ["w"], "schedule": 0.5}]}, "groups[0].schedule"),
        ({"groups": [{"params": ["w"], "clip_grad_norm": -1.0}]}, "groups[0].clip_grad_norm"),
        ({"gradient_dtype": "float64"}, "gradient_dtype"),
        ({"reply_dtype": np.int8}, "reply_dtype"),
        ({"timeout": 0.0}, "timeout"),
        ({"lease_seconds": -1.0}, "lease_seconds"),
        ({"lease_seconds": 0.0}, "lease_seconds"),
        ({"lease_seconds": float("nan")}, "lease_seconds"),
        ({"lease_seconds": 1e9}, "config.lease"),
        ({"label": "x" * 129}, "config.label"),
        ({"label": "two\nlines"}, "config.label"),
        ({"request_id": "has space"}, "request_id"),
        ({"groups": [{"params": ["v"]}]}, "groups[0].params"),
        ({"groups": [{"params": ["w"]}, {"params": ["w"]}]}, "groups[1].params"),
        ({"groups": [{"params": ["w"], "momentum": 0.9}]}, "groups[0].momentum"),
        ({"groups": [{"params": ["w"], "lr": -1.0}]}, "groups[0].lr"),
        ({"groups": [{"lr": 0.1}]}, "groups[0].params"),
    ],
)
def test_a_wrong_option_is_refused_by_name(client: stepwire.Client, options: dict[str, Any], field: str) -> None:
    before = client.info().sessions
    with pytest.raises(stepwire.InvalidRequestError) as refused:
        client.create_session(ONE, **options)
    assert refused.value.metadata["field"] == field
    assert client.info().sessions == before


def test_a_description_that_no_server_receives_is_refused_before_it_is_sent(client: stepwire.Client) -> None:
    names = {f"{index}{'x' * (1 << 20)}": np.zeros(1, np.float32) for index in range(8)}
    with pytest.raises(stepwire.InvalidRequestError, match=r"8 tensors take 8388\d+ bytes, .* 8388608 at most"):
        client.create_session(names)


@pytest.mark.parametrize("parameters", [{}, []])
def test_a_model_without_tensors_is_refused(client: stepwire.Client, parameters: Any) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="0 tensors"):
        client.create_session(parameters)


def test_an_option_that_is_not_served_is_refused_at_creation(
    client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server: this client has no name for what that one does not serve, so its config is changed on the way."""
    unary = client._server.server.calls.unary

    def changed(method: str, request: Any, *arguments: Any) -> Any:
        if method == "CreateSession":
            request.config.durability = session_pb2.DURABILITY_JOURNAL
        return unary(method, request, *arguments)

    monkeypatch.setattr(client._server.server.calls, "unary", changed)
    with pytest.raises(stepwire.UnsupportedFeatureError) as refused:
        client.create_session(ONE)
    assert refused.value.metadata == {"field": "config.durability", "feature": "durability_journal"}


@pytest.mark.parametrize("formula", get_args(Formula))
def test_every_formula_is_served(client: stepwire.Client, formula: Formula) -> None:
    with client.create_session(ONE, optimizer=stepwire.Adam(lr=0.5, formula=formula)) as session:
        stepped = session.step(ONE)
        assert isinstance(stepped, dict)
        expected = 1 - 0.5 * (0.1 / 0.001**0.5 if formula == "no_bias_correction" else 1.0)
        np.testing.assert_allclose(stepped["w"], np.full(3, expected), rtol=1e-4)


def test_tensors_that_are_frozen_stay_and_need_no_gradient(client: stepwire.Client) -> None:
    parameters = {name: np.ones(2, np.float32) for name in ("a", "b")}
    with client.create_session(parameters, optimizer=stepwire.Adam(lr=0.5), frozen=["a"]) as session:
        stepped = session.step({"b": np.ones(2, np.float32)})
        assert isinstance(stepped, dict)
        np.testing.assert_allclose(stepped["b"], [0.5, 0.5], rtol=1e-5)
        assert stepped["a"].tolist() == [1.0, 1.0]


def test_a_schedule_and_a_bound_reach_the_groups_they_are_given_to(client: stepwire.Client) -> None:
    parameters = {name: np.ones(2, np.float32) for name in ("a", "b")}
    groups = [{"params": ["b"], "schedule": Schedule.step(1, 0.5), "clip_grad_norm": 0.5}]
    options: Any = {"groups": groups, "schedule": Schedule.linear(4), "clip_grad_norm": 100.0}
    with client.create_session(parameters, optimizer=stepwire.Adam(lr=1.0), **options) as session:
        seen = []
        for _ in range(3):
            session.step(parameters)
            assert session.last_result is not None
            seen.append([group.hyperparameters.lr for group in session.last_result.groups])
            norm = float(np.float32(2**0.5))
            assert [group.grad_norm for group in session.last_result.groups] == [norm, norm]
            coefficients = [group.clip_coefficient for group in session.last_result.groups]
            assert coefficients == [1.0, 0.5 / (norm + 1e-6)]
    assert seen == [[1.0, 1.0], [0.75, 0.5], [0.5, 0.25]]


def test_tensors_in_no_group_form_one_more_with_the_optimizers_numbers(client: stepwire.Client) -> None:
    parameters = {name: np.ones(2, np.float32) for name in ("a", "b", "c")}
    groups = [{"params": ["c"], "lr": 0.5}, {"params": ["a"], "betas": (0.5, 0.25), "maximize": True}]
    with client.create_session(parameters, optimizer=stepwire.Adam(lr=0.125), groups=groups) as session:
        session.step(parameters)
        assert session.last_result is not None
        numbers = [group.hyperparameters for group in session.last_result.groups]
    base = stepwire.Adam(lr=0.125).hyperparameters()
    assert numbers == [
        base,
        base.replace({"lr": 0.5}),
        base.replace({"betas": (0.5, 0.25), "maximize": True}),
    ]


def test_groups_that_name_every_tensor_are_all_there_is(client: stepwire.Client) -> None:
    parameters = {name: np.ones(2, np.float32) for name in ("a", "b")}
    with client.create_session(parameters, groups=[{"params": ["b"]}, {"params": ["a"], "eps": 0.5}]) as session:
        session.step(parameters)
        assert session.last_result is not None
        assert [group.hyperparameters.eps for group in session.last_result.groups] == [1e-8, 0.5]


def test_another_protocol_is_refused_before_anything_is_created(scripted: Any) -> None:
    info = pb.GetServerInfoResponse(version="9.0", protocol_min=PROTOCOL_MAX + 1, protocol_max=PROTOCOL_MAX + 4)
    scripted.on("GetServerInfo", lambda request, context: info.SerializeToString())
    with (
        stepwire.connect(scripted.target) as client,
        pytest.raises(stepwire.UnsupportedFeatureError, match=r"the server 9\.0 speaks protocol 2 to 5, this client 1"),
    ):
        client.create_session(ONE)


def test_a_session_whose_parameters_cannot_be_loaded_is_not_left_behind(
    client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows its id; it would hold its memory until the lease runs out."""
    before = client.info().sessions

    def failing(*arguments: Any, **options: Any) -> None:
        raise stepwire.DeadlineExceededError("late")

    monkeypatch.setattr(RemoteLink, "load", failing)
    with pytest.raises(stepwire.DeadlineExceededError):
        client.create_session(ONE)
    assert client.info().sessions == before


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_client_needs_a_positive_timeout(timeout: float) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="timeout"):
        stepwire.connect("localhost:1", timeout=timeout)


def test_closing_twice_is_harmless(target: str) -> None:
    with stepwire.connect(target) as client:
        client.create_session(ONE)
        client.close()
    client.close()
