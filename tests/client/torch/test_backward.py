"""Steps that begin in the backward pass: the bits of ordinary ones, and nothing left of those that were given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import pytest
import torch

import stepwire
from stepwire.errors import DeadlineExceededError, UnavailableError
from stepwire.links.hold import Hold
from stepwire.torch import SGD, Adam
from stepwire.torch.backward import BackwardSender
from tests.client.torch.twins import assert_same_bits
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server of small chunks, so that a model of some layers is many messages."""
    with numpy_server(max_chunk_bytes=64 << 10) as server:
        yield server.target


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Tell of each step whether it was the one that its backward pass began."""
    told: list[bool] = []
    finish = BackwardSender.finish

    def finished(self: BackwardSender, numbers: Any) -> Any:
        reply = finish(self, numbers)
        told.append(reply is not None)
        return reply

    monkeypatch.setattr(BackwardSender, "finish", finished)
    return told


def model() -> Any:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Linear(120, 200), torch.nn.Tanh(), torch.nn.Linear(200, 150), torch.nn.Tanh(), torch.nn.Linear(150, 4)
    )


class Pair:
    """One training twice: with ordinary steps, and with steps that begin early."""

    def __init__(self, target: str, **options: Any) -> None:
        self.plain_model, self.model = model(), model()
        both = {"lr": 0.02, "server": target, "transport": "tcp"} | options
        self.plain = Adam(self.plain_model.parameters(), **both)
        self.early = Adam(self.model.parameters(), send_in_backward=True, **both)

    @property
    def both(self) -> list[tuple[Any, Any]]:
        return [(self.plain_model, self.plain), (self.model, self.early)]

    def backward(self, seed: int) -> None:
        inputs = torch.randn((4, 120), generator=torch.Generator().manual_seed(seed))
        for network, optimizer in self.both:
            optimizer.zero_grad()
            network(inputs).square().mean().backward()

    def backward_of_early(self, seed: int) -> None:
        """Make one gradient for both trainings, of the early one's model, whose parameters may be unknown yet."""
        inputs = torch.randn((4, 120), generator=torch.Generator().manual_seed(seed))
        self.early.zero_grad()
        self.model(inputs).square().mean().backward()
        for network, other in zip(self.plain_model.parameters(), self.model.parameters(), strict=True):
            assert other.grad is not None
            network.grad = other.grad.clone()

    def all_sent(self) -> None:
        """Wait until every message of the step that was begun is made, so that a later change is a lost bet."""
        begun, size = self.early.backing._sender._bet.begun, self.early.session._packer.layout.size
        assert begun.feed._changed.wait_for(
            lambda: sum(chunk.elements for chunk, _ in begun.feed._sent) == size, PATIENCE_SECONDS
        )

    def step(self, seed: int) -> None:
        self.backward(seed)
        for _, optimizer in self.both:
            optimizer.step()
        assert_same_bits(self.plain_model.parameters(), self.model.parameters())

    def fail(self, seed: int, *, applied: bool) -> None:
        """Make a gradient, and have the early optimizer's step of it fail with an unknown outcome."""
        hold = self.early.session._link.shards[0].hold
        with lost_replies(applied=applied, of=lambda other: other is hold):
            self.backward(seed)
            with pytest.raises(DeadlineExceededError):
                self.early.step()

    def interrupt(self, seed: int, *, applied: bool) -> None:
        """Make a gradient, and interrupt the user's wait for the early optimizer's step of it."""
        sent = threading.Event()
        exchange = Hold._exchange

        def endless(self: Hold, stream: Any, call: Any, deadline: Any) -> Any:
            if applied:
                exchange(self, stream, call, deadline)
            call.sent = True
            ended = threading.Event()
            call.feed.bind(ended.set)
            sent.set()
            assert ended.wait(120.0)
            raise UnavailableError("the stream was closed")

        def interrupted(self: Any, timeout: Any = None) -> Any:
            assert sent.wait(120.0)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Hold, "_exchange", endless)
            begun = self._begun_in_backward(seed)
            patched.setattr(type(begun.reply), "result", interrupted)
            with pytest.raises(KeyboardInterrupt) as failed:
                self.early.step()
        assert begun.reply.done()
        assert hasattr(failed.value, "__notes__") is applied  # of a model that may be torn

    def _begun_in_backward(self, seed: int) -> Any:
        self.backward(seed)
        return self.early.backing._sender._bet.begun


@pytest.fixture
def pair(target: str) -> Iterator[Pair]:
    made = Pair(target)
    yield made
    made.plain.close()
    made.early.close()


