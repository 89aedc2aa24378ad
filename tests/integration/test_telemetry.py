"""`telemetry="none"`: the pass for a gradient's norm is left out where nothing needs it, and no bit changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.events import Clock
from tests.integration.training import bits, same_bits

SHAPES = {"w": (300, 200), "b": (7,)}


def parameters() -> dict[str, Any]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def gradient(step: int) -> dict[str, Any]:
    generator = np.random.default_rng((11, step))
    return {name: generator.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def sums(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the elements whose squares are summed."""
    from stepwire_server.engines.cpu.state import CpuState

    counted: list[int] = []
    summed = CpuState.sum_of_squares

    def counting(self: Any, chunk: Any, begin: int, end: int, *rest: Any) -> Any:
        counted.append(end - begin)
        return summed(self, chunk, begin, end, *rest)

    monkeypatch.setattr(CpuState, "sum_of_squares", counting)
    return counted


@pytest.mark.parametrize("step_options", [{}, {"overlap": True}], ids=["whole", "overlap"])
def test_no_norm_is_computed_and_no_bit_changes(client: Any, sums: list[int], step_options: dict[str, Any]) -> None:
    told = client.create_session(parameters(), non_finite="allow")
    silent = client.create_session(parameters(), non_finite="allow", telemetry="none")
    for step in range(1, 5):
        expected = told.step(gradient(step), **step_options)
        before = len(sums)
        assert bits(silent.step(gradient(step), **step_options)) == bits(expected)
        assert len(sums) == before
        result = silent.last_result
        assert (result.step, result.grad_norm, result.clip_coefficient, result.update_norm) == (step, 0.0, 1.0, None)
        assert told.last_result.grad_norm > 0.0
    assert same_bits(silent.state(), told.state())


def test_nan_is_applied_and_not_counted(client: Any) -> None:
    session = client.create_session(parameters(), non_finite="allow", telemetry="none")
    answer = session.step({**gradient(1), "b": np.full(7, np.nan, np.float32)})
    assert np.isnan(answer["b"]).all()
    assert np.isfinite(answer["w"]).all()
    assert (session.last_result.non_finite_count, session.last_result.skipped) == (0, False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"non_finite": "skip"},
        {"non_finite": "allow", "clip_grad_norm": 0.5},
        {"non_finite": "allow", "groups": [{"params": ["b"], "clip_grad_norm": 0.5}]},
        {"loss_scaling": stepwire.LossScaling(initial_scale=2.0)},
        {"non_finite": "allow", "accumulation_steps": 2},
    ],
    ids=["reject", "skip", "clipped", "a group clipped", "loss scaling", "accumulating"],
)
def test_what_needs_the_norm_has_it_all_the_same(client: Any, sums: list[int], options: dict[str, Any]) -> None:
    told = client.create_session(parameters(), **options)
    silent = client.create_session(parameters(), telemetry="none", **options)
    for step in range(1, 5):
        assert bits(silent.step(gradient(step))) == bits(told.step(gradient(step)))
        assert silent.last_result.grad_norm == told.last_result.grad_norm
    assert sum(sums) > 0
    assert same_bits(silent.state(), told.state())


def test_nan_is_refused_by_its_name_without_telemetry_too(client: Any) -> None:
    session = client.create_session(parameters(), telemetry="none")
    with pytest.raises(stepwire.NonFiniteGradientError, match="'b' holds NaN or Inf"):
        session.step({**gradient(1), "b": np.full(7, np.inf, np.float32)})


def test_a_session_that_is_found_again_tells_as_little(client: Any, server: Server) -> None:
    made = client.create_session(parameters(), non_finite="allow", telemetry="none")
    found = client.session(made.session_id)
    found.step(gradient(1))
    assert found.last_result.grad_norm == 0.0
    assert server.registry.get(made.session_id).config.tells_norms is False


class TestWaiting:
    """A server on a clock of the test's own."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    def test_the_wait_for_a_commit_thread_is_no_receiving(
        self, client: stepwire.Client, server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit = server._commit_threads.submit

        def submit_late(commit: Any) -> Any:
            clock.advance(3.0)  # all threads are busy with other sessions
            return submit(commit)

        monkeypatch.setattr(server._commit_threads, "submit", submit_late)
        session = client.create_session(parameters())
        session.step(gradient(1))
        assert session.last_result is not None
        times = session.last_result
        assert (times.receive_seconds, times.queue_seconds, times.apply_seconds) == (0.0, 3.0, 0.0)
