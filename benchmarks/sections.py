"""The measurements of `make bench`. Each function returns its figures by name; `main` prints them."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import floors
import machine
import occupancy
import stepwire
from echo import EchoStream, bulk_messages, sized_message
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.processes.spawn import ServerProcess
from timing import times_of

Figures = dict[str, Any]
# The bytes of a step's messages besides the payload: header fields, padding, tag and length.
_FRAME_OVERHEAD = {"request": 48, "reply": 224}


def small_step(server: ServerProcess, echo: str, *, size: int = 1000, rounds: int = 40, batch: int = 100) -> Figures:
    """The step of a small model against a raw stream echo of the same bytes, in alternating batches."""
    gradient = {"w": np.full(size, 0.01, np.float32)}
    out = {"w": np.empty(size, np.float32)}
    payload = size * FLOAT32.itemsize
    message = sized_message(payload + _FRAME_OVERHEAD["request"], payload + _FRAME_OVERHEAD["reply"])
    raw = EchoStream(echo, "Echo")
    times: dict[str, list[float]] = {"step": [], "echo": []}
    processes, done = {"client": os.getpid(), "server": server.pid}, dict[str, machine.Work]()
    with stepwire.connect(server.target, transport="tcp") as client, client.create_session(gradient) as session:
        actions: dict[str, Callable[[], Any]] = {
            "step": lambda: session.step(gradient, out=out),
            "echo": lambda: raw.round_trip(message),
        }
        for action in actions.values():
            times_of(action, 3 * batch)
        for _ in range(rounds):
            for name, action in actions.items():
                before = {who: machine.work(pid) for who, pid in processes.items()}
                times[name] += times_of(action, batch)
                if name == "step":
                    for who, pid in processes.items():
                        done[who] = machine.added(done.get(who), before[who], machine.work(pid))
    raw.close()
    figures: Figures = {"parameters": size, "samples": rounds * batch}
    for who, work in done.items():
        figures |= {
            f"step_{who}_cpu_us": work.cpu_seconds / (rounds * batch) * 1e6,
            f"step_{who}_switches": work.switches / (rounds * batch),
        }
    for quantile in (50, 99):
        step, floor = (float(np.percentile(times[name], quantile)) for name in ("step", "echo"))
        figures |= {
            f"step_p{quantile}_us": step * 1e6,
            f"echo_p{quantile}_us": floor * 1e6,
            f"ratio_p{quantile}": step / floor,
        }
    return figures


def large_step(server: ServerProcess, echo: str, *, size: int, rounds: int = 7) -> Figures:
    """The step of a large model against the sum of its components, round by round in one run."""
    rng = np.random.default_rng(0)
    gradient = {"w": rng.standard_normal(size, np.float32)}
    out = {"w": np.zeros(size, np.float32)}
    payload = size * FLOAT32.itemsize
    messages = bulk_messages(payload)
    raw = EchoStream(echo, "PushPull")
    engine, step_alone = floors.engine_step(size, gradient["w"])
    target = np.empty_like(gradient["w"])
    copy = [lambda: np.copyto(target, gradient["w"])] * 2
    times: dict[str, list[float]] = {"step": [], "push_pull": [], "engine": [], "copies": []}
    with stepwire.connect(server.target, transport="tcp") as client, client.create_session(out) as session:
        actions: dict[str, Callable[[], Any]] = {
            "step": lambda: session.step(gradient, out=out),
            "push_pull": lambda: raw.exchange(messages),
            "engine": step_alone,
            "copies": lambda: [one() for one in copy],
        }
        for action in actions.values():
            action()
        for _ in range(rounds):
            for name, action in actions.items():
                times[name] += times_of(action, 1)
    raw.close()
    engine.close()
    medians = {f"{name}_ms": statistics.median(values) * 1e3 for name, values in times.items()}
    parts = [sum(times[name][index] for name in ("push_pull", "engine", "copies")) for index in range(rounds)]
    ratios = [step / total for step, total in zip(times["step"], parts, strict=True)]
    return {
        "parameters": size,
        "rounds": rounds,
        **medians,
        "parts_ms": statistics.median(parts) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def memory(server: ServerProcess, *, size: int, looks: int = 16) -> Figures:
    """Server memory a parameter, beyond the server's memory before the session."""
    with stepwire.connect(server.target, transport="tcp") as client:
        with client.create_session({"w": np.ones(1000, np.float32)}) as warm:
            warm.step({"w": np.ones(1000, np.float32)})
        before = machine.resident_bytes(server.pid)
        gradient = {"w": np.full(size, 0.01, np.float32)}
        with client.create_session(gradient) as session:
            session.step(gradient, out={"w": np.empty(size, np.float32)})
            rest = occupancy.settled_resident_bytes(server.pid, looks) - before
            machine.reset_peak(server.pid)
            session.step(gradient, out={"w": np.empty(size, np.float32)})
            peak = machine.peak_resident_bytes(server.pid) - before
    return {"parameters": size, "rest_bytes": rest / size, "peak_bytes": peak / size}


def concurrency(
    server: ServerProcess, echo: str, *, clients: tuple[int, ...] = (1, 8, 64), size: int = 10_000, steps: int = 4000
) -> Figures:
    """Steps a second of several clients at once, and raw echoes of the same bytes by as many streams."""
    payload = size * FLOAT32.itemsize
    message = sized_message(payload + _FRAME_OVERHEAD["request"], payload + _FRAME_OVERHEAD["reply"])
    figures: Figures = {"parameters": size}
    for count in clients:
        each = max(steps // count, 10)
        figures[f"steps_per_second_{count}"] = _session_rate(server, count, size, each)
        figures[f"echoes_per_second_{count}"] = _echo_rate(echo, count, message, each)
        figures[f"ratio_{count}"] = figures[f"steps_per_second_{count}"] / figures[f"echoes_per_second_{count}"]
    return figures


def _session_rate(server: ServerProcess, count: int, size: int, each: int) -> float:
    gradient = {"w": np.full(size, 0.01, np.float32)}
    clients = [stepwire.connect(server.target, transport="tcp") for _ in range(count)]
    sessions = [client.create_session(gradient) for client in clients]
    outs = [{"w": np.empty(size, np.float32)} for _ in sessions]
    rate = _rate(
        [lambda s=session, o=out: s.step(gradient, out=o) for session, out in zip(sessions, outs, strict=True)], each
    )
    for session, client in zip(sessions, clients, strict=True):
        session.close()
        client.close()
    return rate


def _echo_rate(target: str, count: int, message: bytes, each: int) -> float:
    streams = [EchoStream(target, "Echo") for _ in range(count)]
    rate = _rate([lambda s=stream: s.round_trip(message) for stream in streams], each)
    for stream in streams:
        stream.close()
    return rate


def _rate(actions: list[Callable[[], Any]], each: int) -> float:
    for action in actions:
        times_of(action, 3)
    threads = [threading.Thread(target=times_of, args=(action, each)) for action in actions]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(actions) * each / (time.perf_counter() - start)