def test_all_steps_but_the_first_begin_in_the_backward_pass(pair: Pair, early: list[bool]) -> None:
    for seed in range(6):
        pair.step(seed)
    assert early == [False, *[True] * 5]
    assert pair.early.applied_step == 6


def test_a_scheduler_between_two_steps_changes_nothing(pair: Pair, early: list[bool]) -> None:
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _, optimizer in pair.both]
    for seed in range(4):
        pair.step(seed)
        for scheduler in schedulers:
            scheduler.step()
    assert early == [False, True, True, True]


def set_rate(network: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.001


def clip(network: Any, optimizer: Any) -> None:
    torch.nn.utils.clip_grad_norm_(network.parameters(), 0.01)


def drop_one(network: Any, optimizer: Any) -> None:
    network[2].bias.grad = None


def replace_one(network: Any, optimizer: Any) -> None:
    network[0].weight.grad = torch.ones_like(network[0].weight)


def write_a_parameter(network: Any, optimizer: Any) -> None:
    with torch.no_grad():
        network[4].weight.mul_(0.5)


def accumulate(network: Any, optimizer: Any) -> None:
    network(torch.ones(2, 120)).sum().backward()


def unscale(network: Any, optimizer: Any) -> None:
    """Change gradients as `GradScaler.unscale_` does, which moves no version counter."""
    grads = [parameter.grad for parameter in network.parameters()]
    torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros(1), torch.tensor(0.5))


def write_a_gradient_through_data(network: Any, optimizer: Any) -> None:
    network[4].bias.grad.data[1] *= -1.0


def write_a_parameter_through_data(network: Any, optimizer: Any) -> None:
    network[4].weight.data.mul_(0.5)


def scale(network: Any, optimizer: Any) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)


@pytest.mark.parametrize(
    "meddle",
    [
        set_rate,
        clip,
        drop_one,
        replace_one,
        unscale,
        write_a_gradient_through_data,
        write_a_parameter,
        write_a_parameter_through_data,
        accumulate,
        scale,
    ],
    ids=lambda one: one.__name__,
)
def test_a_step_that_is_not_the_one_that_was_begun_is_sent_as_any_other(
    pair: Pair, early: list[bool], meddle: Any
) -> None:
    pair.step(1)
    pair.step(2)
    pair.backward(3)
    pair.all_sent()
    for network, optimizer in pair.both:
        meddle(network, optimizer)
        optimizer.step()
        if meddle is scale:
            del optimizer.grad_scale, optimizer.found_inf
    assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())
    assert early == [False, True, False]
    for seed in (4, 5, 6):
        pair.step(seed)
    assert early[-1] is True
    assert pair.early.applied_step == pair.plain.applied_step == 6


def test_clipping_that_clips_nothing_loses_no_bet(pair: Pair, early: list[bool]) -> None:
    """Torch counts the multiplication by 1 as a change; the content is what was sent."""
    for seed in range(3):
        pair.backward(seed)
        if seed:
            pair.all_sent()
        for network, optimizer in pair.both:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1e6)
            optimizer.step()
        assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())
    assert early == [False, True, True]


@pytest.mark.parametrize("amp_scaling", [True, False])
@pytest.mark.parametrize("unscale_first", [True, False])
def test_a_scaler_that_unscales_here_or_there(
    target: str, early: list[bool], amp_scaling: bool, unscale_first: bool
) -> None:
    pair = Pair(target, amp_scaling=amp_scaling)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in pair.both]
    for seed in range(4):
        inputs = torch.randn((4, 120), generator=torch.Generator().manual_seed(seed))
        for (network, optimizer), scaler in zip(pair.both, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(network(inputs).square().mean()).backward()
            if seed and optimizer is pair.early:
                pair.all_sent()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())
    assert early[1:] == [amp_scaling and not unscale_first] * 3
    pair.plain.close()
    pair.early.close()


def test_a_parameter_that_is_thawed_is_sent_early_too(target: str, early: list[bool]) -> None:
    pair = Pair.__new__(Pair)
    pair.plain_model, pair.model = model(), model()
    for network in (pair.plain_model, pair.model):
        network[4].requires_grad_(False)
    both = {"lr": 0.02, "server": target, "transport": "tcp"}
    pair.plain = Adam(pair.plain_model.parameters(), **both)
    pair.early = Adam(pair.model.parameters(), send_in_backward=True, **both)
    for seed in range(6):
        if seed == 2:
            for network, _ in pair.both:
                network[4].requires_grad_(True)
        pair.step(seed)
    assert early == [False, True, False, True, True, True]
    pair.plain.close()
    pair.early.close()


