"""A server that ends with the process that started it."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

__all__ = ["follow"]

_log = structlog.get_logger()

_LOOK_SECONDS: Final = 1.0


def follow(pid: int, stop: Callable[[], None]) -> None:
    """Call `stop` in a thread of its own when the parent ends; at once if the parent has ended already.

    A parent that is killed cannot end its processes, and they would keep its ports for ever. The kernel's signal at the
    death of a parent (PR_SET_PDEATHSIG) is no help: it comes at the end of the *thread* that started the process.

    Args:
        pid: the process id of the parent; 0 to follow nobody.
        stop: a function that ends the server, as SIGTERM does.
    """
    if not pid:
        return
    ended = _end_of(pid)

    def end() -> None:
        _log.warning("the parent ended", pid=pid)
        stop()

    if os.getppid() != pid:  # asked after the process is watched: its number may belong to another one by now
        end()
        return

    def watch() -> None:
        ended()
        end()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _end_of(pid: int) -> Callable[[], object]:
    """Return a function that waits until the parent ends."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # a kernel before Linux 5.3, a sandbox that knows no such call, or no such process

        def look() -> None:
            while os.getppid() == pid:
                time.sleep(_LOOK_SECONDS)

        return look
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll.poll
