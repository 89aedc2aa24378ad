from __future__ import annotations

import re
import sys

import pytest

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire_server.engines import CudaEngine, choose_engine


def test_auto_takes_a_gpu_that_works(fake_cupy) -> None:
    engine, why = choose_engine("auto", cupy=fake_cupy())
    assert engine.device.name == "cuda:0"
    assert why == "a GPU works"


def test_a_gpu_by_number(fake_cupy) -> None:
    assert choose_engine("cuda", cupy=fake_cupy()).engine.device.name == "cuda:0"
    assert choose_engine("cuda:1", cupy=fake_cupy()).engine.device.name == "cuda:1"


def test_the_cpu_by_name_asks_nobody_for_a_gpu(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    engine, why = choose_engine("cpu", threads=1)
    assert (engine.device.name, why) == ("cpu", "the CPU was asked for")
    engine.close()


def broken(fake_cupy, monkeypatch, kind: str):
    if kind == "no cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
        return None
    if kind == "wrong sums":
        monkeypatch.setattr("stepwire_server.engines.cuda.CudaState.sum_of_squares", lambda *_: 24.0)
        return fake_cupy()
    return fake_cupy(**{"no device": {"devices": 0}, "no compiler": {"broken_compiler": True}}[kind])


KINDS = [
    ("no cupy", r"CuPy cannot be imported .*pip install 'stepwire\[cuda13\]'"),
    ("no device", r"CUDA sees 0 device\(s\); check nvidia-smi, .*docker run --gpus all"),
    ("no compiler", r"RuntimeError: CuPy failed to load libnvrtc.so.13\); NVRTC may be missing"),
    ("wrong sums", r"3² \+ 4² = 24\.0"),
]


@pytest.mark.parametrize(("kind", "message"), KINDS)
def test_auto_falls_back_to_the_cpu_and_says_why(fake_cupy, monkeypatch, kind, message) -> None:
    engine, why = choose_engine("auto", threads=1, cupy=broken(fake_cupy, monkeypatch, kind))
    assert engine.device.name == "cpu"
    assert re.search(f"no GPU is used: cuda:0 does not work: .*{message}", why)
    engine.close()


@pytest.mark.parametrize(("kind", "message"), KINDS)
def test_a_gpu_asked_for_by_name_must_work(fake_cupy, monkeypatch, kind, message) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message) as caught:
        choose_engine("cuda", cupy=broken(fake_cupy, monkeypatch, kind))
    assert caught.value.metadata == {"field": "device"}


def test_a_gpu_that_is_not_there(fake_cupy) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"cuda:2 does not work: CUDA sees 2 device"):
        choose_engine("cuda:2", cupy=fake_cupy())


@pytest.mark.parametrize("device", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu\n", "auto:1"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(InvalidRequestError, match="use auto, cpu, cuda or cuda:N") as caught:
        choose_engine(device)
    assert caught.value.metadata == {"field": "device"}


def test_self_test_runs_a_kernel(fake_cupy) -> None:
    cupy = fake_cupy()
    CudaEngine(cupy=cupy).self_test()
    assert len(cupy.compiled) == 1
