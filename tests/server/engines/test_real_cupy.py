"""The stand-in for CuPy beside CuPy itself, which imports without a GPU: names, parameters, views and arguments."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest

from tests.support import fake_cupy

cupy = pytest.importorskip("cupy", reason="CuPy is not installed (pip install '.[cuda13]')", exc_type=ImportError)


@pytest.fixture
def make(tmp_path):
    return lambda **options: fake_cupy.FakeCupy(tmp_path, **options)


def public(owner) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("_")]


def parameters(function) -> list[str]:
    """Name the parameters, by the signature or by the first line of Cython's docstring."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        (told,) = re.findall(r"\A(?:\w+\.)*\w+\((.*?)\)", function.__doc__ or "", re.DOTALL)
        names = [re.split(r"[ *]", each.split("=")[0].strip())[-1] for each in told.split(",")]
    return [name for name in names if name not in ("self", "", "x", "y", "offset")]


def check_against_the_real(fake, real) -> None:
    """Compare every name of the stand-in with CuPy's, and the parameters where CuPy tells them."""
    names = [*public(fake.cuda), "runtime.CUDARuntimeError"]
    for name in names:
        owner = real.cuda
        for part in name.split("."):
            owner = getattr(owner, part)
    for name in public(fake.cuda.runtime):
        assert hasattr(real.cuda.runtime, name), name
    for constant in ("memcpyHostToDevice", "memcpyDeviceToHost"):
        assert getattr(fake.cuda.runtime, constant) == getattr(real.cuda.runtime, constant)
    directions = [getattr(real.cuda.runtime, f"memcpy{each}") for each in ("HostToDevice", "DeviceToHost")]
    assert [*directions, real.cuda.runtime.memcpyDeviceToDevice] == [1, 2, 3], "those of the stand-in's memcpyAsync"
    assert real.cuda.runtime.hostAllocMapped == fake_cupy.driver.MAPPED
    for name in ("memcpyAsync", "memcpy"):
        assert parameters(getattr(fake.cuda.runtime, name)) == parameters(getattr(real.cuda.runtime, name))
    for status in fake_cupy.classes.MESSAGES:
        pretended, error = (each.cuda.runtime.CUDARuntimeError(status) for each in (fake, real))
        assert (str(pretended), pretended.status) == (str(error), error.status)
    for key in fake.cuda.Device(0).attributes:
        assert hasattr(real.cuda.runtime, f"cudaDevAttr{key}"), key
    pairs = [(getattr(fake.cuda, name), getattr(real.cuda, name)) for name in fake_cupy.driver.CLASSES]
    for ours, theirs in [*pairs, (fake.ndarray, real.ndarray)]:
        for name in public(ours):
            assert hasattr(theirs, name), f"{ours.__name__}.{name}"
            if callable(getattr(ours, name)) and ours is not fake.ndarray:
                asked, told = parameters(getattr(ours, name)), parameters(getattr(theirs, name))
                assert asked == told[: len(asked)], f"{ours.__name__}.{name}{told}"
    with fake.cuda.Device(0) as device:
        made = [fake.cuda.Memory(1), fake.cuda.PinnedMemory(1), fake.cuda.Stream(non_blocking=True), fake.cuda.Event()]
        made += [
            device,
            fake.cuda.MemoryPointer(made[0], 0),
            fake.ndarray(1, np.uint8, fake.cuda.MemoryPointer(made[0], 0)),
        ]
    for ours in made:
        theirs = getattr(real.cuda, type(ours).__name__, real.ndarray)
        told = {*dir(theirs), *re.findall(r"~\w+\.(\w+)", theirs.__doc__), *(["ptr", "size"] * (ours is made[1]))}
        assert set(public(ours)) <= told, "the attributes; those of PinnedMemory are those that its pointer takes"
    for name, given in {"Stream": ["non_blocking"], "Event": ["block", "disable_timing"]}.items():
        assert set(given) <= set(parameters(getattr(real.cuda, name)))
    for name in ("Memory", "MemoryPointer", "PinnedMemory", "PinnedMemoryPointer", "Device"):
        assert parameters(getattr(fake.cuda, name)) in ([], parameters(getattr(real.cuda, name))), name
    compilers = [each.cuda.compiler.compile_using_nvrtc for each in (fake, real)]
    assert parameters(compilers[0]) == parameters(compilers[1])
    for name, given in {"load": ["cubin"], "get_function": ["name"]}.items():
        assert given == parameters(getattr(fake.cuda.Module, name)) == parameters(getattr(real.cuda.Module, name))
    assert {"shape", "dtype", "memptr"} <= set(re.findall(r"\w+", real.ndarray.__doc__))


def test_every_name_is_one_of_cupys(make) -> None:
    check_against_the_real(make(), cupy)


def test_arrays_are_cut_as_cupys_are(make) -> None:
    """CuPy makes views of memory that it does not own, and never looks at it, without a GPU."""
    real, fake = cupy, make()
    with fake.cuda.Device(0):
        memory = fake.cuda.Memory(400)
    owned = real.cuda.UnownedMemory(memory.ptr, 400, memory, 0)
    arrays = [
        each.ndarray(100, np.float32, each.cuda.MemoryPointer(m, 0)) for each, m in ((fake, memory), (real, owned))
    ]
    for cut in (
        lambda a: a,
        lambda a: a[10:20],
        lambda a: a[90:200],
        lambda a: a[50:20],
        lambda a: a[200:300],
        lambda a: a[:7].view(np.uint16)[1:],
        lambda a: a.view(np.uint8)[3:7].view(np.float32),
    ):
        ours, theirs = (cut(array) for array in arrays)
        assert [ours.size, ours.nbytes, ours.dtype, ours.data.ptr, len(ours)] == [
            theirs.size,
            theirs.nbytes,
            theirs.dtype,
            theirs.data.ptr,
            len(theirs),
        ]


@pytest.mark.parametrize(
    ("argument", "dtype"), [(1 << 47, np.int64), (np.uint32(7), np.uint32), (np.float32(1.5), np.float32)]
)
def test_arguments_of_kernels_are_as_wide_as_the_stand_in_takes_them(argument, dtype) -> None:
    """Addresses and sizes are integers of Python, which CuPy hands over in 64 bits."""
    scalar = pytest.importorskip("cupy._core._scalar", reason="this CuPy keeps its scalars elsewhere")
    assert scalar.CScalar(argument).dtype == dtype
