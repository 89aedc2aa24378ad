"""After a lost session the same optimizer is loaded again, and the run goes on from its checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.errors import DeadlineExceededError, SessionNotFoundError
from stepwire_server.testing import serving
from tests.client.torch.twins import Twins, assert_same_bits, gradients, parameters, same_bits
from tests.support.torn_replies import torn_replies

EPS = torch.finfo(torch.float32).eps
BOUND = {"rtol": 16 * EPS, "atol": 16 * EPS}

WAYS: dict[str, dict[str, Any]] = {
    "tcp": {"transport": "tcp"},
    "shared_views": {"shared_views": True},
    "send_in_backward": {"transport": "tcp", "send_in_backward": True},
}


class Run:
    """Torch's optimizer undisturbed, beside the drop-in, whose session is lost after a checkpoint."""

    def __init__(self, server: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.pair = Twins(
            lambda params, remote_params: (
                torch.optim.Adam(params, lr=0.05),
                stepwire.torch.Adam(remote_params, lr=0.05, server=server, **options),
            ),
            lambda: parameters(dtype=dtype),
        )

    @property
    def remote(self) -> Any:
        return self.pair.remote

    def save(self) -> tuple[list[Any], dict[str, Any]]:
        model = [parameter.detach().clone() for parameter in self.pair.remote_params]
        return model, copy.deepcopy(self.remote.state_dict())

    def step_remote(self, number: int) -> None:
        params = self.pair.remote_params
        for parameter, gradient in zip(
            params, gradients([p.shape for p in params], number, params[0].dtype), strict=True
        ):
            parameter.grad = gradient
        self.remote.step()

    @torch.no_grad()
    def restore(self, checkpoint: tuple[list[Any], dict[str, Any]]) -> None:
        for parameter, values in zip(self.pair.remote_params, checkpoint[0], strict=True):
            parameter.copy_(values)
        self.remote.load_state_dict(checkpoint[1])


def lose(session_id: str, client: stepwire.Client) -> None:
    for shard in session_id.split(","):
        client.session(shard).close()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_its_checkpoint(way: str, target: str, client: stepwire.Client) -> None:
    run = Run(target, **WAYS[way])
    with run.remote:
        run.pair.step(3)
        saved = run.save()
        run.step_remote(77)
        before = [parameter.detach().clone() for parameter in run.pair.remote_params]
        lost = run.remote.session_id
        lose(lost, client)
        with pytest.raises(SessionNotFoundError, match="load_state_dict makes a new session") as raised:
            run.step_remote(78)
        assert raised.value.metadata["last_known_step"] == "4"
        assert_same_bits(run.pair.remote_params, before)
        with pytest.raises(SessionNotFoundError, match="load_state_dict makes a new session"):
            run.remote.state_dict()
        run.restore(saved)
        assert run.remote.session_id != lost
        run.pair.step(3)
        run.pair.assert_close(**BOUND)
        assert run.remote.applied_step == 7
        kept = run.remote.session_id
    assert kept not in {info.session_id for info in client.sessions()}


def test_a_session_that_is_lost_unnoticed_is_loaded_too(target: str, client: stepwire.Client) -> None:
    run = Run(target, torch.bfloat16)
    with run.remote:
        run.step_remote(1)
        saved = run.save()
        run.step_remote(2)
        expected = run.save()
        lose(run.remote.session_id, client)
        run.restore(saved)
        run.step_remote(2)
        again = run.save()
        assert_same_bits(again[0], expected[0])
        assert_same_bits(again[1]["stepwire"]["masters"].values(), expected[1]["stepwire"]["masters"].values())


def test_new_moments_for_a_model_without_a_checkpoint(target: str, client: stepwire.Client) -> None:
    run = Run(target)
    with run.remote:
        run.pair.step(3)
        lose(run.remote.session_id, client)
        fresh = torch.optim.Adam(run.pair.params, lr=0.05)
        run.remote.load_state_dict(fresh.state_dict())
        run.pair.local = fresh
        run.pair.step(2)
        run.pair.assert_close(**BOUND)


def test_a_torn_model_of_a_lost_session_is_replaced_by_its_checkpoint(target: str, client: stepwire.Client) -> None:
    run = Run(target, transport="tcp")
    with run.remote:
        run.pair.step(2)
        saved = run.save()
        with torn_replies(chunks=0), pytest.raises(DeadlineExceededError):
            run.step_remote(9)
        lose(run.remote.session_id, client)
        run.restore(saved)
        run.pair.step(2)
        run.pair.assert_close(**BOUND)


def test_one_of_two_servers_is_lost() -> None:
    with serving() as one, serving() as other, stepwire.connect([one, other], transport="tcp") as client:
        run = Run(client)
        with run.remote:
            run.pair.step(2)
            saved = run.save()
            run.step_remote(77)
            with stepwire.connect(other) as second:
                lose(run.remote.session_id.split(",")[1], second)
            with pytest.raises(SessionNotFoundError):
                run.step_remote(78)
            run.restore(saved)
            run.pair.step(2)
            run.pair.assert_close(**BOUND)
            kept = set(run.remote.session_id.split(","))
            assert {info.session_id for info in client.sessions()} == kept


def test_what_was_read_of_a_lost_state_stays_as_it_was(target: str, client: stepwire.Client) -> None:
    run = Run(target)
    with run.remote:
        run.pair.step(2)
        saved = run.save()
        first = run.pair.remote_params[0]
        held, before = run.remote.state[first]["exp_avg"], run.remote.state[first]["exp_avg"].clone()
        lose(run.remote.session_id, client)
        run.restore(saved)
        held.mul_(2.0)
        assert same_bits(held.clone(), before * 2)
        run.pair.step(2)
        run.pair.assert_close(**BOUND)


def test_a_state_that_does_not_fit_makes_no_session(target: str, client: stepwire.Client) -> None:
    run = Run(target)
    with run.remote:
        run.pair.step(1)
        saved = run.save()
        del saved[1]["state"][0]["exp_avg"]
        lost = run.remote.session_id
        lose(lost, client)
        sessions = {info.session_id for info in client.sessions()}
        with pytest.raises(stepwire.InvalidRequestError, match=r"state\[0\]\['exp_avg'\]: is missing"):
            run.restore(saved)
        assert run.remote.session_id == lost
        assert {info.session_id for info in client.sessions()} == sessions


def test_a_session_to_resume_that_is_not_there(target: str) -> None:
    with pytest.raises(SessionNotFoundError, match="never created") as raised:
        stepwire.torch.Adam(parameters(), server=target, session="0" * 32)
    assert "load_state_dict" not in str(raised.value)
