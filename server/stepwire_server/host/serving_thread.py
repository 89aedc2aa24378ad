"""The end of a process whose gRPC serves no more.

gRPC accepts calls and completes them in one thread. An error that reaches its top, such as a MemoryError, leaves a
process that listens, serves nothing and cannot be drained. Such a process ends at once, so that its supervisor starts
another.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Final

import structlog

__all__ = ["SERVING_LOST_EXIT_CODE", "end_with_serving_thread"]

SERVING_LOST_EXIT_CODE: Final = 71
"""The exit code after the serving thread has failed: `EX_OSERR` of sysexits."""

_SERVING: Final = ("_serve", os.path.join("grpc", "_server.py"))
"""The function of gRPC's serving thread, and the end of its file's name."""

_log = structlog.get_logger()


def end_with_serving_thread() -> None:
    """End the process, from now on, when an error ends the thread in which gRPC serves."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not _is_serving(failed.exc_traceback):
            before(failed)
            return
        try:
            _log.error("gRPC serves no more; this process ends", problem=failed.exc_type.__name__)
        finally:
            os._exit(SERVING_LOST_EXIT_CODE)

    threading.excepthook = hook


def _is_serving(traceback: TracebackType | None) -> bool:
    """Tell whether a traceback begins in the serving thread's function or just above it."""
    name, file = _SERVING
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_name == name and code.co_filename.endswith(file):
            return True
        traceback = traceback.tb_next
    return False
