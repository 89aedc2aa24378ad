"""The process itself: its label in the listings of servers."""

from __future__ import annotations

import os
import pathlib
import socket
import sys
from typing import Final

__all__ = ["process_label"]

_MOST_CHARACTERS: Final = 128


def process_label() -> str:
    """Return the host, the process id and the script of this process, such as "node7:4711 train.py".

    Characters that a label may not have are question marks.
    """
    script = pathlib.PurePath(sys.argv[0]).name if getattr(sys, "argv", None) else ""
    label = f"{socket.gethostname()}:{os.getpid()} {script or 'python'}"
    return "".join(each if each.isascii() and each.isprintable() else "?" for each in label)[:_MOST_CHARACTERS]
