"""What `make bench` measures. Each function returns its figures by name; `main` prints them."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import machine
import stepwire
from echo import EchoStream, sized_message
from stepwire.codecs import FLOAT32
from stepwire_server.engines.cpu import CpuEngine
from stepwire_server.engines.protocol import PARAM, Pass
from stepwire_server.process import ServerProcess
from stepwire_server.rules import Precision, Recipe, rule_for

Figures = dict[str, Any]
_CHUNK_BYTES = 4 << 20
# What the messages of a step hold besides the payload, in bytes: header fields, padding, tag and length.
_FRAME_OVERHEAD = {"request": 48, "answer": 224}


def small_step(server: ServerProcess, echo: str, *, size: int = 1000, rounds: int = 40, batch: int = 100) -> Figures:
    """The step of a small model against a raw stream echo of the same bytes, in alternating batches."""
    gradient = {"w": np.full(size, 0.01, np.float32)}
    out = {"w": np.empty(size, np.float32)}
    payload = size * FLOAT32.itemsize
    message = sized_message(payload + _FRAME_OVERHEAD["request"], payload + _FRAME_OVERHEAD["answer"])
    raw = EchoStream(echo, "Echo")
    times: dict[str, list[float]] = {"step": [], "echo": []}
    with stepwire.connect(server.target) as client, client.create_session(gradient) as session:
        actions: dict[str, Callable[[], Any]] = {
            "step": lambda: session.step(gradient, out=out),
            "echo": lambda: raw.round_trip(message),
        }
        for action in actions.values():
            _batch(action, 3 * batch)
        for _ in range(rounds):
            for name, action in actions.items():
                times[name] += _batch(action, batch)
    raw.close()
    figures: Figures = {"parameters": size, "samples": rounds * batch}
    for quantile in (50, 99):
        step, floor = (float(np.percentile(times[name], quantile)) for name in ("step", "echo"))
        figures |= {
            f"step_p{quantile}_us": step * 1e6,
            f"echo_p{quantile}_us": floor * 1e6,
            f"ratio_p{quantile}": step / floor,
        }
    return figures


def large_step(server: ServerProcess, echo: str, *, size: int, rounds: int = 7) -> Figures:
    """The step of a large model against the sum of its parts, round by round in one run."""
    rng = np.random.default_rng(0)
    gradient = {"w": rng.standard_normal(size, np.float32)}
    out = {"w": np.zeros(size, np.float32)}
    payload = size * FLOAT32.itemsize
    body = bytes(_CHUNK_BYTES)
    messages = -(-payload // _CHUNK_BYTES)
    raw = EchoStream(echo, "PushPull")
    engine, step_alone = _engine_step(size, gradient["w"])
    target = np.empty_like(gradient["w"])
    copy = [lambda: np.copyto(target, gradient["w"])] * 2
    times: dict[str, list[float]] = {"step": [], "push_pull": [], "engine": [], "copies": []}
    with stepwire.connect(server.target) as client, client.create_session(out) as session:
        actions: dict[str, Callable[[], Any]] = {
            "step": lambda: session.step(gradient, out=out),
            "push_pull": lambda: raw.push_pull(_CHUNK_BYTES, messages, body),
            "engine": step_alone,
            "copies": lambda: [one() for one in copy],
        }
        for action in actions.values():
            action()
        for _ in range(rounds):
            for name, action in actions.items():
                times[name] += _batch(action, 1)
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


def memory(server: ServerProcess, *, size: int) -> Figures:
    """Server memory a parameter, beyond what the server held before the session."""
    with stepwire.connect(server.target) as client:
        with client.create_session({"w": np.ones(1000, np.float32)}) as warm:
            warm.step({"w": np.ones(1000, np.float32)})
        before = machine.resident_bytes(server.pid)
        gradient = {"w": np.full(size, 0.01, np.float32)}
        with client.create_session(gradient) as session:
            session.step(gradient, out={"w": np.empty(size, np.float32)})
            rest = _settled_resident_bytes(server.pid) - before
            machine.reset_peak(server.pid)
            session.step(gradient, out={"w": np.empty(size, np.float32)})
            peak = machine.peak_resident_bytes(server.pid) - before
    return {"parameters": size, "rest_bytes": rest / size, "peak_bytes": peak / size}


def concurrency(
    server: ServerProcess, echo: str, *, clients: tuple[int, ...] = (1, 8, 64), size: int = 10_000, steps: int = 4000
) -> Figures:
    """Steps a second of several clients at once, and raw echoes of the same bytes by as many streams."""
    payload = size * FLOAT32.itemsize
    message = sized_message(payload + _FRAME_OVERHEAD["request"], payload + _FRAME_OVERHEAD["answer"])
    figures: Figures = {"parameters": size}
    for count in clients:
        each = max(steps // count, 10)
        figures[f"steps_per_second_{count}"] = _session_rate(server, count, size, each)
        figures[f"echoes_per_second_{count}"] = _echo_rate(echo, count, message, each)
        figures[f"ratio_{count}"] = figures[f"steps_per_second_{count}"] / figures[f"echoes_per_second_{count}"]
    return figures


def growth(server: ServerProcess, *, size: int = 10_000, steps: int = 10_000) -> Figures:
    """Resident memory of server and client after a warm-up and after many further steps."""
    gradient = {"w": np.full(size, 0.01, np.float32)}
    with stepwire.connect(server.target) as client, client.create_session(gradient) as session:
        for _ in range(500):
            session.step(gradient)
        gc.collect()
        before = machine.resident_bytes(server.pid), machine.resident_bytes(os.getpid())
        for _ in range(steps):
            session.step(gradient)
        gc.collect()
        after = machine.resident_bytes(server.pid), machine.resident_bytes(os.getpid())
    return {
        "parameters": size,
        "steps": steps,
        "server_growth_kib": (after[0] - before[0]) / 1024,
        "client_growth_kib": (after[1] - before[1]) / 1024,
    }


def _settled_resident_bytes(pid: int, looks: int = 16, pause_seconds: float = 0.5) -> int:
    """Return the least resident memory seen over a while: a server gives free memory back when it is at rest."""
    seen = []
    for _ in range(looks):
        time.sleep(pause_seconds)
        seen.append(machine.resident_bytes(pid))
    return min(seen)


def _batch(action: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


def _engine_step(size: int, gradient: np.ndarray[Any, Any]) -> tuple[CpuEngine, Callable[[], None]]:
    """The engine's own pass over everything, in this process: decode, rule, and encode into an answer."""
    rule, _ = rule_for(stepwire.Adam(), momentum=False)
    recipe, engine = Recipe(rule, measures=True), CpuEngine()
    state = engine.allocate(dict.fromkeys((PARAM, *rule.slots), Precision.FLOAT32), size)
    staged, out = state.receive().put(0, gradient), np.empty_like(gradient)
    step = Pass(recipe, (1.0, 1.0, *rule.scalars(stepwire.Adam().hyperparameters(), 1)))
    return engine, lambda: state.update(step, 0, staged, 0, size, out).wait()


def _session_rate(server: ServerProcess, count: int, size: int, each: int) -> float:
    gradient = {"w": np.full(size, 0.01, np.float32)}
    clients = [stepwire.connect(server.target) for _ in range(count)]
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
        _batch(action, 3)
    threads = [threading.Thread(target=_batch, args=(action, each)) for action in actions]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(actions) * each / (time.perf_counter() - start)
