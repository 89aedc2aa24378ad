"""The end of the process that started a server, seen by the server: of the process, and not of one of its threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from structlog.testing import capture_logs

from stepwire_server.host.parent import follow

PATIENCE_SECONDS = 120.0

FOLLOWER = """
import os, sys, threading
import structlog
from stepwire_server.host import parent

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

def old_kernel(pid):
    raise OSError
if sys.argv[2] == "old":
    os.pidfd_open, parent._LOOK_SECONDS = old_kernel, 0.001
ended = threading.Event()
parent.follow(int(sys.argv[1]), ended.set)

def reply():
    for line in sys.stdin:
        print("ended" if ended.is_set() else "follows", flush=True)
threading.Thread(target=reply, daemon=True).start()
ended.wait()
print("ended", flush=True)
"""

# The follower is started in a thread. Once the kernel has ended the thread too, the follower is asked.
PARENT = """
import os, subprocess, sys, threading

def start():
    global follower
    command = [sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]]
    follower = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
while len(os.listdir("/proc/self/task")) > 1:
    pass
print("\\n", file=follower.stdin, flush=True, end="")
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_the_end_of_a_thread_of_the_parent_is_not_the_parents(kernel: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, FOLLOWER, kernel], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None
    assert parent.stdout.readline() == "follows\n"
    parent.stdin.close()
    assert parent.wait(PATIENCE_SECONDS) == 0
    assert parent.stdout.read() == "ended\n"
    parent.stdout.close()


def test_a_parent_that_has_ended_before_stops_the_server_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stopped = threading.Event()
    with capture_logs() as lines:
        follow(gone.pid, stopped.set)
    assert stopped.is_set()
    assert lines == [{"event": "the parent ended", "pid": gone.pid, "log_level": "warning"}]


def test_nobody_is_followed_without_a_number() -> None:
    before = threading.active_count()
    follow(0, lambda: os._exit(1))
    assert threading.active_count() == before
