"""The checks of `stepwire doctor --target`: the transports between here and a running server."""

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
_TRANSPORT_NAMES: Final = {
    "cuda_ipc": "device memory (cuda_ipc)",
    "packets": "packets on this machine (packets)",
    "shm": "shared memory (shm)",
    "uds": "Unix socket (uds)",
    "tcp": "TCP (tcp)",
}


def examine_target(target: str, timeout: float) -> list[Finding]:
    """Try every transport to a server with steps of a small session, which is closed at the end.

    Nothing is measured. A transport that does not work is no fault as long as another does.

    Args:
        target: the address of the server, `host:port` or `unix:/path`.
        timeout: the longest wait of each call, in seconds.

    Raises:
        UnavailableError: the server cannot be reached.
        InvalidRequestError: the target is no address, or the timeout is no time.
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
            return [server, *_examine_transports(session)]


def _examine_transports(session: stepwire.Session) -> Iterator[Finding]:
    findings = [_examine_transport(session, name) for name in TRANSPORTS]
    yield from (finding._replace(optional=not finding.ok) for finding in findings)
    try:
        session.attach(transport="auto")
    except StepwireError as refused:  # STEPWIRE_TRANSPORT names a transport that does not work
        yield Finding("in use", False, str(refused), f"unset {VARIABLE}")
        return
    assert session.transport is not None
    chosen = _TRANSPORT_NAMES[session.transport.name]
    yield Finding("in use", True, f"sessions that leave the choice to stepwire use {chosen}")


def _examine_transport(session: stepwire.Session, name: str) -> Finding:
    """Step over a transport, and compare the reply with the expected one."""
    reply = np.empty(_ELEMENTS, np.float32)
    try:
        session.attach(transport=name)
        expected = -float(session.applied_step + 1)
        session.step({"probe": np.ones(_ELEMENTS, np.float32)}, out={"probe": reply})
    except UnsupportedFeatureError as refused:
        detail, _, remedy = refused.metadata.get("problem", str(refused)).partition("; ")
        return Finding(name, False, detail, remedy)
    except StepwireError as failed:
        return Finding(name, False, f"a step over it fails: {failed}", "see the server's log")
    if not np.array_equal(reply, np.full(_ELEMENTS, expected, np.float32)):
        return Finding(name, False, "a step over it comes back wrong", "report this as a bug")
    return Finding(name, True, "works")
