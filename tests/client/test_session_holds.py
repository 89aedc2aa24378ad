"""The holder of a session: taking over, coming back, closing, and threads that take turns."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import stepwire
from tests.support.drawn_arrays import bits, draw


def test_another_client_takes_over_only_on_purpose(client: stepwire.Client, target: str) -> None:
    with client.create_session(draw(0)) as first, stepwire.connect(target) as elsewhere:
        first.step(draw(1))
        second = elsewhere.session(first.session_id)
        second.step(draw(2))
        with pytest.raises(stepwire.FencedError):
            first.step(draw(3))
        with pytest.raises(stepwire.FencedError):
            first.attach()
        first.attach(take_over=True)
        assert first.applied_step == 2
        first.step(draw(3))
        with pytest.raises(stepwire.FencedError):
            second.step(draw(4))
        assert first.info().applied_step == 3


def test_a_detached_client_comes_back_with_its_token(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session, client.create_session(draw(0)) as other:
        for seed in (1, 2, 3):
            assert bits(session.step(draw(seed))) == bits(other.step(draw(seed)))
            session.detach()
            session.detach()
        session.attach()
        session.attach(transport="tcp")
        assert session.info().attached


@pytest.mark.parametrize("transport", ["", "carrier pigeon"])
def test_what_is_no_transport_is_refused_by_name(client: stepwire.Client, transport: str) -> None:
    with client.create_session(draw(0)) as session:
        with pytest.raises(stepwire.InvalidRequestError, match=f"transport: {transport!r} is no transport") as refused:
            session.attach(transport=transport)
        assert refused.value.metadata == {"field": "transport"}


def test_a_session_tells_how_it_stands(client: stepwire.Client) -> None:
    with client.create_session(draw(0), label="mine") as session:
        info = session.info()
        assert (info.session_id, info.label, info.applied_step) == (session.session_id, "mine", 0)
        assert (info.ready, info.attached) == (True, False)
        session.step(draw(1))
        info = session.info()
        assert (info.applied_step, info.attached) == (1, True)


def test_a_block_ends_the_session_and_closing_twice_is_harmless(client: stepwire.Client) -> None:
    with client.create_session(draw(0)) as session:
        session.step(draw(1))
        session.step(draw(2))
    session.close()
    with pytest.raises(stepwire.SessionNotFoundError) as gone:
        session.step(draw(3))
    assert gone.value.metadata == {"session_id": session.session_id, "last_known_step": "2"}
    assert "knows to be applied is 2" in str(gone.value)
    with pytest.raises(stepwire.SessionNotFoundError):
        session.info()


def test_closing_after_the_client_is_harmless(target: str) -> None:
    with stepwire.connect(target) as client:
        session = client.create_session(draw(0), keep=True)
    session.close()
    with stepwire.connect(target) as client:
        client.session(session.session_id).close()


def test_threads_take_turns(client: stepwire.Client) -> None:
    """Every step is applied once, and none gets another's answer in part."""
    failures: list[BaseException] = []
    with client.create_session({"w": np.zeros(4, np.float32)}, optimizer=stepwire.Adam(lr=0.5)) as session:

        def work() -> None:
            try:
                for _ in range(20):
                    answer = session.step({"w": np.ones(4, np.float32)})
                    assert len(set(answer["w"].tolist())) == 1  # type: ignore[call-overload]
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert session.applied_step == session.info().applied_step == 60
