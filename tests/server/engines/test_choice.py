"""Which engines a server starts; the probes of GPUs and their engines are stand-ins."""

from __future__ import annotations

import pathlib
import re
import sys
import types
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.engines import CudaEngine, DeviceInfo, choice, choose_engines
from stepwire_server.engines.probe import Finding

WELL = Finding("device", True, "a GPU")
LACKING = Finding("ipc", False, "no CUDA IPC", "see the manual", optional=True)


class Gpu:
    """A machine's GPU: what its probe finds, and an engine that remembers what became of it."""

    def __init__(self, *findings: Finding, starts: bool = True, computes: bool = True) -> None:
        self.findings = [WELL, LACKING, *findings]
        self.starts = starts
        self.computes = computes
        self.calls: list[str] = []


class Engine:
    """Stands in for `CudaEngine`."""

    def __init__(self, index: int, gpu: Gpu) -> None:
        gpu.calls.append("start")
        if not gpu.starts:
            raise RuntimeError("no context")
        self._gpu = gpu
        self.device = DeviceInfo(f"cuda:{index}", "GPU", 1 << 30)

    def self_test(self) -> None:
        self._gpu.calls.append("test")
        if not self._gpu.computes:
            raise RuntimeError("libnvrtc.so.13")

    def close(self) -> None:
        self._gpu.calls.append("close")


