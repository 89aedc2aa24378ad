"""The choice of a server's engines, and the reason for it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.cuda import CudaEngine, CudaOptions
from stepwire_server.engines.probe import Finding, asked_gpus, examine_cuda, visible_gpus
from stepwire_server.engines.protocol import Engine

__all__ = ["Choice", "choose_engines"]

_OPTIONS = CudaOptions()
_DEVICE = re.compile(r"auto|cpu|cuda|cuda:[0-9]{1,3}(?:,cuda:[0-9]{1,3})*")


class Choice(NamedTuple):
    """Engines and the reason for them.

    Attributes:
        engines: ready for use, one a device, at least one; whoever asked closes them.
        why: a sentence for the log, which names the GPUs left out.
        remarkable: an installation does not serve its purpose: CuPy is there and a GPU is not used.
    """

    engines: tuple[Engine, ...]
    why: str
    remarkable: bool = False


def choose_engines(
    device: str = "auto",
    threads: int | None = None,
    cupy: Any = None,
    options: CudaOptions = _OPTIONS,
    lane_spin_microseconds: int = 0,
) -> Choice:
    """Start the engines for a server's devices.

    Args:
        device: `"cpu"`, or `"cuda"` for every visible GPU that works. GPUs by number, such as `"cuda:0,cuda:2"`, must
            all work. `"auto"` is `"cuda"`, and the CPU where no GPU works.
        threads: the threads of the CPU engine; None for one a processor.
        cupy: a stand-in for the CuPy module; None to import CuPy where it is needed.
        options: the working memory of GPU engines.
        lane_spin_microseconds: the moment of spinning of the CPU engine's compiled lanes; see `LaneLoops`.

    Returns:
        The engines and the reason for them.

    Raises:
        InvalidRequestError: `device` is none of these.
        UnsupportedFeatureError: GPUs were asked for and none works, or a GPU asked for by number does not. The message
            names the fault and the remedy.
    """
    cpu = functools.partial(CpuEngine, threads, lane_spin_microseconds=lane_spin_microseconds)
    numbers = _numbers(device)
    if device == "cpu":
        return Choice((cpu(),), "the CPU was asked for")
    if numbers:
        return Choice(_start_all(numbers, cupy, options), f"{device} was asked for")
    engines, problems = _start_working(visible_gpus(cupy), cupy, options)
    if not engines and device == "cuda":
        raise problems[0]
    if not engines and all(problem.metadata.get("check") == "cupy" for problem in problems):  # of most machines: short
        return Choice((cpu(),), "no GPU is used: CuPy cannot be imported, as `stepwire doctor` explains")
    told = "; ".join(map(str, problems))
    remarkable = any(problem.metadata.get("check") != "cupy" for problem in problems)
    if not engines:
        return Choice((cpu(),), f"no GPU is used: {told}", remarkable)
    working = "a GPU works" if len(engines) == 1 else f"{len(engines)} GPUs work"
    return Choice(engines, f"{working}; {told}" if told else working, remarkable)


def _numbers(device: str) -> tuple[int, ...]:
    """Return the numbers of the GPUs that are asked for by number; none for other devices."""
    if not _DEVICE.fullmatch(device):
        raise _invalid(device, "use auto, cpu, cuda, cuda:N, such as cuda:0, or several: cuda:0,cuda:1")
    numbers = asked_gpus(device)
    if len(set(numbers)) < len(numbers):
        raise _invalid(device, "name each GPU once")
    return numbers


def _start_all(numbers: Iterable[int], cupy: Any, options: CudaOptions) -> tuple[Engine, ...]:
    with contextlib.ExitStack() as started:
        engines = tuple(started.enter_context(contextlib.closing(_start(number, cupy, options))) for number in numbers)
        started.pop_all()
    return engines


def _start_working(
    numbers: Iterable[int], cupy: Any, options: CudaOptions
) -> tuple[tuple[Engine, ...], list[UnsupportedFeatureError]]:
    """Start the GPUs that work; returns their engines, and why the others do not."""
    engines: list[Engine] = []
    problems: list[UnsupportedFeatureError] = []
    with contextlib.ExitStack() as started:
        for number in numbers:
            try:
                engines.append(started.enter_context(contextlib.closing(_start(number, cupy, options))))
            except UnsupportedFeatureError as problem:
                problems.append(problem)
        started.pop_all()
    return tuple(engines), problems


def _start(number: int, cupy: Any, options: CudaOptions) -> CudaEngine:
    """Start a GPU's engine and run a kernel on it, or say what is missing."""
    for finding in examine_cuda(number, cupy):
        if not finding.ok and not finding.optional:
            raise _broken(number, finding)
    try:
        engine = CudaEngine(number, cupy, options)
    except Exception as problem:  # CuPy has no common base for what a broken installation raises
        raise _broken(number, _failed("the engine does not start", problem)) from problem
    try:
        engine.self_test()
    except Exception as problem:
        engine.close()
        raise _broken(number, _failed("a first kernel fails", problem)) from problem
    return engine


def _failed(what: str, problem: Exception) -> Finding:
    return Finding(
        "self-test",
        False,
        f"{what} ({type(problem).__name__}: {problem})",
        "NVRTC may be missing: pip install 'cuda-toolkit[nvrtc,cudart]==13.*', or 12.* for CUDA 12",
    )


def _broken(number: int, finding: Finding) -> UnsupportedFeatureError:
    told = f"{finding.detail}; {finding.remedy}" if finding.remedy else finding.detail
    return UnsupportedFeatureError(
        f"cuda:{number} does not work: {told}", metadata={"field": "device", "check": finding.check}
    )


def _invalid(device: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"device is {device!r}; {problem}", metadata={"field": "device"})
