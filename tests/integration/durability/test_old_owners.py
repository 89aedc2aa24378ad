"""A server that does not know yet that another one owns its data directory: nobody believes it anything."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import stepwire
from stepwire.errors import Reason, error_from_reason
from stepwire_server.sessions.session import Session
from tests.support.health import health_of
from tests.support.numpy_server import numpy_server

ZEROS = {"w": np.zeros(64, np.float32)}
ONES = {"w": np.ones(64, np.float32)}


def _session(client: stepwire.Client, request_id: str = "job") -> stepwire.Session:
    return client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0), durability="journal", request_id=request_id)


@contextlib.contextmanager
def _overtaken(folder: pathlib.Path) -> Iterator[tuple[stepwire.Client, stepwire.Client, str]]:
    """Yield a client of an old owner, one of its newer one, and the id of a session that both know."""
    with numpy_server(data_dir=str(folder)) as old, stepwire.connect(old.target, timeout=5.0) as before:
        session = _session(before)
        session.step(ONES)
        with numpy_server(data_dir=str(folder)) as new, stepwire.connect(new.target, timeout=5.0) as after:
            yield before, after, session.session_id


CALLS: dict[str, Callable[[stepwire.Client, str], object]] = {
    "creation again": lambda client, _: _session(client),
    "another creation": lambda client, _: _session(client, "other"),
    "finding": lambda client, session_id: client.session(session_id),
    "finding what is not there": lambda client, _: client.session("0" * 32),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_old_owner_answers_nothing_and_names_no_other_reason(
    tmp_path: pathlib.Path, call: Callable[[stepwire.Client, str], object]
) -> None:
    with _overtaken(tmp_path) as (before, after, session_id):
        found = after.session(session_id)
        np.testing.assert_array_equal(found.step(ONES)["w"], -2.0 * ONES["w"])
        with pytest.raises(stepwire.FencedError, match="another server owns the data directory") as refused:
            call(before, session_id)
        assert refused.value.reason == Reason.NOT_PRIMARY


def test_an_old_owner_that_knows_fewer_durable_steps_does_not_say_that_steps_are_lost(tmp_path: pathlib.Path) -> None:
    with (
        numpy_server(data_dir=str(tmp_path)) as old,
        stepwire.connect(old.target, timeout=5.0) as before,
        numpy_server(data_dir=str(tmp_path / "other")) as other,
    ):
        session = _session(before)
        session.step(ONES)
        own = old.registry.get(session.session_id)
        error = error_from_reason(Reason.DURABLE_STEP_LOST, "fewer", {})
        assert old._told(error) is error
        with numpy_server(data_dir=str(tmp_path)):
            assert old._told(error).reason == Reason.NOT_PRIMARY
            invalid = error_from_reason(Reason.INVALID_TENSOR, "wrong", {})
            assert old._told(invalid) is invalid
            with pytest.raises(stepwire.FencedError):
                own.settle()
        assert isinstance(own, Session)
        assert other._told(error) is error


def test_an_old_owner_tells_health_checks_that_it_serves_nothing(tmp_path: pathlib.Path) -> None:
    with numpy_server(data_dir=str(tmp_path)) as old:
        assert health_of(old) == "SERVING"
        with numpy_server(data_dir=str(tmp_path)) as new:
            old._look_at_owner()
            new._look_at_owner()
            assert [health_of(old), health_of(old, ""), health_of(new)] == ["NOT_SERVING", "NOT_SERVING", "SERVING"]


@pytest.mark.parametrize("which", ["port", "socket", "settings"])
def test_a_server_that_cannot_start_leaves_the_directory_to_its_owner(tmp_path: pathlib.Path, which: str) -> None:
    """A second start by mistake, as of a unit that is started twice, ends nobody's training."""
    folder, path = str(tmp_path / "data"), str(tmp_path / "sock")
    with numpy_server(data_dir=folder, unix_socket=path) as server, stepwire.connect(server.target) as client:
        session = _session(client)
        session.step(ONES)
        wrong: dict[str, dict[str, str]] = {
            "port": {"bind": server.target},
            "socket": {"bind": f"unix:{path}"},
            "settings": {"standby": "required"},
        }
        with (
            pytest.raises(stepwire.InvalidRequestError, match="is taken|another process does|not both"),
            numpy_server(data_dir=folder, **wrong[which]),
        ):
            pass
        np.testing.assert_array_equal(session.step(ONES)["w"], -2.0 * ONES["w"])
        assert (session.info().epoch, health_of(server)) == (1, "SERVING")
