"""What a step may ask of its answer: none, only what changed, some tensors first; and steps in the background."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from stepwire_server.sessions.session import Session as ServedSession
from tests.integration.training import OVERLAPPED, PATCHED, WIDE, bits
from tests.support.numpy_server import numpy_server


def test_no_answer_leaves_the_parameters_to_a_pull(client: stepwire.Client) -> None:
    with WIDE.create(client) as one, WIDE.create(client) as other:
        for step in range(1, 4):
            assert one.step(WIDE.gradient(step), reply="none") == {}
            expected = other.step(WIDE.gradient(step))
        assert one.applied_step == 3
        assert bits(one.pull(dtype="bfloat16")) == bits(expected)


@pytest.mark.parametrize("lr", [1e-2, 1e-6])
def test_patches_are_the_parameters_bit_for_bit(client: stepwire.Client, lr: float) -> None:
    with PATCHED.create(client) as one, PATCHED.create(client) as other:
        for step in range(1, 6):
            gradient = PATCHED.gradient(step)
            if step == 4:  # what is held is out of date, and the session knows
                one.load(PATCHED.gradient(0))
                other.load(PATCHED.gradient(0))
            assert bits(one.step(gradient, lr=lr, reply="changed")) == bits(other.step(gradient, lr=lr))


def test_steps_without_patches_between_are_noticed(client: stepwire.Client) -> None:
    with PATCHED.create(client) as one, PATCHED.create(client) as other:
        for step, reply in enumerate(["changed", "parameters", "changed", "none", "changed"], start=1):
            answer = one.step(PATCHED.gradient(step), reply=reply)
            expected = other.step(PATCHED.gradient(step))
            assert reply == "none" or bits(answer) == bits(expected)


def test_a_skipped_step_changes_nothing_and_sends_nothing(client: stepwire.Client) -> None:
    with PATCHED.create(client, non_finite="skip") as session:
        before = session.step(PATCHED.gradient(1), reply="changed")
        bad = PATCHED.gradient(2)
        bad["b"][3] = np.inf
        assert bits(session.step(bad, reply="changed")) == bits(before)
        assert session.last_result is not None
        assert session.last_result.skipped


def test_tensors_arrive_in_the_order_that_was_asked_for(client: stepwire.Client) -> None:
    names, seen = list(WIDE.shapes), dict[str, Any]()
    with WIDE.create(client) as session, WIDE.create(client) as other:
        for first in (["b", "w"], ["w"], []):
            seen.clear()
            gradient = WIDE.gradient(session.applied_step + 1)
            answer = session.step(
                gradient, reply_first=first, on_tensor=lambda name, values: seen.update({name: values.copy()})
            )
            assert list(seen) == [*first, *(name for name in names if name not in first)]
            assert bits(seen) == bits({name: answer[name] for name in seen})
            assert bits(answer) == bits(other.step(gradient))


def test_with_overlap_what_is_wanted_first_is_sent_first(client: stepwire.Client) -> None:
    seen: list[str] = []
    with OVERLAPPED.create(client) as session, OVERLAPPED.create(client) as other:
        gradient = OVERLAPPED.gradient(1)
        answer = session.step(
            gradient, overlap=True, reply_first=["w"], on_tensor=lambda name, values: seen.append(name)
        )
        assert seen.index("w") < seen.index("embedding")
        assert bits(answer) == bits(other.step(gradient))


def test_a_list_is_told_by_position(client: stepwire.Client) -> None:
    arrays = [np.ones((4, 5), np.float32), np.ones(3, np.float32)]
    seen: dict[str, Any] = {}
    with client.create_session(arrays) as session:
        answer = session.step(arrays, reply_first=["1"], on_tensor=seen.__setitem__)
    assert {name: values is answer[int(name)] for name, values in seen.items()} == {"0": True, "1": True}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reply": "all"}, "reply: 'all'; use one of: parameters, none, changed"),
        ({"reply": "changed", "reply_dtype": "float32"}, "reply: 'changed' is for bfloat16 replies"),
        ({"reply": "none", "out": {}}, "out: nothing is written to it"),
        ({"reply": "none", "on_tensor": print}, "on_tensor: tensors do not arrive one by one with reply='none'"),
        ({"reply_first": ["x"]}, "reply_first: 'x' is not a tensor of this session"),
        ({"overlap": True}, "begin.overlap: chunks cannot be applied as they arrive: the policy 'reject'"),
    ],
)
def test_what_does_not_go_together_is_refused(client: stepwire.Client, options: Any, text: str) -> None:
    with WIDE.create(client) as session:
        with pytest.raises(stepwire.InvalidRequestError) as refused:
            session.step(WIDE.gradient(1), **options)
        assert str(refused.value).startswith(text)
        assert session.step(WIDE.gradient(1))["b"].shape == WIDE.shapes["b"]


def test_steps_in_the_background_are_the_steps_in_order(client: stepwire.Client) -> None:
    with WIDE.create(client) as one, WIDE.create(client) as other:
        futures = [one.step_async(WIDE.gradient(step), steps_in_flight=3) for step in range(1, 6)]
        for step, future in enumerate(futures, start=1):
            assert bits(future.result(120.0)) == bits(other.step(WIDE.gradient(step)))
        assert one.applied_step == 5


def test_what_waits_behind_a_failed_step_is_cancelled(server: Server, client: stepwire.Client) -> None:
    with WIDE.create(client) as session:
        bad, entered, go_on = WIDE.gradient(1), threading.Event(), threading.Event()
        bad["b"][0] = np.nan

        def hold(name: str, values: Any) -> None:
            entered.set()
            assert go_on.wait(120.0)

        first = session.step_async(WIDE.gradient(1), steps_in_flight=3, on_tensor=hold)
        failing = session.step_async(bad)
        behind = session.step_async(WIDE.gradient(3))
        assert entered.wait(120.0)
        go_on.set()
        assert set(first.result(120.0)) == set(WIDE.shapes)
        with pytest.raises(stepwire.NonFiniteGradientError, match="'b'"):
            failing.result(120.0)
        with pytest.raises(CancelledError):
            behind.result(120.0)
        assert session.applied_step == 1
        assert set(session.step_async(WIDE.gradient(2)).result(120.0)) == set(WIDE.shapes)


def test_an_option_that_steps_do_not_have_is_refused_at_once(client: stepwire.Client) -> None:
    with WIDE.create(client) as session:
        with pytest.raises(TypeError, match="momentum"):
            session.step_async(WIDE.gradient(1), momentum=0.9)
        with pytest.raises(stepwire.InvalidRequestError, match="steps_in_flight: 0 is not a positive integer"):
            session.step_async(WIDE.gradient(1), steps_in_flight=0)


def test_a_closed_session_says_so_in_the_future_too(client: stepwire.Client) -> None:
    session = WIDE.create(client)
    session.step_async(WIDE.gradient(1)).result(120.0)
    session.close()
    with pytest.raises(stepwire.SessionNotFoundError):
        session.step_async(WIDE.gradient(2)).result(120.0)
    session.close()


def test_the_commit_of_one_session_keeps_no_thread_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both replies are large, so that their commits run in threads; as many as processors would be one here."""
    commit, held, go = ServedSession.commit, threading.Event(), threading.Event()

    def commit_late(session: ServedSession, *rest: Any) -> Any:
        if session.config.label == "slow":
            held.set()
            go.wait()
        return commit(session, *rest)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(ServedSession, "commit", commit_late)
    ones = {"w": np.ones(100_000, np.float32)}
    with numpy_server() as server, stepwire.connect(server.target, transport="tcp", timeout=100.0) as client:
        slow, quick = (client.create_session(ones, label=label) for label in ("slow", "quick"))
        with ThreadPoolExecutor(1) as threads:
            step = threads.submit(slow.step, ones)
            held.wait()
            try:
                quick.step(ones)
            finally:
                go.set()
            step.result()
        assert (slow.applied_step, quick.applied_step) == (1, 1)
