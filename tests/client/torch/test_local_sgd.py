"""Local SGD: the sign of the pseudo-gradient, the mean over workers, overlap by its formula, encodings, failures."""

from __future__ import annotations

import copy
import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import stepwire
import stepwire.torch
from stepwire.torch import LocalSGD
from stepwire_server.testing import serving
from tests.integration.workers.together import together

PLAIN = stepwire.SGD(lr=1.0)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as running:
        yield running


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def values(model: Any) -> Any:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


def inner_step(model: Any, number: int) -> None:
    """Make the gradients of one inner step."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def local(model: Any, server: str, every: int | None = 2, lr: float = 0.1, **options: Any) -> LocalSGD:
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    return LocalSGD(model, inner, every=every, server=server, **options)


def plain(model: Any, numbers: range, lr: float = 0.1) -> Any:
    """Return the values after inner steps without any outer one."""
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    for number in numbers:
        inner_step(model, number)
        inner.step()
    return values(model)


# --- the sign -------------------------------------------------------------------------------------------


def test_an_outer_step_of_sgd_with_rate_one_keeps_the_inner_steps(server: str) -> None:
    """With the other sign the model would move back by as much as it had come."""
    model = network()
    with local(model, server, outer=PLAIN) as outer:
        for number in range(6):
            inner_step(model, number)
            outer.step()
        assert (outer.applied_step, outer.inner_steps) == (3, 0)
    torch.testing.assert_close(values(model), plain(network(), range(6)), rtol=4 * EPS, atol=8 * EPS)


def test_half_the_rate_goes_half_the_way(server: str) -> None:
    model, start = network(), values(network())
    with local(model, server, outer=stepwire.SGD(lr=0.5)) as outer:
        for number in range(2):
            inner_step(model, number)
            outer.step()
    expected = start + 0.5 * (plain(network(), range(2)) - start)
    torch.testing.assert_close(values(model), expected, rtol=4 * EPS, atol=8 * EPS)


def test_the_default_is_the_momentum_of_diloco(server: str) -> None:
    model, start = network(), values(network())
    momentum, present = torch.zeros_like(start), start.clone()
    with local(model, server) as outer:
        for number in range(4):
            inner_step(model, number)
            outer.step()
            if number % 2:
                way_back = present - plain_from(present, range(number - 1, number + 1))
                momentum = 0.9 * momentum + way_back
                present = present - 0.7 * (way_back + 0.9 * momentum)
    torch.testing.assert_close(values(model), present, rtol=1e-5, atol=1e-5)


def plain_from(start: Any, numbers: range) -> Any:
    model = network()
    torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
    return plain(model, numbers)


# --- several workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_workers_meet_at_the_mean_of_their_models(server: str, weights: list[float] | None) -> None:
    way = stepwire.Aggregation(workers=2, reduction="mean" if weights is None else "weighted_mean")
    job = uuid.uuid4().hex

    def work(worker: int) -> tuple[Any, Any]:
        model = network(worker)
        with local(model, server, every=None, outer=PLAIN, worker=worker, aggregation=way, job=job) as outer:
            first = values(model)
            outer.weight = None if weights is None else weights[worker]
            for number in range(3):
                inner_step(model, 10 * worker + number)
                outer.step()
            outer.synchronize()
        return first, values(model)

    (first, one), (second, other) = together(*(functools.partial(work, worker) for worker in range(2)))
    assert torch.equal(first, second)
    assert torch.equal(one, other)
    ends = [plain_from(first, range(10 * worker, 10 * worker + 3)) for worker in range(2)]
    shares = [0.5, 0.5] if weights is None else [0.25, 0.75]
    torch.testing.assert_close(one, shares[0] * ends[0] + shares[1] * ends[1], rtol=1e-6, atol=1e-6)


def test_a_worker_that_comes_back_has_the_outer_parameters(server: str) -> None:
    way, job = stepwire.Aggregation(workers=2, mode="async"), uuid.uuid4().hex
    options: dict[str, Any] = {"outer": PLAIN, "aggregation": way, "job": job}
    one, other = network(0), network(1)
    with local(one, server, worker=0, **options) as outer, local(other, server, worker=1, **options) as killed:
        saved = killed.state_dict()
        for number in range(2):
            inner_step(one, number)
            outer.step()
        inner_step(other, 7)
        killed.step()
        fresh = network(2)
        with local(fresh, server, worker=1, lr=0.5, **options) as again:
            assert torch.equal(values(fresh), values(one))
            again.load_state_dict(saved)  # the inner state alone: nobody is taken back
            assert again.inner_optimizer.param_groups[0]["lr"] == 0.1
            assert torch.equal(values(fresh), values(one))
            for number in range(2):
                inner_step(fresh, number)
                again.step()
            assert again.applied_step == 2
            inner_step(other, 8)
            with pytest.raises(stepwire.FencedError):
                killed.step()
            killed.pull()


# --- overlap --------------------------------------------------------------------------------------------


def test_an_outer_step_beside_inner_ones_comes_as_a_change(server: str) -> None:
    """By the formula of the page: outer + (present − sent)."""
    model, start = network(), values(network())
    with local(model, server, every=4, overlap=True, delay=3, outer=stepwire.SGD(lr=0.5)) as outer:
        for number in range(6):
            inner_step(model, number)
            outer.step()
        sent = plain(network(), range(4))
        torch.testing.assert_close(values(model), plain(network(), range(6)), rtol=1e-6, atol=1e-6)
        inner_step(model, 6)
        outer.step()
        expected = start + 0.5 * (sent - start) + (plain(network(), range(7)) - sent)
        torch.testing.assert_close(values(model), expected, rtol=1e-6, atol=1e-6)
        inner_step(model, 7)
        outer.step()
        assert outer.inner_steps == 0
    assert outer.applied_step == 2  # the end waits for the second


def test_a_result_that_arrives_is_applied_with_the_next_inner_step(server: str) -> None:
    model = network()
    with local(model, server, every=2, overlap=True, outer=PLAIN) as outer:
        for number in range(8):
            inner_step(model, number)
            outer.step()
    assert outer.applied_step == 4
    torch.testing.assert_close(values(model), plain(network(), range(8)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_workers_with_a_delay_have_the_same_bits_every_time(server: str, dtype: str) -> None:
    def train(job: str, worker: int) -> Any:
        model = network()
        options = {"worker": worker, "workers": 2, "job": job, "gradient_dtype": dtype}
        with local(model, server, every=3, overlap=True, delay=2, **options) as outer:
            for number in range(9):
                inner_step(model, 10 * worker + number)
                outer.step()
        return values(model)

    runs = []
    for _ in range(2):
        job = uuid.uuid4().hex
        runs.append(together(*(functools.partial(train, job, worker) for worker in range(2))))
    assert torch.equal(runs[0][0], runs[0][1])  # the end waits for the last outer step
    assert [torch.equal(one, other) for one, other in zip(*runs, strict=True)] == [True, True]


# --- encodings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_error_of_an_encoding_goes_with_the_next_pseudo_gradient(server: str, dtype: str) -> None:
    """After many outer steps the sum of what was sent is the way that was gone, but for one error."""
    model = network()
    with local(model, server, every=1, lr=0.01, outer=PLAIN, gradient_dtype=dtype) as outer:
        for number in range(30):
            inner_step(model, number)
            outer.step()
    drift = (values(model) - plain(network(), range(30), lr=0.01)).abs().max()
    one_error = 0.05 * (2**-8 if dtype == "bfloat16" else 1 / 127)
    assert drift < 2 * one_error


def test_a_model_in_bfloat16_stands_still_without_inner_steps(server: str) -> None:
    model = network(dtype=torch.bfloat16)
    with local(model, server, every=None, outer=stepwire.SGD(lr=0.3)) as outer:
        inner_step(model, 0)
        outer.step()
        outer.synchronize()
        before = values(model)
        for number in range(3):
            outer.stepped()
            outer.synchronize()
            assert torch.equal(values(model), before), number


# --- failures -------------------------------------------------------------------------------------------


def test_an_outer_step_that_failed_is_sent_again_as_it_was(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session tells by the same gradients that it is the same step, and applies it once."""
    model = network()
    with local(model, server, every=2, outer=PLAIN) as outer:
        real, given, weights = outer.session.step, [], []

        def step(gradients: Any, **options: Any) -> Any:
            given.append({name: values.copy() for name, values in gradients.items()})
            weights.append(options["weight"])
            outer.weight = 7.0  # for the outer steps that begin from now on
            if len(given) < 3:
                raise stepwire.UnavailableError("nobody is there")
            return real(gradients, **options | {"weight": None})

        monkeypatch.setattr(outer.session, "step", step)
        inner_step(model, 0)
        outer.step()
        for number in (1, 2):
            inner_step(model, number)
            with pytest.raises(stepwire.UnavailableError):
                outer.step()
        inner_step(model, 3)
        outer.step()  # the third time, and then the outer step that is due
        assert outer.applied_step == 2
    assert weights == [None, None, None, 7.0]
    for again in given[1:3]:
        assert all(again[name].tobytes() == given[0][name].tobytes() for name in again)
    torch.testing.assert_close(values(model), plain(network(), range(4)), rtol=4 * EPS, atol=8 * EPS)


