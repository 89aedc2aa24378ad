"""A server that ends with the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

__all__ = ["follow"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow(pid: int, stop: Callable[[], None]) -> None:
    """Have the kernel send SIGTERM when the parent ends; where it has ended already, stop at once.

    A parent that is killed cannot end its processes, and they would keep its ports for ever.

    Args:
        pid: the process id of the parent; 0 to follow nobody.
        stop: ends the server, as SIGTERM does.
    """
    if not pid:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != pid:
        stop()
