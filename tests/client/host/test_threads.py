"""Threads that no ending process waits for."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
from concurrent.futures import wait

import pytest

from stepwire.host.threads import DaemonThreads

ROOT = pathlib.Path(__file__).parents[2]


def test_calls_are_made_by_as_many_threads_as_there_are_at_most() -> None:
    meet, names = threading.Barrier(3), set()

    def call() -> None:
        names.add(threading.current_thread().name)
        meet.wait()

    threads = DaemonThreads(3, "pool")
    wait([threads.submit(call) for _ in range(6)])
    assert names == {"pool_0", "pool_1", "pool_2"}
    threads.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pool_")]


def test_a_thread_that_is_idle_makes_the_next_call() -> None:
    threads = DaemonThreads(5, "pool")
    for _ in range(20):
        threads.submit(lambda: None).result()
        threads.submit(lambda: None).result()
    started = [thread for thread in threading.enumerate() if thread.name.startswith("pool_")]
    assert 1 <= len(started) <= 2, "a thread becomes idle a moment after its call is done"
    threads.shutdown()


def test_no_more_threads_are_started_than_calls_are_under_way() -> None:
    """However often a busy thread takes the call that an idle one could have made."""
    threads, callers = DaemonThreads(500, "pool"), 4

    def call_again_and_again() -> None:
        for _ in range(500):
            threads.submit(lambda: None).result()

    calling = [threading.Thread(target=call_again_and_again) for _ in range(callers)]
    for each in calling:
        each.start()
    for each in calling:
        each.join()
    started = [thread for thread in threading.enumerate() if thread.name.startswith("pool_")]
    assert len(started) <= 2 * callers, "a call counts until a moment after its result is there"
    threads.shutdown()


def test_results_and_errors_come_back_and_a_cancelled_call_is_not_made() -> None:
    gate, made = threading.Event(), []
    threads = DaemonThreads(1, "pool")
    first = threads.submit(gate.wait)
    failing = threads.submit(int, "x", base=16)
    second = threads.submit(made.append, "second")
    assert second.cancel()
    gate.set()
    assert first.result()
    with pytest.raises(ValueError, match="'x'"):
        failing.result()
    threads.shutdown()
    assert made == []


def test_each_thread_begins_with_a_call() -> None:
    begun: list[str] = []
    threads = DaemonThreads(1, "pool", lambda: begun.append(threading.current_thread().name))
    threads.submit(lambda: None).result()
    threads.submit(lambda: None).result()
    assert begun == ["pool_0"]


@pytest.mark.parametrize("cancel", [False, True])
def test_a_shutdown_makes_the_calls_that_are_left_or_cancels_them(cancel: bool) -> None:
    gate = threading.Event()
    threads = DaemonThreads(1, "pool")
    under_way, left = threads.submit(gate.wait), threads.submit(lambda: "made")
    threads.shutdown(wait=False, cancel_futures=cancel)
    threads.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(lambda: None)
    gate.set()
    threads.shutdown()
    assert under_way.result()
    assert left.cancelled() if cancel else left.result() == "made"


def test_threads_end_with_their_pool() -> None:
    threads = DaemonThreads(2, "dropped")
    threads.submit(lambda: None).result()
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("dropped_")]
    del threads
    thread.join()


def test_a_process_ends_beside_a_thread_that_waits_for_ever_and_works_to_the_last() -> None:
    if sys.version_info >= (3, 12):
        pytest.skip("Python 3.12 and later start no thread at their exit, and gRPC needs some")
    code = """
import atexit, threading
from stepwire.host.threads import DaemonThreads
threads = DaemonThreads(2, "pool")
threads.submit(threading.Event().wait)
atexit.register(lambda: print(threads.submit(lambda: "at the end").result()))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "at the end\n", "")