def test_nan_is_refused_and_the_model_goes_back(server: str) -> None:
    model = network()
    with local(model, server, every=1) as outer:
        start = values(model)
        inner_step(model, 0)
        next(model.parameters()).grad.fill_(float("nan"))
        with pytest.raises(stepwire.NonFiniteGradientError, match=r"0\.weight"):
            outer.step()
        outer.pull()
        assert torch.equal(values(model), start)
        inner_step(model, 0)
        outer.step()
        assert outer.applied_step == 1


def test_too_few_workers_leave_the_outer_step_to_be_repeated(server: str) -> None:
    way, job = stepwire.Aggregation(workers=2, round_timeout=0.05), uuid.uuid4().hex
    model = network()
    with local(model, server, every=1, worker=0, aggregation=way, job=job, outer=PLAIN) as outer:
        inner_step(model, 0)
        with pytest.raises(stepwire.NotEnoughWorkersError, match="missing: 1"):
            outer.step()
        other = network()
        with local(other, server, every=1, worker=1, aggregation=way, job=job, outer=PLAIN) as late:
            inner_step(other, 0)
            late.inner_optimizer.step()
            meeting = (outer.synchronize, outer.synchronize), (late.stepped, late.synchronize)
            together(*(functools.partial(_until_all_are_there, *calls) for calls in meeting))
        assert torch.equal(values(model), values(other))
        assert outer.applied_step == 1


