"""The end of sessions that nobody closes: with their object, their client, or the process; and those that stay."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.support.ends import all_made

ROOT = pathlib.Path(__file__).parents[2]
ONE = {"w": np.ones(3, np.float32)}

KEPT: dict[str, Callable[[stepwire.Client, str], stepwire.Session]] = {
    "keep": lambda client, label: client.create_session(ONE, label=label, keep=True),
    "request id": lambda client, label: client.create_session(ONE, label=label, request_id=uuid.uuid4().hex),
    "kept later": lambda client, label: after(client.create_session(ONE, label=label), stepwire.Session.keep),
    "detached": lambda client, label: after(client.create_session(ONE, label=label), stepwire.Session.detach),
    "id read": lambda client, label: after(client.create_session(ONE, label=label), lambda each: each.session_id),
    "id of a shard read": lambda client, label: after(
        client.create_session(ONE, label=label), lambda each: each.shards[0].session_id
    ),
}


def after(session: stepwire.Session, call: Callable[[stepwire.Session], object]) -> stepwire.Session:
    call(session)
    return session


@pytest.fixture
def label() -> str:
    return f"ends {uuid.uuid4().hex}"


@pytest.fixture
def there(target: str, label: str) -> Any:
    """Returns the sessions of the test that are on the server: their labels without the test's own."""

    def listed() -> list[str]:
        with stepwire.connect(target) as client:
            found = [session for session in client.sessions() if session.label.startswith(label)]
            return sorted(session.label.removeprefix(label) for session in found)

    return listed


def test_a_session_ends_with_its_object(client: stepwire.Client, there: Any, label: str) -> None:
    session = client.create_session(ONE, label=label)
    session.step(ONE)
    assert there() == [""]
    del session
    all_made()
    assert there() == []


def test_a_session_lives_as_long_as_a_session_of_its_shards(client: stepwire.Client, there: Any, label: str) -> None:
    shard = client.create_session(ONE, label=label).shards[0]
    all_made()
    shard.step(ONE)
    assert there() == [""]
    del shard
    all_made()
    assert there() == []


def test_a_session_in_a_cycle_ends_when_the_collector_finds_it(client: stepwire.Client, there: Any, label: str) -> None:
    holder: dict[str, Any] = {"session": client.create_session(ONE, label=label)}
    holder["itself"] = holder
    del holder
    gc.collect()
    all_made()
    assert there() == []


def test_the_shards_of_a_session_end_with_its_object(target: str, there: Any, label: str) -> None:
    with stepwire.connect([target, target]) as client:
        session = client.create_session({"w": np.ones(500_000, np.float32)}, label=label)
        assert there() == ["", ""]
        del session
        all_made()
        assert there() == []


@pytest.mark.parametrize("how", KEPT)
def test_a_session_that_is_kept_outlives_its_object_and_its_client(
    target: str, there: Any, label: str, how: str
) -> None:
    with stepwire.connect(target) as client:
        session: stepwire.Session | None = KEPT[how](client, label)
        del session
        all_made()
        assert there() == [""]
        other: stepwire.Session | None = KEPT[how](client, label)
    assert there() == ["", ""]
    assert other is not None


def test_a_found_session_outlives_its_object(client: stepwire.Client, there: Any, label: str) -> None:
    session = client.create_session(ONE, label=label)
    found = client.session(session.own_id)
    found.step(ONE)
    assert client.session(session.own_id).info().attached
    del found
    all_made()
    assert there() == [""]
    session.close()


def test_a_client_ends_the_sessions_that_it_made_when_it_is_closed(target: str, there: Any, label: str) -> None:
    with stepwire.connect(target) as client:
        session = client.create_session(ONE, label=label)
        session.step(ONE)
    assert there() == []
    session.close()


def test_a_session_that_another_client_has_acquired_stays(client: stepwire.Client, there: Any, label: str) -> None:
    session = client.create_session(ONE, label=label)
    session.step(ONE)
    with stepwire.connect(client.target) as other:
        found = other.session(session.own_id)
        found.step(ONE)
        del session
        all_made()
        found.step(ONE)
        assert (found.applied_step, there()) == (3, [""])
        found.close()


def test_a_closed_session_is_not_ended_again(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    session = client.create_session(ONE)
    session.close()
    monkeypatch.setattr("stepwire.connection.channel.Calls.once", lambda *_: pytest.fail("a call"))
    del session
    all_made()


def test_the_default_label_names_the_process(client: stepwire.Client) -> None:
    with client.create_session(ONE) as session:
        assert f":{os.getpid()} " in session.info().label
    with client.create_session(ONE, label="mine") as session:
        assert session.info().label == "mine"
    with client.create_session(ONE, request_id=uuid.uuid4().hex) as session:
        assert session.info().label == "", "a repetition comes from another process, and has to be of the same config"


SCRIPT = """
import atexit, os, sys, threading, numpy as np
import stepwire
target, label = sys.argv[1:]
ONE = {"w": np.ones(3, np.float32)}
client = stepwire.connect(target)
make = lambda name, **options: client.create_session(ONE, label=label + name, **options)
"""

ENDS = {
    "its last line": "",
    "an error": "raise RuntimeError('mine')",
    "sys.exit": "sys.exit(3)",
    "a step in a daemon thread": """
        begun = threading.Event()
        def work():
            while True:
                plain.step(ONE)
                begun.set()
        threading.Thread(target=work, daemon=True).start()
        begun.wait()
    """,
    "training at its exit": """
        def train():
            print(plain.step(ONE)["w"].shape, plain.step_async(ONE).result()["w"].shape, flush=True)
        atexit.register(train)
    """,
}
CODES = {"an error": 1, "sys.exit": 3}
SAYS = {"an error": "RuntimeError: mine"}


def run(target: str, label: str, end: str) -> subprocess.CompletedProcess[str]:
    body = """
        plain, stepped = make(" plain"), make(" stepped")
        stepped.step(ONE)
        kept, named, left = make(" kept", keep=True), make(" named"), make(" left")
        named.session_id
        left.step(ONE)
        left.detach()
    """
    code = SCRIPT + textwrap.dedent(body) + textwrap.dedent(end)
    return subprocess.run([sys.executable, "-c", code, target, label], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.many
@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_normally_ends_the_sessions_that_it_does_not_keep(
    target: str, there: Any, label: str, end: str
) -> None:
    if sys.version_info >= (3, 12) and end == "training at its exit":
        pytest.skip("Python 3.12 and later start no thread at their exit, and gRPC needs some")
    ended = run(target, label, ENDS[end])
    assert there() == [" kept", " left", " named"]
    assert (ended.returncode, ended.stderr.strip().rpartition("\n")[2]) == (CODES.get(end, 0), SAYS.get(end, ""))
    assert ended.stdout == ("(3,) (3,)\n" if "training" in end else "")


def test_a_program_that_is_killed_leaves_its_sessions_to_their_leases(target: str, there: Any, label: str) -> None:
    assert run(target, label, "os.kill(os.getpid(), 9)").returncode == -9
    assert there() == [" kept", " left", " named", " plain", " stepped"]
