"""A model after a step that failed: whole, as before the step or as after it, and stepped exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import stepwire
import stepwire.torch.recovery
from stepwire.errors import (
    DeadlineExceededError,
    NonFiniteGradientError,
    SessionNotFoundError,
    StepMismatchError,
)
from stepwire.torch import SGD, Adam
from stepwire_server.testing import serving
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server
from tests.support.torn_replies import torn_replies

ELEMENTS = 40_000
"""More than two chunks of 64 KiB."""


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server of small chunks, so that replies have several."""
    with numpy_server(max_chunk_bytes=64 << 10) as server:
        yield server.target


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a failing step wait for the server as long as it needs on a busy machine."""
    monkeypatch.setattr(stepwire.torch.recovery, "_AT_ONCE_SECONDS", 60.0)


class Training:
    """Three parameters that start at 0 and lose each gradient: SGD at rate 1."""

    def __init__(self, server: Any, **options: Any) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(3)]
        self.optimizer = SGD(self.parameters, lr=1.0, **{"server": server, "transport": "tcp"} | options)

    def step(self, gradient: float) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.step()

    @property
    def model(self) -> list[list[float]]:
        """The distinct values of each parameter."""
        return [parameter.unique().tolist() for parameter in self.parameters]

    @property
    def session(self) -> list[list[float]]:
        """The distinct values of each parameter in the session."""
        pulled: Any = self.optimizer.session.pull()
        return [torch.from_numpy(values).unique().tolist() for values in pulled.values()]

    @torch.no_grad()
    def fill(self, value: float, but: int = 0) -> None:
        """Write all parameters except for the first ones."""
        for parameter in self.parameters[but:]:
            parameter.fill_(value)


@pytest.fixture
def training(target: str) -> Iterator[Training]:
    made = Training(target)
    yield made
    made.optimizer.close()


def everywhere(value: float) -> list[list[float]]:
    return [[value]] * 3


def tear(training: Training) -> None:
    """Leave the model with a part of step 2."""
    training.step(1)
    with torn_replies(), pytest.raises(DeadlineExceededError) as failed:
        training.step(10)
    assert training.model == [[-11.0, -1.0], [-1.0], [-1.0]]
    assert "those before step 2, those after it, or a part of each" in failed.value.__notes__[0]


def test_a_reply_that_breaks_off_leaves_a_whole_model(training: Training) -> None:
    training.step(1)
    with torn_replies(unreachable=False), pytest.raises(DeadlineExceededError) as failed:
        training.step(10)
    assert training.model == training.session == everywhere(-11.0)
    assert not hasattr(failed.value, "__notes__")
    training.step(10)  # the same step again
    training.step(100)
    assert training.model == training.session == everywhere(-111.0)
    assert training.optimizer.applied_step == 3


def test_a_torn_model_is_whole_after_the_same_step(training: Training) -> None:
    tear(training)
    training.step(10)
    assert training.model == training.session == everywhere(-11.0)
    assert training.optimizer.applied_step == 2


def test_the_next_batch_after_a_torn_reply_is_applied(training: Training) -> None:
    tear(training)
    training.step(100)
    assert training.model == training.session == everywhere(-111.0)
    assert training.optimizer.applied_step == 3


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("gradient", [10.0, 100.0], ids=["same", "another"])
def test_a_gradient_after_a_lost_reply_is_applied_once(training: Training, applied: bool, gradient: float) -> None:
    training.step(1)
    with lost_replies(applied=applied), pytest.raises(DeadlineExceededError):
        training.step(10)
    assert training.model == everywhere(-11.0 if applied else -1.0)
    training.step(gradient)
    expected = -11.0 if gradient == 10 else -111.0 if applied else -101.0
    assert training.model == training.session == everywhere(expected)


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("change", [True, False], ids=["changed", "unchanged"])
def test_shared_views_are_whole_after_a_step_that_failed(target: str, applied: bool, change: bool) -> None:
    training = Training(target, transport="shm", shared_views=True)
    training.step(1)
    with lost_replies(applied=applied), pytest.raises(DeadlineExceededError):
        training.step(10)
    assert training.model == everywhere(-11.0 if applied else -1.0)
    if change:
        training.fill(-1000.0, but=2)
    training.step(100)
    kept = [-111.0] if applied else [-101.0]
    assert training.model == training.session == [kept, kept, [-1100.0] if change else kept]
    training.step(1000)
    assert training.model == training.session
    training.optimizer.close()
    assert training.model == [[kept[0] - 1000], [kept[0] - 1000], [-2100.0] if change else [kept[0] - 1000]]


@pytest.mark.parametrize("applied", [True, False])
def test_shared_views_apply_the_same_gradient_once(target: str, applied: bool) -> None:
    """Values that were restored are no change of the user's, whose upload would make the step another one."""
    training = Training(target, transport="shm", shared_views=True)
    training.step(1)
    training.fill(-5.0, but=2)  # so that a page is written already
    with lost_replies(applied=applied), pytest.raises(DeadlineExceededError):
        training.step(10)
    training.step(10)
    assert training.model == training.session == [[-11.0], [-11.0], [-15.0]]
    assert training.optimizer.applied_step == 2
    training.step(100)
    assert training.model == training.session == [[-111.0], [-111.0], [-115.0]]
    training.optimizer.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_whole_and_keeps_its_masters(target: str, dtype: torch.dtype) -> None:
    """Each step is too small for the model to show it."""
    parameter = torch.nn.Parameter(torch.ones(ELEMENTS * 3, dtype=dtype))
    with SGD([parameter], lr=2.0**-14, server=target, transport="tcp") as optimizer:
        for fault in (None, torn_replies, None):
            parameter.grad = torch.full_like(parameter, -1.0)
            if fault is None:
                optimizer.step()
                continue
            with fault(), pytest.raises(DeadlineExceededError):
                optimizer.step()
            masters = optimizer.state_dict()["stepwire"]["masters"][0]
            assert masters.unique().tolist() == [1 + 2 * 2.0**-14]
        assert optimizer.applied_step == 2  # the last one was the failed step again


