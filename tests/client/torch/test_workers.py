"""Several workers of one model: the bits of one worker that is fed the exact mean, whatever happens to one of them."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire_server.testing import serving
from tests.client.torch.twins import assert_same_bits
from tests.integration.workers.together import together

SHAPES = ((33, 17), (129,), ())
WORKERS = 3


def model(seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(worker: int, step: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def mean(parts: Sequence[Any]) -> Any:
    """Return the mean, exact in float64 here, rounded once."""
    total = sum(part.to(torch.float64) for part in parts)
    return (total / len(parts)).to(torch.float32)


def advance(optimizer: Any, params: list[Any], grads: Sequence[Any]) -> None:
    for parameter, gradient in zip(params, grads, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    optimizer.step()


class Job:
    """Workers of one model, each with an optimizer of its own, and the one that they must be equal to."""

    def __init__(self, target: str, name: str = "AdamW", **options: Any) -> None:
        self.target, self.name = target, name
        self.options = {"lr": 0.1, "workers": WORKERS, "job": uuid.uuid4().hex} | options

    def made(self, worker: int, params: list[Any], **options: Any) -> Any:
        return getattr(stepwire.torch, self.name)(params, server=self.target, worker=worker, **self.options | options)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        return together(*(functools.partial(work, worker) for worker in range(WORKERS)))

    def alone(self, params: list[Any], steps: int, start: int = 0) -> list[Any]:
        own = {key: value for key, value in self.options.items() if key not in ("workers", "job", "aggregation")}
        with getattr(stepwire.torch, self.name)(params, server=self.target, **own) as optimizer:
            for step in range(start, start + steps):
                each = [gradients(worker, step) for worker in range(WORKERS)]
                advance(optimizer, params, [mean(parts) for parts in zip(*each, strict=True)])
        return params


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as running:
        params, job = model(0), Job(running, workers=1)
        with job.made(0, params) as optimizer:  # compiles kernels while nobody waits
            advance(optimizer, params, gradients(0, 0))
        yield running


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("Adagrad", {"clip_grad_norm": 1.0}),
        ("Lion", {"transport": "tcp"}),
    ],
)
def test_workers_are_one_worker_on_the_exact_mean(server: str, name: str, options: dict[str, Any]) -> None:
    job = Job(server, name, **options)

    def work(worker: int) -> tuple[list[Any], list[Any]]:
        params = model(worker)  # each with another initialisation
        with job.made(worker, params) as optimizer:
            first = [parameter.detach().clone() for parameter in params]
            for step in range(3):
                advance(optimizer, params, gradients(worker, step))
            assert (optimizer.applied_step, optimizer.session.worker) == (3, worker)
        return first, params

    found = job.run(work)
    assert any(
        all(torch.equal(one, other) for one, other in zip(found[0][0], model(worker), strict=True))
        for worker in range(WORKERS)
    )
    expected = job.alone([Parameter(values.clone()) for values in found[0][0]], 3)
    for first, params in found:
        assert_same_bits(first, found[0][0])
        assert_same_bits(params, expected)
    with stepwire.connect(server) as client:  # the last that left has ended the session
        assert list(client.sessions()) == []


def test_a_model_in_bfloat16_shows_the_masters_of_all(server: str) -> None:
    job = Job(server)

    def work(worker: int) -> list[Any]:
        params = model(worker, torch.bfloat16)
        with job.made(worker, params) as optimizer:
            for step in range(3):
                advance(optimizer, params, gradients(worker, step, torch.bfloat16))
        return params

    found = job.run(work)
    for params in found[1:]:
        assert_same_bits(params, found[0])


def test_a_missing_gradient_counts_as_zeros_unless_all_lack_it(server: str) -> None:
    job = Job(server)

    def work(worker: int) -> list[Any]:
        params = model(0)
        with job.made(worker, params) as optimizer:
            every = gradients(worker, 0)
            advance(optimizer, params, [[None, every[1], None], [every[0], None, None], [None] * 3][worker])
        return params

    found, expected = job.run(work), model(0)
    zeros = [torch.zeros(shape) for shape in SHAPES]
    with stepwire.torch.AdamW(expected, lr=0.1, server=server) as optimizer:
        first = mean([zeros[0], gradients(1, 0)[0], zeros[0]])
        advance(optimizer, expected, [first, mean([gradients(0, 0)[1], zeros[1], zeros[1]]), None])
    for params in found:
        assert_same_bits(params, expected)


def test_a_worker_that_comes_back_goes_on_and_its_old_self_is_fenced(server: str) -> None:
    job, old, start = Job(server), [], model(0)

    def work(worker: int) -> list[Any]:
        params = model(0)
        optimizer = job.made(worker, params)
        for step in range(4):
            if worker == 1 and step == 2:
                old.append((optimizer, params))
                params = model(7)  # a new process, which has nothing
                optimizer = job.made(worker, params)
                assert optimizer.applied_step == 2
            advance(optimizer, params, gradients(worker, step))
        if worker == 1:
            with pytest.raises(stepwire.FencedError, match="another process has joined as this worker"):
                advance(*old[0], gradients(1, 4))
        optimizer.close()
        return params

    expected = job.alone(start, 4)
    for params in job.run(work):
        assert_same_bits(params, expected)


def test_nan_is_the_error_of_its_worker_alone(server: str) -> None:
    job = Job(server)

    def work(worker: int) -> list[Any]:
        params = model(0)
        with job.made(worker, params) as optimizer:
            grads = gradients(worker, 0)
            if worker == 2:
                bad = [*grads[:1], grads[1] * float("nan"), *grads[2:]]
                with pytest.raises(stepwire.NonFiniteGradientError, match=r"param_groups\[0\]\[1\]"):
                    advance(optimizer, params, bad)
            advance(optimizer, params, grads)
            assert optimizer.applied_step == 1
        return params

    expected = job.alone(model(0), 1)
    for params in job.run(work):
        assert_same_bits(params, expected)


def test_a_skipped_round_tells_every_worker_whose_gradient_was_not_finite(server: str) -> None:
    job = Job(server, non_finite="skip")

    def work(worker: int) -> list[int]:
        params = model(0)
        with job.made(worker, params) as optimizer:
            grads = gradients(worker, 0)
            advance(optimizer, params, [grads[0], grads[1] * (float("nan") if worker == 2 else 1.0), grads[2]])
            assert optimizer.last_result.skipped
            assert_same_bits(params, model(0))
            return [each.non_finite_count for each in optimizer.last_result.round.contributors]

    assert job.run(work) == [[0, 0, 129]] * WORKERS


def test_a_dropped_worker_has_the_present_parameters(server: str) -> None:
    way = stepwire.Aggregation(workers=2, required_workers=1, least_grace=0.0, most_grace=0.0)
    job = Job(server, workers=None, aggregation=way)
    mine, late = model(0), model(1)
    with job.made(0, mine) as first, job.made(1, late) as second:
        advance(first, mine, gradients(0, 0))
        advance(second, late, gradients(1, 0))
        assert (second.last_result.round.dropped, second.applied_step) == (True, 1)
        assert_same_bits(late, mine)


def test_too_few_workers_change_no_model_and_the_same_step_is_tried_again(server: str) -> None:
    way = stepwire.Aggregation(workers=2, round_timeout=0.05)
    job = Job(server, "SGD", workers=None, aggregation=way, lr=1.0)
    mine, other = model(0), model(0)
    with job.made(0, mine) as first, job.made(1, other) as second:
        with pytest.raises(stepwire.NotEnoughWorkersError, match="missing: 1"):
            advance(first, mine, gradients(0, 0))
        assert_same_bits(mine, model(0))
        slow = (
            functools.partial(_until_all_are_there, first, mine),
            functools.partial(_until_all_are_there, second, other),
        )
        together(*slow)
        assert (first.applied_step, second.applied_step) == (1, 1)
        assert_same_bits(mine, other)


def _until_all_are_there(optimizer: Any, params: list[Any]) -> None:
    """Step, and try the same step again until the other worker is in time."""
    for _ in range(1000):
        try:
            advance(optimizer, params, gradients(0, 0))
        except stepwire.NotEnoughWorkersError:
            continue
        return


def test_any_process_is_some_worker(server: str) -> None:
    job = Job(server)

    def work(_: int) -> int:
        params = model(0)
        with job.made("any", params) as optimizer:  # type: ignore[arg-type]
            advance(optimizer, params, gradients(optimizer.session.worker, 0))
            return int(optimizer.session.worker)

    assert sorted(job.run(work)) == list(range(WORKERS))


def test_weights_are_those_of_the_optimizers(server: str) -> None:
    weights = [1.0, 24.0, 7.0]
    way = stepwire.Aggregation(workers=WORKERS, reduction="weighted_mean")
    job = Job(server, "SGD", workers=None, aggregation=way, lr=1.0)

    def work(worker: int) -> Any:
        params = model(0)
        with job.made(worker, params) as optimizer:
            optimizer.weight = weights[worker]
            advance(optimizer, params, gradients(worker, 0))
            assert [each.weight for each in optimizer.last_result.round.contributors] == weights
        return params[0].detach()

    total = sum(gradients(worker, 0)[0].double() * weight for worker, weight in enumerate(weights))
    expected = model(0)[0].detach() - (total / sum(weights)).float()
    assert [torch.equal(found, expected) for found in job.run(work)] == [True] * WORKERS


# --- loads ----------------------------------------------------------------------------------------------


def test_all_workers_load_one_checkpoint_and_the_first_load_counts(server: str) -> None:
    """Before the first step and later, the model's state dict before the optimizer's or after it."""
    whole = Job(server)
    start = model(0)
    own = {"lr": 0.1, "server": server}
    with stepwire.torch.AdamW(start, **own) as optimizer:  # type: ignore[arg-type]
        for step in range(2):
            advance(optimizer, start, gradients(0, step))
        saved = optimizer.state_dict()
    values = [parameter.detach().clone() for parameter in start]

    def restore(optimizer: Any, params: list[Any], *, last: bool) -> None:
        if last:
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for parameter, value in zip(params, values, strict=True):
                parameter.copy_(value)
        if not last:
            optimizer.load_state_dict(saved)

    def work(worker: int) -> list[Any]:
        params = model(worker)
        with whole.made(worker, params) as optimizer:
            for last in (True, False):
                restore(optimizer, params, last=last)
                for step in range(2, 4):
                    advance(optimizer, params, gradients(worker, step))
        return params

    expected = [Parameter(value.clone()) for value in values]
    with stepwire.torch.AdamW(expected, **own) as optimizer:  # type: ignore[arg-type]
        optimizer.load_state_dict(saved)
        for step in range(2, 4):
            each = [gradients(worker, step) for worker in range(WORKERS)]
            advance(optimizer, expected, [mean(parts) for parts in zip(*each, strict=True)])
    for params in whole.run(work):
        assert_same_bits(params, expected)


def test_a_clamp_in_all_workers_is_one_load(server: str) -> None:
    job = Job(server)

    def train(optimizer: Any, params: list[Any], grads: Callable[[int], list[Any]]) -> list[Any]:
        for step in range(3):
            advance(optimizer, params, grads(step))
            with torch.no_grad():
                for parameter in params:
                    parameter.clamp_(-0.5, 0.5)
        return params

    def work(worker: int) -> list[Any]:
        params = model(0)
        with job.made(worker, params) as optimizer:
            return train(optimizer, params, functools.partial(gradients, worker))

    def exact(step: int) -> list[Any]:
        each = [gradients(worker, step) for worker in range(WORKERS)]
        return [mean(parts) for parts in zip(*each, strict=True)]

    expected = model(0)
    with stepwire.torch.AdamW(expected, lr=0.1, server=server) as optimizer:
        train(optimizer, expected, exact)
    for params in job.run(work):
        assert_same_bits(params, expected)


def test_a_worker_that_joins_late_takes_nobody_back(server: str) -> None:
    way = stepwire.Aggregation(workers=2, mode="async")
    job = Job(server, workers=None, aggregation=way)
    mine, fresh = model(0), model(1)
    with job.made(0, mine) as first:
        saved = first.state_dict()
        advance(first, mine, gradients(0, 0))
        with job.made(1, fresh) as second:
            assert_same_bits(fresh, mine)
            with pytest.raises(stepwire.InvalidRequestError, match="has just joined it"):
                second.load_state_dict(saved)
            with torch.no_grad():
                fresh[0].zero_()
            with pytest.raises(stepwire.InvalidRequestError, match=r"only where optimizer\.applied_step is 0"):
                advance(second, fresh, gradients(1, 0))
            assert_same_bits(fresh, mine)
            fresh[1].data = fresh[1].data.clone()  # elsewhere, with the same values
            advance(second, fresh, gradients(1, 0))
            assert second.applied_step == 2


def test_a_load_of_one_worker_reaches_the_others_with_an_error(server: str) -> None:
    way = stepwire.Aggregation(workers=2, mode="async")
    job = Job(server, "SGD", workers=None, aggregation=way, lr=1.0)
    mine, other = model(0), model(0)
    with job.made(0, mine) as first, job.made(1, other) as second:
        advance(first, mine, gradients(0, 0))
        advance(second, other, gradients(1, 0))
        with torch.no_grad():
            mine[0].zero_()
        advance(first, mine, gradients(0, 1))
        with pytest.raises(stepwire.StepwireError, match="pull the parameters"):
            advance(second, other, gradients(1, 1))
        assert_same_bits(other, mine)
        advance(second, other, gradients(1, 2))
        assert second.applied_step == 4


def test_a_lost_session_becomes_one_session_again(server: str) -> None:
    job = Job(server)
    kept: dict[int, Any] = {}

    def begin(worker: int) -> None:
        params = model(0)
        optimizer = job.made(worker, params)
        advance(optimizer, params, gradients(worker, 0))
        kept[worker] = optimizer, params, optimizer.state_dict(), [p.detach().clone() for p in params]

    def go_on(worker: int) -> tuple[str, list[Any]]:
        optimizer, params, saved, values = kept[worker]
        with pytest.raises(stepwire.SessionNotFoundError):
            advance(optimizer, params, gradients(worker, 1))
        with torch.no_grad():
            for parameter, value in zip(params, values, strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved)
        advance(optimizer, params, gradients(worker, 1))
        return optimizer.session_id, params

    job.run(begin)
    kept[0][0].session.close()  # as if its server had lost it
    found = job.run(go_on)
    assert len({session_id for session_id, _ in found}) == 1
    expected = job.alone(model(0), 2)
    for _, params in found:
        assert_same_bits(params, expected)
    for optimizer, *_ in kept.values():
        optimizer.close()


def test_workers_go_on_over_a_restart_of_a_server_with_a_journal(tmp_path: Any) -> None:
    """The second step waits for a server, and is one round of all like any other."""
    job = Job("", durability="journal", timeout=200.0)
    kept: dict[int, Any] = {}

    def begin(worker: int) -> None:
        params = model(0)
        kept[worker] = job.made(worker, params), params
        advance(*kept[worker], gradients(worker, 0))

    def go_on(worker: int) -> list[Any]:
        optimizer, params = kept[worker]
        advance(optimizer, params, gradients(worker, 1))
        assert optimizer.applied_step == 2
        return params

    with serving(data_dir=str(tmp_path)) as target:
        job.target = target
        job.run(begin)
    with serving(data_dir=str(tmp_path), bind=target):
        found = job.run(go_on)
        for optimizer, _ in kept.values():
            optimizer.close()
        expected = job.alone(model(0), 2)
    for params in found:
        assert_same_bits(params, expected)


# --- sessions -------------------------------------------------------------------------------------------


def test_workers_resume_a_session_by_its_id(server: str) -> None:
    job = Job(server)

    def work(worker: int) -> Any:
        params = model(0)
        optimizer = job.made(worker, params)
        advance(optimizer, params, gradients(worker, 0))
        optimizer.detach()
        return optimizer.session_id

    (session_id,) = set(job.run(work))

    def go_on(worker: int) -> list[Any]:
        params = model(worker)
        with stepwire.torch.AdamW(params, lr=0.1, server=server, session=session_id, worker=worker) as optimizer:
            advance(optimizer, params, gradients(worker, 1))
        return params

    with pytest.raises(stepwire.InvalidRequestError, match="give worker="):
        stepwire.torch.AdamW(model(0), lr=0.1, server=server, session=session_id)
    with pytest.raises(stepwire.InvalidRequestError, match="workers=5"):
        stepwire.torch.AdamW(model(0), lr=0.1, server=server, session=session_id, worker=0, workers=5)
    expected = job.alone(model(0), 2)
    for params in job.run(go_on):
        assert_same_bits(params, expected)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"worker": 0, "workers": 2}, "job: it is missing"),
        ({"workers": 2, "job": "a"}, "worker: it is missing"),
        ({"worker": 0}, "worker: it is for several workers"),
        ({"job": "a"}, "job: it is for several workers"),
        (
            {"worker": 0, "workers": 2, "job": "a", "aggregation": stepwire.Aggregation(workers=2)},
            "workers: it is beside",
        ),
        ({"worker": 2, "workers": 2, "job": "b"}, "workers 0 to 1"),
        ({"worker": 0, "workers": 2, "job": "my job"}, "job: 'my job' is not 1 to 64 characters"),
        ({"worker": 0, "workers": 2, "job": "a", "shared_views": True}, "shared_views: not with several workers"),
        ({"worker": 0, "workers": 2, "job": "a", "send_in_backward": True}, "send_in_backward: not with several"),
        ({"worker": 0, "workers": 2, "job": "a", "light_state_dict": True}, "light_state_dict: not with several"),
    ],
)
def test_options_that_contradict_are_refused_by_name(server: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(stepwire.StepwireError, match=problem):
        stepwire.torch.Adam(model(0), server=server, **options)


def test_uses_that_would_leave_the_others_behind_are_refused(server: str) -> None:
    job, params = Job(server, workers=1), model(0)
    with job.made(0, params) as optimizer:
        advance(optimizer, params, gradients(0, 0))
        with pytest.raises(stepwire.UnsupportedFeatureError, match="add_param_group: not with several workers"):
            optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        assert len(optimizer.param_groups) == 1
        with pytest.raises(stepwire.UnsupportedFeatureError, match="handle: not with several workers"):
            optimizer.handle()
        last = optimizer.param_groups[0]["params"].pop()
        with pytest.raises(stepwire.UnsupportedFeatureError, match="param_groups: not with several workers"):
            optimizer.step()
        optimizer.param_groups[0]["params"].append(last)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(params[1].sum()).backward()
        with pytest.raises(stepwire.UnsupportedFeatureError, match="GradScaler: not with several workers"):
            scaler.step(optimizer)


def test_a_job_of_another_model_is_refused_by_its_name(server: str) -> None:
    job = Job(server, workers=1)
    with (
        job.made(0, model(0)),
        pytest.raises(stepwire.InvalidRequestError, match="job: .* is the name of a session with another config"),
    ):
        job.made(0, model(0)[:2])


def test_shards_have_the_workers_too(server: str) -> None:
    with serving() as other:
        job = Job(server, clip_grad_norm=0.5)
        job.target = [server, other]  # type: ignore[assignment]

        def work(worker: int) -> list[Any]:
            params = model(worker)
            with job.made(worker, params) as optimizer:
                first = [parameter.detach().clone() for parameter in params]
                for step in range(2):
                    advance(optimizer, params, gradients(worker, step))
            return [first, params]

        found = job.run(work)
        expected = job.alone([Parameter(values.clone()) for values in found[0][0]], 2)
        for _, params in found:
            assert_same_bits(params, expected)
