"""Writes the data directory of this release, which later releases must read.

    python -m tests.integration.durability.release FOLDER

One session's commits are in the log alone, one has a checkpoint and commits behind it, and one has a checkpoint alone.
`expected.json` has the parameters after more steps.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import numpy as np

import stepwire
from tests.support.numpy_server import numpy_server

__all__ = ["BEFORE", "KINDS", "SETTINGS", "gradient", "stepped"]

SIZE = 300
BEFORE, AFTER = 3, 2
SETTINGS: dict[str, Any] = {"journal_segment_bytes": 1 << 20}
KINDS: dict[str, dict[str, Any]] = {
    "logged": {"optimizer": stepwire.AdamW(lr=0.01, weight_decay=0.1), "durability": "journal"},
    "checkpointed": {"optimizer": stepwire.NAdam(lr=0.01), "durability": "journal", "state_precision": "int8"},
    "parked": {"optimizer": stepwire.SGD(lr=0.1, momentum=0.9), "durability": "checkpoint", "accumulation_steps": 2},
}


def gradient(number: int) -> dict[str, Any]:
    """Return the gradient of a step."""
    draw = np.random.default_rng((11, number))
    return {"w": draw.standard_normal((SIZE, 2)).astype(np.float32), "b": draw.standard_normal(3).astype(np.float32)}


def stepped(session: stepwire.Session, first: int, count: int) -> list[str]:
    """Step a session, and return the parameters after each step, in hexadecimal digits."""
    replies: list[Any] = [session.step(gradient(number)) for number in range(first, first + count)]
    return ["".join(reply[name].tobytes().hex() for name in ("b", "w")) for reply in replies]


def write(folder: pathlib.Path) -> None:
    """Write the data directory, and what is expected of it."""
    expected: dict[str, Any] = {"version": stepwire.__version__, "sessions": {}}
    with tempfile.TemporaryDirectory() as scratch:
        data = pathlib.Path(scratch, "data")
        with numpy_server(data_dir=str(data), **SETTINGS) as server, stepwire.connect(server.target) as client:
            directory = server.registry.directory
            assert directory is not None
            zeros = {"w": np.zeros((SIZE, 2), np.float32), "b": np.ones(3, np.float32)}
            sessions = {
                name: client.create_session(zeros, keep=True, label="release", **options)
                for name, options in KINDS.items()
            }
            for name, session in sessions.items():
                stepped(session, 1, 2)
                if name != "logged":
                    directory.checkpointer.checkpoint(server.registry.get(session.session_id))
            stepped(sessions["logged"], 3, 1)
            stepped(sessions["checkpointed"], 3, 1)
            shutil.copytree(data, folder / "data")
            stepped(sessions["parked"], 3, 1)  # lost: no checkpoint has it
            for name, session in sessions.items():
                replies = stepped(session, 4, AFTER)
                expected["sessions"][name] = {"id": session.session_id, "after": replies}
    for segment in (folder / "data" / "log").iterdir():  # without the zeros that were set aside
        os.truncate(segment, len(segment.read_bytes().rstrip(b"\0")) // 4096 * 4096 + 4096)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