UNDRIVEN = Finding("driver", False, "no NVIDIA driver", "install it")
FULL = Finding("free memory", False, "all of it is held")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a machine with these GPUs; returns the stand-in for CuPy."""

    def make(*gpus: Gpu) -> Any:
        def examine(index: int, cupy: Any) -> list[Finding]:
            assert cupy is stand_in
            return gpus[index].findings if index < len(gpus) else [UNDRIVEN]

        runtime = types.SimpleNamespace(getDeviceCount=lambda: len(gpus))
        stand_in = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
        monkeypatch.setattr(choice, "examine_cuda", examine)
        monkeypatch.setattr(choice, "CudaEngine", lambda index, cupy, options: Engine(index, gpus[index]))
        return stand_in

    return make


def names(chosen: choice.Choice) -> list[str]:
    return [engine.device.name for engine in chosen.engines]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_every_gpu_that_works_is_taken(machine: Any, device: str) -> None:
    gpus = [Gpu(), Gpu()]
    chosen = choose_engines(device, cupy=machine(*gpus))
    assert (names(chosen), chosen.why) == (["cuda:0", "cuda:1"], "2 GPUs work")
    assert [gpu.calls for gpu in gpus] == [["start", "test"]] * 2
    assert choose_engines(device, cupy=machine(Gpu())).why == "a GPU works"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_that_do_not_work_are_left_out_and_named(machine: Any, device: str) -> None:
    failing = Gpu(computes=False)
    chosen = choose_engines(device, cupy=machine(Gpu(FULL), Gpu(), failing, Gpu(starts=False)))
    assert names(chosen) == ["cuda:1"]
    assert re.fullmatch(
        r"a GPU works; cuda:0 does not work: all of it is held; cuda:2 does not work: a first kernel fails "
        r"\(RuntimeError: libnvrtc\.so\.13\); NVRTC may be missing: .*; cuda:3 does not work: the engine does not "
        r"start \(RuntimeError: no context\).*",
        chosen.why,
    )
    assert failing.calls == ["start", "test", "close"]


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:1", ["cuda:1"]), ("cuda:2,cuda:0", ["cuda:2", "cuda:0"]), ("cuda:00", ["cuda:0"])],
)
def test_gpus_by_number_are_taken_in_that_order(machine: Any, device: str, expected: list[str]) -> None:
    gpus = [Gpu(), Gpu(), Gpu()]
    chosen = choose_engines(device, cupy=machine(*gpus))
    assert (names(chosen), chosen.why) == (expected, f"{device} was asked for")
    assert [bool(gpu.calls) for gpu in gpus] == [f"cuda:{index}" in expected for index in range(3)]


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        (Gpu(UNDRIVEN), "driver", r"^cuda:1 does not work: no NVIDIA driver; install it$"),
        (Gpu(FULL), "free memory", r"^cuda:1 does not work: all of it is held$"),
        (Gpu(FULL, UNDRIVEN), "free memory", "all of it is held"),
        (Gpu(starts=False), "self-test", r"the engine does not start \(RuntimeError: no context\)"),
        (Gpu(computes=False), "self-test", r"a first kernel fails \(RuntimeError: libnvrtc"),
    ],
)
def test_each_gpu_asked_for_by_number_must_work(machine: Any, broken: Gpu, check: str, message: str) -> None:
    broken.calls.clear()
    first, last = Gpu(), Gpu()
    with pytest.raises(UnsupportedFeatureError, match=message) as refused:
        choose_engines("cuda:0,cuda:1,cuda:2", cupy=machine(first, broken, last))
    assert refused.value.metadata == {"field": "device", "check": check}
    assert (first.calls, last.calls) == (["start", "test", "close"], [])
    assert broken.calls in ([], ["start"], ["start", "test", "close"])


@pytest.mark.parametrize("gpus", [[], [Gpu(UNDRIVEN)], [Gpu(UNDRIVEN), Gpu(FULL)]])
def test_without_a_gpu_that_works_the_first_finding_is_told(machine: Any, gpus: list[Gpu]) -> None:
    with pytest.raises(
        UnsupportedFeatureError, match=r"^cuda:0 does not work: no NVIDIA driver; install it$"
    ) as refused:
        choose_engines("cuda", cupy=machine(*gpus))
    assert refused.value.metadata == {"field": "device", "check": "driver"}
    chosen = choose_engines("auto", threads=1, cupy=machine(*gpus))
    assert names(chosen) == ["cpu"]
    assert chosen.why.startswith("no GPU is used: cuda:0 does not work: no NVIDIA driver; install it")
    assert ("; cuda:1 does not work: all of it is held" in chosen.why) is (len(gpus) == 2)
    chosen.engines[0].close()


def test_without_cupy_the_real_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UnsupportedFeatureError, match=r"CuPy cannot be imported.*cupy-cuda13x") as refused:
            choose_engines(device)
        assert refused.value.metadata == {"field": "device", "check": "cupy"}
    (engine,), why, _ = choose_engines("auto", threads=1)
    assert engine.device.name == "cpu"
    assert why == "no GPU is used: CuPy cannot be imported, as `stepwire doctor` explains"
    engine.close()


def test_the_cpu_by_name_asks_nobody_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "examine_cuda", None)
    (engine,), why, _ = choose_engines("cpu", threads=1)
    assert (engine.device.name, why) == ("cpu", "the CPU was asked for")
    engine.close()


UNKNOWN = ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu\n", "auto:1", "cuda:1234", "cuda:٣"]
UNKNOWN_LISTS = ["cuda:0,", ",cuda:0", "cuda:0, cuda:1", "cuda,cuda:1", "cpu,cuda:0", "cuda:0,1"]


@pytest.mark.parametrize("device", UNKNOWN + UNKNOWN_LISTS)
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(InvalidRequestError, match="use auto, cpu, cuda, cuda:N, such as cuda:0, or several") as caught:
        choose_engines(device)
    assert caught.value.metadata == {"field": "device"}


@pytest.mark.parametrize("device", ["cuda:0,cuda:0", "cuda:1,cuda:0,cuda:01"])
def test_a_gpu_named_twice_is_refused(device: str) -> None:
    with pytest.raises(InvalidRequestError, match="name each GPU once"):
        choose_engines(device)


def test_self_test_runs_a_kernel(fake_cupy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    cupy = fake_cupy()
    CudaEngine(cupy=cupy).self_test()
    assert len(cupy.compiled) == 1


def test_a_gpu_that_is_not_used_is_remarkable_where_cupy_is_installed(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_engines("auto", cupy=machine()).remarkable
    assert choose_engines("auto", cupy=machine(Gpu(FULL), Gpu())).remarkable
    assert not choose_engines("auto", cupy=machine(Gpu())).remarkable
    assert not choose_engines("cpu", cupy=machine()).remarkable
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not choose_engines("auto").remarkable
