"""A process whose gRPC serves no more ends, and other threads' errors end nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stepwire_server.host.serving_thread import SERVING_LOST_EXIT_CODE

# Serves in a thread that fails as gRPC's own does where memory ends, and lives on for ever if nobody ends it.
SCRIPT = """
import sys, threading
import grpc._server
from stepwire_server.host.serving_thread import end_with_serving_thread

end_with_serving_thread()

def failing(*_):
    raise MemoryError

def elsewhere():
    raise MemoryError

other = threading.Thread(target=elsewhere)
other.start()
other.join()
print("after another thread", flush=True)
grpc._server._process_event_and_continue = failing
server = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(1))
server.add_insecure_port("127.0.0.1:0")
server.start()
server.stop(None)
threading.Event().wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the thread of gRPC is found by the names of POSIX paths")
def test_the_end_of_grpcs_thread_is_the_end_of_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120.0)
    assert (done.returncode, done.stdout.splitlines()[0]) == (SERVING_LOST_EXIT_CODE, "after another thread")
    assert "gRPC serves no more" in done.stdout
