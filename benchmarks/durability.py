"""The cost of durable sessions beside their parts: steps, group commit, checkpoints, recovery, parking."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

import bare_disk
import contest
import machine
import recovery
import transports
import variants
from contest import Action, Contender, ContestResult
from durable_server import DurableServer, durable_server
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.doctor.disk import file_system_of
from stepwire_server.durability.epochs import Epochs
from stepwire_server.durability.records import Kind, LogPosition, Record
from stepwire_server.durability.writer import LogWriter
from variants import Variant

__all__ = ["JOURNAL_TO_PARTS", "Scale", "durability"]

Figures = dict[str, Any]
_MIB: Final = 1 << 20
_BLOCK_BYTES: Final = 4096
_LEVELS: Final = ("memory", "checkpoint", "journal")
_WRITE: Final = "bare write"
_SMALL: Final = 1_000
_SLOW_SYNC_SECONDS: Final = 0.002
_SESSIONS: Final = 64
# The share of a bare write that a small step may cost beyond it: the record, its checksums, and two wakes of threads.
_WRITE_FACTOR: Final = 1.3
_STATE_BYTES: Final = 12  # parameters and Adam's two moments
JOURNAL_TO_PARTS: Final = "journal at 32M bfloat16 to its parts"


class Scale(NamedTuple):
    """The sizes of the section.

    Attributes:
        large: the parameters of a large step and of a checkpoint.
        rounds: the rounds of a contest.
        batch: the small steps of one round.
        steps: the small steps of each of many sessions.
        parked: the parameters of a session that is parked.
        recovered: the parameters of a session that comes back.
        recovered_steps: the steps that are made again.
    """

    large: int = 32_000_000
    rounds: int = 9
    batch: int = 100
    steps: int = 100
    parked: int = 10_000_000
    recovered: int = 10_000_000
    recovered_steps: int = 20

    @classmethod
    def quick(cls) -> Scale:
        """Return a short form."""
        return cls(1_000_000, 2, 10, 5, 500_000, 500_000, 3)


def durability(folder: pathlib.Path, scale: Scale) -> Figures:
    """Return all figures; whatever fails leaves its reason and no other figure out.

    Args:
        folder: the place of the data directories, on the file system to measure.
        scale: the sizes.
    """
    figures: Figures = {"file system": file_system_of(folder)}
    if figures["file system"] == "tmpfs":
        figures["caution"] = "tmpfs is memory: nothing here tells of a disk; name another place with --data-dir"
    for name, measure in _MEASUREMENTS.items():
        try:
            with tempfile.TemporaryDirectory(prefix="stepwire-", dir=folder) as place:
                figures |= measure(pathlib.Path(place), scale)
        except Exception as problem:
            traceback.print_exc()
            figures[f"{name} left out"] = contest.failure(problem)
    return figures


# --- steps ----------------------------------------------------------------------------------------------------


def _large_step(folder: pathlib.Path, scale: Scale) -> Figures:
    """A step over TCP, bfloat16 both ways, at each level; the bare write is of the gradient's bytes."""
    payload = scale.large * BFLOAT16.itemsize
    result = _contest(folder, scale, size=scale.large, dtype="bfloat16", write_bytes=payload, batch=1)
    figures = _named(result, f"{transports.section_name('', scale.large).strip()} bfloat16")
    return figures | {JOURNAL_TO_PARTS: contest.ratio(result.times, "journal", "memory", _WRITE)}


def _small_step(folder: pathlib.Path, scale: Scale) -> Figures:
    """A step of 1,000 parameters over TCP, float32 both ways, at each level; the bare write is one block."""
    result = _contest(folder, scale, size=_SMALL, dtype="float32", write_bytes=_BLOCK_BYTES, batch=scale.batch)
    times = result.times | {"write": [_WRITE_FACTOR * seconds for seconds in result.times[_WRITE]]}
    figures = _named(result, "1k float32")
    return figures | {"small journalled step to its parts": contest.ratio(times, "journal", "memory", "write")}


