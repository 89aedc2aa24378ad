"""Sessions on a volume: one container is killed, and the next serves what it had."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

import stepwire
from commands import attempt, run
from containers import STRICT, running
from report import Report, require

__all__ = ["check_durability"]

_VOLUME: Final = "stepwire-durable"
_SETTINGS: Final = {"INSECURE": "1", "DATA_DIR": "/var/lib/stepwire/data"}
_FLAGS: Final = (*STRICT, "--volume", f"{_VOLUME}:/var/lib/stepwire")


def check_durability(report: Report, image: str) -> None:
    """Kill a container in training, and go on with another on its volume."""
    with report.showing("the volume of a container that was killed is served by the next, bit for bit") as figures:
        try:
            session_id = _train_and_kill(image)
            step, epoch = _go_on(image, session_id)
        finally:
            attempt("docker", "volume", "rm", "--force", _VOLUME)
        figures += [f"went on from step {step}", f"epoch {epoch}"]


def _train_and_kill(image: str) -> str:
    with running(image, flags=_FLAGS, **_SETTINGS) as server:
        server.await_health()
        with stepwire.connect(server.target()) as client:
            session = client.create_session(_parameters(), durability="journal", keep=True)
            for number in range(3):
                session.step(_gradient(number))
            run("docker", "kill", server.name)
            return session.session_id


def _go_on(image: str, session_id: str) -> tuple[int, int]:
    with running(image, flags=_FLAGS, **_SETTINGS) as server:
        server.await_health()
        with stepwire.connect(server.target()) as client:
            undisturbed, session = client.create_session(_parameters()), client.session(session_id)
            info = session.info()
            for number in range(5):
                expected: Any = undisturbed.step(_gradient(number))
            for number in range(info.applied_step, 5):
                found: Any = session.step(_gradient(number))
            require(found["w"].tobytes() == expected["w"].tobytes(), info)
            return info.applied_step, info.epoch


def _parameters() -> dict[str, Any]:
    return {"w": np.ones(50_000, np.float32)}


def _gradient(number: int) -> dict[str, Any]:
    return {"w": np.random.default_rng(number).standard_normal(50_000).astype(np.float32)}
