"""The start of a server on a journal, beside its parts: a plain read of the files, and the same steps in memory.

`python recovery.py DATA_DIR STEPS ROUNDS` prints the figures as JSON. All is measured in one process, in turns, with
the page cache emptied of the files before each read and each start, and with the kernels made before.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np

import bare_disk
import contest
import stepwire
import variants
from child import output_of, python
from durable_server import durable_server, settings
from stepwire_server.devices.pool import DevicePool
from stepwire_server.durability.archive import Archive
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.entries import StepEntry, decode_entry
from stepwire_server.durability.reading import read_log
from stepwire_server.durability.records import Kind
from stepwire_server.durability.session_log import CHUNK
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.protocol import PARAM
from stepwire_server.observability.logs import logging_to_stderr
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rpc.durable_codec import DurableCodec
from stepwire_server.server import Server
from stepwire_server.sessions.redo import NoReply
from stepwire_server.sessions.session import Session

__all__ = ["recovery"]

Chunk = tuple[int, int, Any]
_ID = "0" * 32


class Journal(NamedTuple):
    """The steps of a log, as one of them shows them all.

    Attributes:
        config: the session's config.
        opening: the opening of the step.
        chunks: offset, elements and bytes of its gradient.
    """

    config: SessionConfig
    opening: StepRequest
    chunks: list[Chunk]


def recovery(folder: pathlib.Path, *, size: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return the times of a start that makes so many steps of a journal again, and of its parts."""
    gradient = {"w": variants.gradient_of(size, "bfloat16")}
    with durable_server(folder) as server, stepwire.connect(server.target, transport="tcp") as client:
        parameters = {"w": variants.parameters_of(size)}
        session = client.create_session(parameters, gradient_dtype="bfloat16", durability="journal", keep=True)
        for _ in range(steps):
            session.step(gradient, reply="none")
        session.detach()
    figures: dict[str, Any] = json.loads(output_of(python(__file__, folder, steps, rounds)))
    return {"recovery parameters": size, "recovery steps": steps} | figures


def measure(folder: pathlib.Path, steps: int, rounds: int) -> dict[str, Any]:
    """Measure the parts and the start in turns."""
    pool = DevicePool.of([CpuEngine()])
    journal = _journal_of(folder)
    _redo(pool, journal, 1)
    times: dict[str, list[float]] = {"read": [], "redo": [], "start": []}
    nbytes = 0
    for _ in range(rounds):
        bare_disk.evict(folder)
        began = time.perf_counter()
        nbytes = bare_disk.read_files(folder)
        times["read"].append(time.perf_counter() - began)
        times["redo"].append(contest.timed(lambda: _redo(pool, journal, steps)))
        bare_disk.evict(folder)
        times["start"].append(_start(folder, steps))
    medians = {f"recovery {name} ms": statistics.median(values) * 1e3 for name, values in times.items()}
    to_parts = 1 / contest.ratio(times, "start", "read", "redo")
    return {"recovery MiB": nbytes / 2**20, **medians, "recovery to its parts": to_parts}


def _start(folder: pathlib.Path, steps: int) -> float:
    """Return the seconds of a start, once it has shown that it made all steps again."""
    began = time.perf_counter()
    server = Server(settings(str(folder)), pool=DevicePool.of([CpuEngine()]))
    seconds = time.perf_counter() - began
    (session_id,) = Archive(Disk(), folder / "sessions", folder).ids()
    found = server.registry.get(session_id).ledger.applied_step
    server.close()
    if found != steps:
        raise RuntimeError(f"the server came back at step {found} of {steps}")
    return seconds


def _journal_of(folder: pathlib.Path) -> Journal:
    codec, chunks = DurableCodec(), list[Chunk]()
    archive = Archive(Disk(), folder / "sessions", folder)
    config = codec.decode_config(archive.get(*archive.ids()).config)
    for record in read_log(Disk(), folder / "log"):
        kind = record.header.kind
        if kind is Kind.LOAD:
            chunks.clear()
        elif kind is Kind.CHUNK:
            offset, count, _ = CHUNK.unpack(record.meta)
            chunks.append((offset, count, record.read_payload()))
        elif kind is Kind.COMMIT:
            opening = codec.decode_opening(decode_entry(StepEntry, record.meta).opening, config)
            return Journal(config, opening._replace(reply=False, load=None, epoch=0, reply_base=None), chunks)
    raise LookupError(f"the log in {folder} has no step")


def _redo(pool: DevicePool, journal: Journal, steps: int) -> None:
    session = Session(_ID, journal.config, pool.choose(""), epoch=1, clock=time.monotonic)
    try:
        holder = session.acquire()
        request = LoadRequest(1, (PARAM,))
        with session.exchange.loading(request, holder) as load:
            assert load is not None
            load.add(PARAM, 0, journal.config.layout.size, np.zeros(journal.config.layout.size, np.float32).view("u1"))
            load.complete()
            session.exchange.commit_load(load)
        for number in range(1, steps + 1):
            with session.begin(journal.opening.numbered(number), holder, 0.0) as step:
                for chunk in journal.chunks:
                    step.add(*chunk)
                session.commit(step, NoReply())
    finally:
        session.close()


if __name__ == "__main__":
    with logging_to_stderr("warning"):
        print(json.dumps(measure(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