def _contest(
    folder: pathlib.Path, scale: Scale, *, size: int, dtype: str, write_bytes: int, batch: int
) -> ContestResult:
    def bare(stack: contextlib.ExitStack, _: int) -> Action:
        whole = -(-write_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        room = whole * (scale.rounds * (batch + 1) + 4)
        file = bare_disk.BareFile(folder / "bare", room)
        stack.callback(file.close)
        return file.writer(whole)

    with durable_server(folder / "data") as server:
        entrants = [variants.contender(_at(level, dtype), [server.target]) for level in _LEVELS]
        result = contest.run_contest([*entrants, Contender(_WRITE, bare)], size, rounds=scale.rounds, batch=batch)
    if result.left_out:
        raise RuntimeError(f"no figures of {result.left_out}")
    return result


def _at(level: Any, dtype: str) -> Variant:
    return Variant(level, gradient_dtype=dtype, reply_dtype=dtype, durability=level)


def _named(result: ContestResult, which: str) -> Figures:
    """Return the medians of a contest under names such as "journal 1k float32 ms"."""
    return {f"{name} {which} ms": statistics.median(times) * 1e3 for name, times in result.times.items()}


# --- group commit ---------------------------------------------------------------------------------------------


def _group_commit(folder: pathlib.Path, scale: Scale) -> Figures:
    """Small steps a second of many sessions over a log with slow syncs, to as many with one sync after another."""
    with durable_server(folder / "data", _SLOW_SYNC_SECONDS) as server:
        memory, _ = _rate(server, "memory", scale.steps)
        journal, syncs = _rate(server, "journal", scale.steps)
    file = bare_disk.BareFile(folder / "bare", _BLOCK_BYTES * 1000, bare_disk.SlowDisk(_SLOW_SYNC_SECONDS))
    write = file.writer(_BLOCK_BYTES)
    alone = 1 / statistics.median(contest.timed(write) for _ in range(100))
    file.close()
    return {
        "64 sessions in memory, steps a second": memory,
        "64 sessions, sync of 2 ms, steps a second": journal,
        "one sync of 2 ms each, steps a second": alone,
        "64 sessions, steps a sync": _SESSIONS * scale.steps / max(syncs, 1),
        "64 sessions to 64 in memory": journal / memory,
        "log alone, 64 threads, sync delayed to 2 ms": _log_rate(folder / "bare data", scale.steps) / alone,
        "64 sessions, sync delayed to 2 ms": journal / alone,
    }


def _rate(server: DurableServer, level: str, steps: int) -> tuple[float, int]:
    """Return the steps a second of many sessions, each in a thread of its own, and the syncs meanwhile."""
    with contextlib.ExitStack() as stack:
        jobs = [variants.open_job(stack, _at(level, "float32"), [server.target], _SMALL) for _ in range(_SESSIONS)]
        for job in jobs:
            job.step()
        before = server.syncs()
        return _side_by_side([job.step for job in jobs], steps), server.syncs() - before


def _log_rate(folder: pathlib.Path, steps: int) -> float:
    """Return the records a second of as many threads that each wait for theirs: the log without gRPC and optimizer."""
    epochs, disk = folder / "epochs", bare_disk.SlowDisk(_SLOW_SYNC_SECONDS)
    for each in (folder, epochs, folder / "log"):
        each.mkdir()
    owner = Epochs(disk, epochs)
    epoch = owner.acquire()
    log = LogWriter(disk, folder / "log", epoch, lambda: owner.is_owner(epoch), after=LogPosition(0, 0))
    record = Record(Kind.COMMIT, bytes(16), 1, b"", np.zeros(_SMALL, FLOAT32).view(np.uint8))
    rate = _side_by_side([lambda: log.wait(log.append(record, durable=True))] * _SESSIONS, steps)
    log.close()
    return rate


def _side_by_side(steps: Sequence[Action], count: int) -> float:
    """Repeat each step so often in a thread of its own, and return the steps a second of all together."""
    threads = [threading.Thread(target=_repeat, args=(step, count)) for step in steps]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(steps) * count / (time.perf_counter() - began)


def _repeat(step: Action, count: int) -> None:
    for _ in range(count):
        step()


# --- checkpoints ----------------------------------------------------------------------------------------------


def _checkpoint(folder: pathlib.Path, scale: Scale) -> Figures:
    """The stall of steps by a checkpoint, to one copy of the state in memory; and the memory that it needs."""
    rounds = min(scale.rounds, 5)
    with durable_server(folder / "data") as server, contextlib.ExitStack() as stack:
        job = variants.open_job(stack, _at("checkpoint", "bfloat16"), [server.target], scale.large)
        found = [_checkpoint_round(server, job, scale.large) for _ in range(rounds)]
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    ratios = [each["checkpoint stall ms"] / each["copy of the state ms"] for each in found]
    return {"checkpoint parameters": scale.large} | medians | {"checkpoint stall to copy": statistics.median(ratios)}


def _checkpoint_round(server: DurableServer, job: variants.Job, size: int) -> dict[str, float]:
    machine.reset_peak(server.pid)
    steady = [contest.timed(job.step) for _ in range(7)]
    without = machine.peak_resident_bytes(server.pid)
    copy = _copy_seconds(size)
    machine.reset_peak(server.pid)
    seconds: list[float] = []
    thread = threading.Thread(
        target=lambda: seconds.append(server.seconds_to("checkpoint", job.session.session_id)), name="checkpoint"
    )
    thread.start()
    during = [contest.timed(job.step)]
    while thread.is_alive():
        during.append(contest.timed(job.step))
    thread.join()
    growth = machine.peak_resident_bytes(server.pid) - without
    return {
        "checkpoint ms": seconds[0] * 1e3,
        "checkpoint step ms": statistics.median(steady) * 1e3,
        "checkpoint longest step ms": max(during) * 1e3,
        "checkpoint stall ms": (max(during) - statistics.median(steady)) * 1e3,
        "copy of the state ms": copy * 1e3,
        "checkpoint growth MiB": growth / _MIB,
    }


def _copy_seconds(size: int) -> float:
    """Return the seconds of one copy of a session's state into memory that is there already."""
    source, target = (np.ones(size * _STATE_BYTES // FLOAT32.itemsize, FLOAT32) for _ in range(2))
    return contest.timed(lambda: np.copyto(target, source))


# --- the life of a session ------------------------------------------------------------------------------------


def _parking(folder: pathlib.Path, scale: Scale) -> Figures:
    with durable_server(folder / "data") as server, contextlib.ExitStack() as stack:
        job = variants.open_job(stack, _at("journal", "bfloat16"), [server.target], scale.parked)
        times: dict[str, list[float]] = {"park": [], "revive": []}
        for _ in range(3):
            job.step()
            session_id = job.session.session_id
            job.session.detach()
            for action, seconds in times.items():
                seconds.append(server.seconds_to(action, session_id))
    medians = {f"{name} ms": statistics.median(seconds) * 1e3 for name, seconds in times.items()}
    return {"parked parameters": scale.parked} | medians


def _recovery(folder: pathlib.Path, scale: Scale) -> Figures:
    rounds = min(scale.rounds, 5)
    return recovery.recovery(folder, size=scale.recovered, steps=scale.recovered_steps, rounds=rounds)


_MEASUREMENTS: Final[dict[str, Callable[[pathlib.Path, Scale], Figures]]] = {
    "large step": _large_step,
    "small step": _small_step,
    "group commit": _group_commit,
    "checkpoint": _checkpoint,
    "recovery": _recovery,
    "parking": _parking,
}