def _until_all_are_there(first: Callable[[], object], again: Callable[[], object]) -> None:
    """Take an outer step, and try it again until the other worker is in time."""
    for call in (first, *[again] * 1000):
        try:
            call()
        except stepwire.NotEnoughWorkersError:
            continue
        return


# --- state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_last", [False, True])
def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(server: str, model_last: bool) -> None:
    straight = network()
    with local(straight, server, every=3) as outer:
        for number in range(8):
            inner_step(straight, number)
            outer.step()
            if number == 3:
                saved = copy.deepcopy((straight.state_dict(), outer.state_dict()))
    model = network(5)
    with local(model, server, every=3) as outer:
        if not model_last:
            model.load_state_dict(saved[0])
        outer.load_state_dict(saved[1])
        if model_last:
            model.load_state_dict(saved[0])
        assert (outer.applied_step, outer.inner_steps) == (1, 1)
        for number in range(4, 8):
            inner_step(model, number)
            outer.step()
    assert torch.equal(values(model), values(straight))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"every": 0}, "every: 0 is not a positive"),
        ({"every": 1, "delay": 1}, "delay: it is for overlap=True"),
        ({"every": 1, "shared_views": True}, "shared_views: not with LocalSGD"),
        ({"every": 1, "worker": 0, "workers": 2}, "job: it is missing"),
    ],
)
def test_wrong_options_are_refused_by_name(server: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(stepwire.StepwireError, match=problem):
        local(network(), server, **options)


def test_a_closed_one_says_so(server: str) -> None:
    model = network()
    outer = local(model, server)
    outer.close()
    outer.close()
    with pytest.raises(stepwire.InvalidRequestError, match="it is closed"):
        outer.synchronize()