def save(training: Training) -> None:
    assert training.optimizer.state_dict()["stepwire"]["step"] == 2


def upload(training: Training) -> None:
    training.optimizer.upload_parameters()


def clamp(training: Training) -> None:
    """Write one parameter with the values that it has, and step."""
    with torch.no_grad():
        training.parameters[2].clamp_(-50, 50)
    training.step(0)


def regroup(training: Training) -> None:
    training.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize("call", [save, upload, clamp, regroup], ids=lambda call: call.__name__)
def test_a_torn_model_is_whole_before_it_is_read(training: Training, call: Callable[[Training], None]) -> None:
    tear(training)
    call(training)
    assert training.model == everywhere(-11.0)
    assert training.session[:3] == everywhere(-11.0)
    training.step(100)
    assert training.model == training.session[:3] == everywhere(-111.0)


def test_writes_of_other_code_into_a_torn_model_stay(training: Training) -> None:
    tear(training)
    with torch.no_grad():
        training.parameters[0][0] = 5.0
        training.parameters[2][-1] = 7.0
    training.step(100)
    assert training.model == training.session == [[-111.0, -95.0], [-111.0], [-111.0, -93.0]]


def test_a_model_that_is_written_as_a_whole_is_the_truth(training: Training) -> None:
    tear(training)
    training.fill(-1.0)
    training.step(100)
    assert training.model == training.session == everywhere(-101.0)