def test_int8_gradients_are_refused(target: str) -> None:
    with pytest.raises(stepwire.UnsupportedFeatureError, match="leave out one of send_in_backward and gradient_dtype"):
        SGD(model().parameters(), lr=0.1, server=target, gradient_dtype="int8", send_in_backward=True)


def test_a_backward_pass_without_a_step_leaves_no_trace(pair: Pair, early: list[bool]) -> None:
    pair.step(1)
    pair.backward(2)
    pair.step(3)
    pair.step(4)
    assert early == [False, False, True]
    assert pair.early.applied_step == 3


def test_state_goes_in_and_out_between_backward_pass_and_step(pair: Pair) -> None:
    pair.step(1)
    pair.backward(2)
    states = [optimizer.state_dict() for _, optimizer in pair.both]
    for (_, optimizer), state in zip(pair.both, states, strict=True):
        optimizer.load_state_dict(state)
        optimizer.step()
    assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())


def test_an_inf_that_the_server_refuses_is_an_error_of_the_step(target: str, early: list[bool]) -> None:
    pair = Pair(target)
    pair.step(1)
    before = [parameter.detach().clone() for parameter in pair.model.parameters()]
    pair.model(torch.full((2, 120), float("inf"))).sum().backward()
    with pytest.raises(stepwire.NonFiniteGradientError, match=r"param_groups\[0\]\[0\]"):
        pair.early.step()
    assert_same_bits(before, pair.model.parameters())
    pair.step(2)
    pair.step(3)
    assert pair.early.applied_step == 3


def test_shared_memory_needs_no_early_start(target: str, early: list[bool]) -> None:
    pair = Pair(target, transport="shm")
    for seed in range(3):
        pair.step(seed)
    assert early == [False] * 3


def test_a_model_over_several_channels_is_refused(target: str) -> None:
    with pytest.raises(
        stepwire.UnsupportedFeatureError, match="send_in_backward: the model is partitioned over several"
    ):
        SGD(model().parameters(), lr=0.1, server=target, channels=2, send_in_backward=True)


def test_a_closed_optimizer_watches_no_more(target: str, early: list[bool]) -> None:
    pair = Pair(target)
    pair.step(1)
    pair.backward(2)
    pair.early.close()
    pair.model(torch.ones(2, 120)).sum().backward()
    with pytest.raises(stepwire.InvalidRequestError, match="the optimizer is closed"):
        pair.early.step()


@pytest.mark.parametrize("applied", [True, False])
def test_a_step_that_failed_is_taken_again_once(pair: Pair, early: list[bool], applied: bool) -> None:
    for seed in range(2):
        pair.step(seed)
    pair.fail(2, applied=applied)
    pair.plain.step()
    pair.early.step()
    assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())
    assert pair.early.applied_step == 3
    pair.step(3)
    assert early == [False, True, False, False, True]


@pytest.mark.parametrize("applied", [True, False])
def test_an_interrupted_step_is_over_and_the_next_one_follows(pair: Pair, early: list[bool], applied: bool) -> None:
    """No reply is written behind the user's back, and the step after the interrupt is not cancelled."""
    for seed in range(2):
        pair.step(seed)
    pair.interrupt(2, applied=applied)
    if applied:
        pair.plain.step()
    pair.backward_of_early(3)
    for _, optimizer in pair.both:
        optimizer.step()
    assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())
    pair.step(4)
    assert pair.early.applied_step == 4 + applied
    assert early[-2:] == [False, True]


def test_a_step_behind_a_failure_that_the_user_has_not_read_is_sent_as_any_other(pair: Pair, early: list[bool]) -> None:
    pair.step(0)
    unread = pair.early.session.step_async({}, lr=float("nan"))
    wait([unread])
    pair.step(1)
    pair.step(2)
    assert early == [False, False, True]
    assert pair.early.applied_step == 3


@pytest.mark.parametrize("applied", [True, False])
def test_a_backward_pass_after_a_step_that_failed_begins_none(pair: Pair, early: list[bool], applied: bool) -> None:
    """Its gradient is another one, and becomes the next step: whether the first was applied is asked before."""
    for seed in range(2):
        pair.step(seed)
    pair.fail(2, applied=applied)
    if applied:
        pair.plain.step()
    pair.backward_of_early(3)
    for _, optimizer in pair.both:
        optimizer.step()
    assert_same_bits(pair.plain_model.parameters(), pair.model.parameters())
    assert pair.early.applied_step == 3 + applied
    assert early[-1] is False
