"""A pair of real processes: the primary is killed, the standby promoted by the command, and training goes on."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from typing import Any

import pytest

import stepwire
from stepwire_server.processes.spawn import server_process
from tests.integration.replication.pair import SHARD, START, gradient, undisturbed

pytestmark = pytest.mark.many


@pytest.mark.slow
def test_a_killed_process_is_replaced_by_its_standby(command: Any, tmp_path: pathlib.Path) -> None:
    where = ("--device", "cpu", "--directory", str(tmp_path), "--shard", SHARD)
    with server_process(*where, "--standby", "required") as primary:
        with server_process(*where, "--standby-of", primary.target) as standby:
            with stepwire.connect(f"directory:{tmp_path}", timeout=60.0) as client:
                session = client.create_session(START, optimizer=stepwire.Adam(lr=0.1), durability="replicated")
                replies = [session.step(gradient(step))["w"].tobytes() for step in range(2)]
                os.kill(primary.pid, signal.SIGKILL)
                code, out, _ = command("standby", "promote", "-t", standby.target, "--json")
                assert (code, json.loads(out)) == (0, {"epoch": 3, "sessions": 1})
                replies += [session.step(gradient(step))["w"].tobytes() for step in range(2, 4)]
                assert (session.info().epoch, session.applied_step) == (3, 4)
    assert replies == undisturbed(4)
