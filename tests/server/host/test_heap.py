"""The C heap of a server: what steps leave behind stays for the next, and goes when the server is at rest."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

MIB = 1 << 20

# A gradient of 64 MiB in messages of 4, twice: how much is resident after each is freed, how many pages the second one
# faults in, and what is left when the keeper has looked often enough.
_PROGRAM = """
import json, resource
from stepwire_server.host import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def gradient():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    messages = [b"x" * (4 << 20) for _ in range(16)]
    messages.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

heap.configure()
at_start = resident()
gradient()
after, faults = resident() - at_start, gradient()
keeper = heap.HeapKeeper()
trimmed = [keeper.look(64 << 20) for _ in range(5)]
print(json.dumps([after, faults, trimmed, resident() - at_start]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap that is set up")
def test_memory_stays_between_steps_and_goes_at_rest() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    after, faults, trimmed, left = json.loads(done.stdout)
    assert after > 60 * MIB
    assert faults < 200  # of 16,384 pages
    assert trimmed == [False, False, False, True, False]
    assert left < 8 * MIB


# The memory of messages that no session knows of, as those of a flood: nothing is released, and it goes all the same.
_FLOOD = """
import json, resource
from stepwire_server.host import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

heap.configure()
keeper = heap.HeapKeeper()
at_start = resident()
held = [b"x" * (4 << 20) for _ in range(16)]
during = [keeper.look(0) for _ in range(5)]
held.clear()
print(json.dumps([during, [keeper.look(0) for _ in range(3)], resident() - at_start]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap that is set up")
def test_memory_that_no_session_released_goes_too() -> None:
    done = subprocess.run([sys.executable, "-c", _FLOOD], capture_output=True, text=True, check=True)
    during, after, left = json.loads(done.stdout)
    assert (during, after) == ([False] * 5, [True, False, False])
    assert left < 8 * MIB
