"""Hostile requests of strangers and of another tenant: a session that trains meanwhile notices nothing of them.

The suite sends some hundreds, and `make attack-test` as many as it is told.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import grpc
import numpy as np
import pytest

import stepwire
from stepwire_server.access.identity import METHODS, Role
from stepwire_server.access.tokens import TokenRecord, digest_of, new_token, write_tokens
from tests.attack.hostile import ATTACKED, Attacker
from tests.integration.processes import ServerProcess

pytestmark = pytest.mark.slow

# Taken out, since a server refuses variables that it does not know.
REQUESTS: Final = int(os.environ.pop("STEPWIRE_ATTACK_REQUESTS", "600"))
ATTACKERS: Final = 8
SIZE: Final = 1000
BUDGET_BYTES: Final = 256 << 20
SLACK_BYTES: Final = 64 << 20
PATIENCE_SECONDS: Final = 120.0
REFUSALS: Final = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
    "UNIMPLEMENTED",
    "OUT_OF_RANGE",
    "ALREADY_EXISTS",
    "CANCELLED",
    "UNAVAILABLE",
}


def resident_bytes(pid: int, name: str = "VmRSS") -> int:
    """Return the resident bytes of a process; `VmHWM` names the most that it ever had."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {name}")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the server does after its clients have gone."""
    late = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < late


def trained(session: Any, over: threading.Event, steps: list[int]) -> None:
    """Step until the attack is over, and note the number of steps."""
    ones = {"w": np.ones(SIZE, np.float32)}
    while not over.is_set():
        session.step(ones)
        steps[0] += 1


def attacked(target: str, victim: str, tokens: tuple[str, ...], seed: int) -> Attacker:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(target, options) as channel:
        attacker = Attacker(channel, seed, victim, tokens)
        for _ in range(REQUESTS // ATTACKERS):
            attacker.attack()
        attacker.leave()
        return attacker


@pytest.fixture
def tokens(tmp_path: pathlib.Path) -> dict[str, str]:
    """Tokens of two tenants; the file is `tokens` in the test's folder."""
    made = {name: new_token() for name in ("victim", "attacker", "reader")}
    roles = {"victim": Role.TRAINER, "attacker": Role.TRAINER, "reader": Role.READER}
    records = [
        TokenRecord(name=name, digest=digest_of(token), role=roles[name], tenant="a" if name == "victim" else "b")
        for name, token in made.items()
    ]
    write_tokens(tmp_path / "tokens", records)
    return made


def test_every_method_is_attacked() -> None:
    service = "/stepwire.v1.OptimizerService/"
    methods = {method.removeprefix(service) for method in METHODS if method.startswith(service)}
    assert methods == {*ATTACKED} - {"NoSuchMethod"}


@pytest.mark.parametrize("durable", [False, True], ids=["memory", "data directory"])
def test_hostile_requests_change_nothing_for_others(
    tmp_path: pathlib.Path, tokens: dict[str, str], durable: bool
) -> None:
    flags = ["--tokens", str(tmp_path / "tokens"), "--memory-budget", str(BUDGET_BYTES), "--step-idle-seconds", "5"]
    flags += ["--max-lease-seconds", "30", *(["--data-dir", str(tmp_path / "data")] if durable else [])]
    with ServerProcess(*flags) as process, stepwire.connect(process.target, token=tokens["victim"]) as client:
        zeros = {"w": np.zeros(SIZE, np.float32)}
        durability = "journal" if durable else "memory"
        session = client.create_session(zeros, optimizer=stepwire.SGD(lr=1.0), durability=durability)
        session.step({"w": np.ones(SIZE, np.float32)})
        before = resident_bytes(process.pid), descriptors(process.pid)
        over, steps = threading.Event(), [1]
        calling = (tokens["attacker"], tokens["attacker"], tokens["reader"], new_token(), "x", "")
        with concurrent.futures.ThreadPoolExecutor(ATTACKERS + 1) as threads:
            training = threads.submit(trained, session, over, steps)
            attack = functools.partial(attacked, process.target, session.session_id, calling)
            try:
                found = list(threads.map(attack, range(ATTACKERS)))
            finally:
                over.set()
            training.result()
        statuses = sum((attacker.statuses for attacker in found), Counter[str]())
        assert [each for attacker in found for each in attacker.wrong] == []
        assert statuses.keys() <= REFUSALS
        assert statuses.total() == REQUESTS // ATTACKERS * ATTACKERS
        assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED", "PERMISSION_DENIED"} <= statuses.keys()
        assert session.applied_step == steps[0] == session.info().applied_step
        np.testing.assert_array_equal(session.pull()["w"], np.full(SIZE, -float(steps[0]), np.float32))
        assert resident_bytes(process.pid, "VmHWM") <= before[0] + BUDGET_BYTES + SLACK_BYTES
        until(lambda: resident_bytes(process.pid) <= before[0] + SLACK_BYTES)
        until(lambda: descriptors(process.pid) <= before[1])
