"""Which engine a server runs on, and why."""

from __future__ import annotations

import importlib
import logging
import re
from typing import Any, NamedTuple

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.engines.cpu import CpuEngine
from stepwire_server.engines.cuda import CudaEngine
from stepwire_server.engines.protocol import Engine

__all__ = ["Choice", "choose_engine"]

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An engine and the reason for it.

    Attributes:
        engine: ready for use; whoever asked closes it.
        why: a sentence for the log and for `stepwire doctor`.
    """

    engine: Engine
    why: str


def choose_engine(device: str = "auto", threads: int | None = None, cupy: Any = None) -> Choice:
    """Start the engine for a device.

    Args:
        device: `"cpu"`, `"cuda"`, `"cuda:N"`, or `"auto"` for the first GPU that works, else the CPU.
        threads: threads of the CPU engine; None for one a processor.
        cupy: a stand-in for the CuPy module; None to import it if it is needed.

    Raises:
        InvalidRequestError: `device` is none of these.
        UnsupportedFeatureError: a GPU was asked for by name and does not work; the message says what is missing and
            how to get it.
    """
    name = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", device)
    if name is None:
        raise InvalidRequestError(
            f"device is {device!r}; use auto, cpu, cuda or cuda:N, such as cuda:0", metadata={"field": "device"}
        )
    if device == "cpu":
        choice = Choice(CpuEngine(threads), "the CPU was asked for")
    else:
        choice = _choose_cuda(device, int(name[1] or 0), threads, cupy)
    _log.info("engine on %s (%s): %s", choice.engine.device.name, choice.engine.device.description, choice.why)
    return choice


def _choose_cuda(device: str, index: int, threads: int | None, cupy: Any) -> Choice:
    try:
        engine = _start_cuda(index, cupy)
    except UnsupportedFeatureError as problem:
        if device == "auto":
            return Choice(CpuEngine(threads), f"no GPU is used: {problem}")
        raise
    return Choice(engine, "the GPU was asked for" if device != "auto" else "a GPU works")


def _start_cuda(index: int, cupy: Any) -> CudaEngine:
    """Start a GPU engine and run a kernel on it, or say what is missing."""
    try:
        cupy = cupy or importlib.import_module("cupy")
    except ImportError as problem:
        raise _missing(
            index, f"CuPy cannot be imported ({problem}); pip install 'stepwire[cuda13]' or 'stepwire[cuda12]'"
        ) from problem
    count = cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0
    if index >= count:
        raise _missing(
            index,
            f"CUDA sees {count} device(s); check nvidia-smi, CUDA_VISIBLE_DEVICES, and docker run --gpus all",
        )
    try:
        engine = CudaEngine(index, cupy)
        engine.self_test()
    except Exception as problem:  # CuPy has no common base for what a broken installation raises
        raise _missing(
            index,
            f"a first kernel fails ({type(problem).__name__}: {problem}); NVRTC may be missing, "
            "which 'stepwire[cuda13]' and 'stepwire[cuda12]' bring",
        ) from problem
    return engine


def _missing(index: int, what: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(f"cuda:{index} does not work: {what}", metadata={"field": "device"})
