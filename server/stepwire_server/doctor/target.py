"""What `stepwire doctor --target` looks at: a running server from where its clients are, and the ways to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

import stepwire
from stepwire.errors import StepwireError, UnsupportedFeatureError
from stepwire.transports.available import TRANSPORTS, VARIABLE
from stepwire_server.engines.probe import Finding

__all__ = ["examine_target"]

_ELEMENTS: Final = 1000
_LEASE_SECONDS: Final = 60.0
_WAYS: Final = {
    "cuda_ipc": "device memory (cuda_ipc)",
    "shm": "shared memory (shm)",
    "uds": "Unix socket (uds)",
    "tcp": "TCP (tcp)",
}


def examine_target(target: str, timeout: float) -> list[Finding]:
    """Try every transport to a server with steps of a small session of its own, which is ended then.

    Nothing is measured. What does not work is no fault as long as something does.

    Args:
        target: `host:port` or `unix:/path`.
        timeout: seconds of each call.

    Raises:
        UnavailableError: the server cannot be reached.
        InvalidRequestError: the target or the timeout is none.
    """
    with stepwire.connect(target, timeout=timeout) as client:
        info = client.info()
        if info.draining:
            return [Finding("server", False, f"{target} drains: it takes no new sessions", "wait for its successor")]
        server = Finding("server", True, f"{target} serves, version {info.version}, on {', '.join(info.devices)}")
        try:
            session = client.create_session(
                {"probe": np.zeros(_ELEMENTS, np.float32)},
                optimizer=stepwire.SGD(lr=1.0),
                lease_seconds=min(_LEASE_SECONDS, timeout + 1.0),
                label="stepwire doctor",
            )
        except StepwireError as refused:
            return [server, Finding("session", False, f"no session can be made: {refused}", "see the server's log")]
        with session:
            return [server, *_examine_ways(session)]


def _examine_ways(session: stepwire.Session) -> Iterator[Finding]:
    findings = [_examine_way(session, name) for name in TRANSPORTS]
    yield from (finding._replace(optional=not finding.ok) for finding in findings)
    try:
        session.attach(transport="auto")
    except StepwireError as refused:  # where STEPWIRE_TRANSPORT names one that does not work
        yield Finding("in use", False, str(refused), f"unset {VARIABLE}")
        return
    assert session.transport is not None
    yield Finding("in use", True, f"sessions that leave the choice to stepwire use {_WAYS[session.transport.name]}")


def _examine_way(session: stepwire.Session, name: str) -> Finding:
    """Take a step over a transport, and see whether its answer is right."""
    answer = np.empty(_ELEMENTS, np.float32)
    try:
        session.attach(transport=name)
        expected = -float(session.applied_step + 1)
        session.step({"probe": np.ones(_ELEMENTS, np.float32)}, out={"probe": answer})
    except UnsupportedFeatureError as refused:
        detail, _, remedy = refused.metadata.get("problem", str(refused)).partition("; ")
        return Finding(name, False, detail, remedy)
    except StepwireError as failed:
        return Finding(name, False, f"a step over it fails: {failed}", "see the server's log")
    if not np.array_equal(answer, np.full(_ELEMENTS, expected, np.float32)):
        return Finding(name, False, "a step over it comes back wrong", "report this as a bug")
    return Finding(name, True, "works")