@pytest.mark.parametrize("fault", [lost_replies, torn_replies], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_checkpoint_is_loaded_after_a_step_that_failed(target: str, fault: Any, order: str) -> None:
    def advance(optimizer: Any, model: Any) -> None:
        optimizer.zero_grad()
        model.weight.square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model, straight = torch.nn.Linear(200, 200, bias=False), torch.nn.Linear(200, 200, bias=False)
    straight.load_state_dict(model.state_dict())
    plain = torch.optim.Adam(straight.parameters(), lr=0.01)
    with Adam(model.parameters(), lr=0.01, server=target, transport="tcp") as optimizer:
        advance(optimizer, model)
        saved = {name: values.clone() for name, values in model.state_dict().items()}, optimizer.state_dict()
        with fault(), pytest.raises(DeadlineExceededError):
            advance(optimizer, model)
        if order == "model first":
            model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        model.load_state_dict(saved[0])
        for _ in range(2):
            advance(optimizer, model)
        moments = optimizer.state_dict()["state"][0]
    for _ in range(3):
        advance(plain, straight)
    torch.testing.assert_close(model.weight, straight.weight, rtol=1e-6, atol=1e-6)
    assert float(moments["step"]) == 3.0


@pytest.mark.parametrize("recovery", ["model", "model and optimizer"])
def test_a_step_that_some_shards_applied_is_replaced_by_a_checkpoint(recovery: str) -> None:
    with serving() as one, serving() as other, stepwire.connect([one, other], transport="tcp") as client:
        training = Training(client, non_finite="allow")  # one phase: a shard does not wait for the other
        training.step(1)
        saved = training.optimizer.state_dict()
        last = training.optimizer.session._link.shards[1].hold
        with lost_replies(applied=False, of=lambda hold: hold is last), pytest.raises(DeadlineExceededError):
            training.step(10)
        with pytest.raises(StepMismatchError, match="step 2 failed and was applied on some servers"):
            training.optimizer.state_dict()
        training.fill(-1.0)
        if recovery == "model and optimizer":
            training.optimizer.load_state_dict(saved)
        training.step(100)
        assert training.model == training.session == everywhere(-101.0)
        training.optimizer.close()


def test_a_step_that_was_not_applied_costs_no_pull(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.step(1)
    monkeypatch.setattr(training.optimizer.session, "pull", lambda **_: pytest.fail("the model is whole"))
    versions = [parameter._version for parameter in training.parameters]
    with pytest.raises(NonFiniteGradientError):
        training.step(float("inf"))
    assert [parameter._version for parameter in training.parameters] == versions
    training.step(10)
    assert training.model == everywhere(-11.0)


def test_autograd_sees_that_a_torn_model_changed(training: Training) -> None:
    training.step(1)
    loss = training.parameters[0].square().sum()
    with torn_replies(), pytest.raises(DeadlineExceededError):
        training.step(10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_is_whole_before_its_session_ends(target: str) -> None:
    training = Training(target)
    tear(training)
    training.optimizer.close()
    assert training.model == everywhere(-11.0)


def lose(training: Training, target: str) -> None:
    """Leave the model with a part of step 2, and end its session."""
    tear(training)
    with stepwire.connect(target) as other:
        other.session(training.optimizer.session_id).close()


TORN = "may be those before step 2, those after it, or a part of each: .* Load a checkpoint into the model"


@pytest.mark.parametrize(
    "call",
    [lambda training: training.step(100), save, upload, clamp, regroup],
    ids=["step", "save", "upload", "clamp", "regroup"],
)
def test_every_call_tells_of_the_torn_model_of_a_lost_session(
    training: Training, target: str, call: Callable[[Training], None]
) -> None:
    lose(training, target)
    for _ in range(2):
        with pytest.raises(SessionNotFoundError, match=TORN):
            call(training)
    with pytest.raises(SessionNotFoundError, match=TORN):
        training.optimizer.close()
    training.optimizer.close()


def test_a_torn_model_that_is_written_as_a_whole_is_torn_no_more(training: Training, target: str) -> None:
    lose(training, target)
    training.fill(-1.0)
    training.optimizer.close()
    assert training.model == everywhere(-1.0)


@pytest.mark.parametrize("end", ["close", "detach"])
def test_the_end_of_an_optimizer_without_a_server_warns_of_a_torn_model(
    target: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(target)
    session = training.optimizer.session
    tear(training)
    with torn_replies(), caplog.at_level(logging.WARNING, "stepwire.torch.backing"):
        getattr(training.optimizer, end)()
    assert "the model may be of two steps: the server cannot be reached" in caplog.text
    session.close()


def test_an_error_of_a_block_has_the_torn_model_as_a_note(target: str) -> None:
    training = Training(target)
    with pytest.raises(KeyError) as failed, training.optimizer:
        lose(training, target)
        raise KeyError("of the user")
    assert "Load a checkpoint into the model" in failed.value.__notes__[-1]


@pytest.mark.parametrize("of", [1, 2])
def test_a_model_without_a_part_of_a_reply_is_as_before_the_step(
    training: Training, target: str, of: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The session is lost after a step that was not applied: there is nothing to warn of."""
    for _ in range(of):
        training.step(1)
    with stepwire.connect(target) as other:
        other.session(training.optimizer.session_id).close()
    with pytest.raises(SessionNotFoundError, match="create a new one and load your last saved state") as failed:
        training.step(10)
    assert "those before step" not in str(failed.value)
    assert not hasattr(failed.value, "__notes__")
    training.optimizer.close()
    assert (training.model, caplog.text) == (everywhere(-of), "")


def test_a_torn_model_stays_torn_when_the_next_step_fails_too(training: Training) -> None:
    tear(training)
    with lost_replies(applied=False), torn_replies(), pytest.raises(DeadlineExceededError) as failed:
        training.step(100)
    assert "a part of each" in failed.value.__notes__[0]
    assert training.optimizer.state_dict()["stepwire"]["step"] == 2
    assert training.model == everywhere(-11.0)
