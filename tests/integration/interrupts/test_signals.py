"""Signals that come while a step waits for its reply, which a proxy keeps back."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import stepwire
import stepwire.aio
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.integration.conftest import Opened
from tests.integration.proxy import Proxy
from tests.support.interrupts import signalled
from tests.support.numpy_server import numpy_pool

PATIENCE_SECONDS = 120.0
ZEROS = {"w": np.zeros(3, np.float32)}
ONES = {"w": np.ones(3, np.float32)}
EXCEPTIONS = {
    signal.SIGINT: KeyboardInterrupt(),
    signal.SIGTERM: SystemExit(143),
    signal.SIGALRM: TimeoutError("the alarm"),
}


@pytest.fixture
def pool() -> DevicePool:
    return numpy_pool()


@pytest.fixture
def session(proxy: Proxy, connect: Opened) -> stepwire.Session:
    """A session over the proxy, attached."""
    session = connect(proxy.target).create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0))
    session.attach()
    return session


def value(parameters: Any) -> float:
    return float(parameters["w"][0])


@pytest.mark.parametrize("number", EXCEPTIONS, ids=lambda number: number.name)
def test_a_step_ends_with_the_exception_of_a_handler(session: stepwire.Session, proxy: Proxy, number: int) -> None:
    proxy.hold("down")
    with (
        pytest.raises(type(EXCEPTIONS[number])),
        signalled(EXCEPTIONS[number], lambda: proxy.wait_held("down"), number),
    ):
        session.step(ONES)
    assert session.statistics().step_in_doubt == 1
    proxy.release("down")
    assert value(session.step(ONES)) == -1.0
    assert value(session.step(ONES)) == -2.0
    assert session.info().applied_step == 2


def test_calls_without_a_turn_end_likewise(session: stepwire.Session, proxy: Proxy) -> None:
    for call in (session.info, session.pull, session.state, lambda: session.load(ONES)):
        proxy.hold("down")
        with pytest.raises(KeyboardInterrupt), signalled(KeyboardInterrupt(), lambda: proxy.wait_held("down")):
            call()
        proxy.release("down")
        call()
    assert value(session.pull()) == 1.0


def test_a_handler_may_call_the_session_whose_step_waits(session: stepwire.Session, proxy: Proxy) -> None:
    """A handler that saves a checkpoint at SIGTERM runs in the middle of a step."""
    seen: list[Any] = []

    def handler(number: int, frame: object) -> None:
        proxy.release("down")
        seen.append(value(session.pull()))
        session.load({"w": np.full(3, 5.0, np.float32)})  # waits for the turn of the step

    def send() -> None:
        proxy.wait_held("down")
        while not seen:
            signal.pthread_kill(main, signal.SIGUSR1)
            threading.Event().wait(0.05)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, handler)
    sender = threading.Thread(target=send)
    try:
        proxy.hold("down")
        sender.start()
        assert value(session.step(ONES)) == -1.0
    finally:
        sender.join(PATIENCE_SECONDS)
        signal.signal(signal.SIGUSR1, before)
    assert set(seen) <= {0.0, -1.0, 5.0}
    assert value(session.pull()) == 5.0


def test_an_exception_that_another_thread_sets_arrives_after_the_step(session: stepwire.Session, proxy: Proxy) -> None:
    class Ended(Exception):
        pass

    outcome: list[str] = []

    def work() -> None:
        try:
            session.step(ONES)
        except Ended:
            outcome.append("ended")

    proxy.hold("down")
    worker = threading.Thread(target=work)
    worker.start()
    proxy.wait_held("down")
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(Ended))
    proxy.release("down")
    worker.join(PATIENCE_SECONDS)
    assert outcome == ["ended"]
    assert value(session.step(ONES)) == -1.0
    assert session.info().applied_step == 1


def test_a_cancelled_task_of_asyncio_leaves_its_step_to_the_end(proxy: Proxy) -> None:
    async def train() -> tuple[float, int]:
        async with stepwire.aio.connect(proxy.target, transport="tcp" if ":/" not in proxy.target else "uds") as client:
            async with await client.create_session(ZEROS, optimizer=stepwire.SGD(lr=1.0)) as session:
                await session.attach()
                proxy.hold("down")
                step = asyncio.create_task(session.step(ONES))
                await asyncio.to_thread(proxy.wait_held, "down")
                step.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await step
                proxy.release("down")
                applied = await session.settled()
                return value(await session.step(ONES)), applied

    assert asyncio.run(train()) == (-2.0, 1)


SCRIPT = """
import signal, sys
import numpy as np, stepwire

def once(number, frame):
    signal.signal(number, signal.SIG_IGN)  # the test sends it until the script has ended
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, once)
session = stepwire.connect(sys.argv[1], transport="tcp", timeout=600.0).create_session({"w": np.zeros(3, np.float32)})
session.attach()
print("attached", flush=True)
sys.stdin.readline()
session.step({"w": np.ones(3, np.float32)})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_script_ends_at_ctrl_c(server: Server) -> None:
    """The whole way: the signal of another process, the exception, and the end of the interpreter."""
    with Proxy(server.target) as proxy:
        script = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, proxy.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert script.stdin is not None and script.stdout is not None
        assert script.stdout.readline() == "attached\n"
        proxy.hold("down")
        print(file=script.stdin, flush=True)
        proxy.wait_held("down")
        while script.poll() is None:
            script.send_signal(signal.SIGINT)
            threading.Event().wait(0.05)
        _, errors = script.communicate(timeout=PATIENCE_SECONDS)
    assert errors.rstrip().endswith("KeyboardInterrupt")
