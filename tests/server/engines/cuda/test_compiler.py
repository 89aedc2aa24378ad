"""Machine code is made once and found again, by whoever it fits, wherever files can be written."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import pytest

from stepwire.errors import DataLossError, ResourceExhaustedError
from stepwire_server.engines.compiled import cache as kernel_cache
from stepwire_server.engines.cuda import compiler
from stepwire_server.engines.cuda.compiler import Compiler, cubin_directory
from stepwire_server.engines.cuda.device import CudaDevice

SOURCE = 'extern "C" __global__ void nothing() {}'


class Kernels:
    """Kernels in Python, in the place of compiled ones."""

    names = ("nothing",)

    def launch(self, name: str, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
        pass


@pytest.fixture
def place(tmp_path) -> pathlib.Path:
    directory = tmp_path / "cubins"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def make(fake):
    """Make a compiler, with a CuPy of its own, as each process has one."""

    def make(directory: pathlib.Path | None, device: int = 0, **options: Any) -> tuple[Any, Compiler]:
        cupy = fake(library=Kernels(), **options)
        return cupy, Compiler(CudaDevice(cupy, device), directory)

    return make


def run(cupy: Any, module: Any, device: int = 0) -> None:
    """Show that a module is one."""
    with cupy.cuda.Device(device):
        module.get_function("nothing")((1,), (32,), ())
        cupy.cuda.Device(device).synchronize()


def files(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_source_is_compiled_once_and_found_by_the_next(make, place) -> None:
    cupy, first = make(place)
    run(cupy, first.load("update", SOURCE))
    assert (cupy.compiled, first.compiled) == ([SOURCE], 1)
    (name,) = files(place)
    assert name.startswith("update_") and name.endswith(".cubin")
    content = (place / name).read_bytes()
    assert content == b"fake cubin sm_90\n" + SOURCE.encode()
    run(cupy, first.load("update", SOURCE))
    other, second = make(place)
    run(other, second.load("update", SOURCE))
    assert (cupy.compiled, first.compiled, other.compiled, second.compiled) == ([SOURCE], 1, [], 0)
    assert (place / name).read_bytes() == content


def test_another_device_of_the_same_kind_takes_the_same_file(make, place) -> None:
    cupy, first = make(place)
    first.load("update", SOURCE)
    second = Compiler(CudaDevice(cupy, 1), place)
    run(cupy, second.load("update", SOURCE), device=1)
    assert (len(cupy.compiled), second.compiled) == (1, 0)


def test_another_source_or_name_is_another_file(make, place) -> None:
    _, compiler = make(place)
    for name, source in [("update", SOURCE), ("update", SOURCE + "//"), ("measure", SOURCE), ("n" * 300, SOURCE)]:
        compiler.load(name, source)
    assert (compiler.compiled, len(files(place))) == (4, 4)
    assert max(map(len, files(place))) < 150


def test_another_capability_is_another_file(make, place) -> None:
    for capability in ("90", "80", "90"):
        cupy, compiler = make(place, capability=capability)
        run(cupy, compiler.load("update", SOURCE))
    assert compiler.compiled == 0
    assert sorted((place / name).read_bytes()[:16] for name in files(place)) == [
        b"fake cubin sm_80",
        b"fake cubin sm_90",
    ]


def test_another_cupy_runtime_or_option_is_another_file(make, place, monkeypatch) -> None:
    make(place)[1].load("update", SOURCE)
    cupy, _ = make(place)
    cupy.__version__ = "15.0.0"
    newer = Compiler(CudaDevice(cupy, 0), place)
    newer.load("update", SOURCE)
    assert (newer.compiled, len(files(place))) == (1, 2)
    cupy, _ = make(place)
    cupy.cuda.runtime.runtimeGetVersion = lambda: 14000
    newest = Compiler(CudaDevice(cupy, 0), place)
    newest.load("update", SOURCE)
    assert (newest.compiled, len(files(place))) == (1, 3)
    monkeypatch.setattr(compiler, "COMPILE_OPTIONS", ("--fmad=false", "--extra"))
    _, other = make(place)
    other.load("update", SOURCE)
    assert (other.compiled, len(files(place))) == (1, 4)


@pytest.mark.parametrize("damage", [b"", b"half a cu", b"fake cubin sm_52\nfor another GPU"])
def test_a_damaged_file_is_made_anew_with_a_warning(make, place, caplog, damage) -> None:
    make(place)[1].load("update", SOURCE)
    (path,) = place.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING, compiler.__name__):
        cupy, second = make(place)
        run(cupy, second.load("update", SOURCE))
    (record,) = caplog.records
    assert f"machine code in {path} is made anew: CUDA_ERROR" in record.getMessage()
    assert (second.compiled, path.read_bytes(), len(files(place))) == (1, whole, 1)
    assert make(place)[1].load("update", SOURCE)


@pytest.mark.parametrize("kind", ["missing", "a file", "no name for a file"])
def test_a_directory_that_cannot_be_written_is_done_without(make, tmp_path, caplog, kind) -> None:
    """As root, all that can be written may be: so these are places where nobody can."""
    directory = tmp_path / ("missing" if kind == "missing" else "file")
    if kind == "a file":
        directory.write_text("this is no directory")
    if kind == "no name for a file":
        directory = pathlib.Path("/dev/null/kernels")
    cupy, made = make(directory)
    with caplog.at_level(logging.WARNING, compiler.__name__):
        run(cupy, made.load("update", SOURCE))
        run(cupy, made.load("update", SOURCE))
    assert made.compiled == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all(f"is not kept in {directory}: " in message for message in messages)
    assert files(tmp_path) == (["file"] if kind == "a file" else [])


@pytest.mark.parametrize("call", ["fdopen", "replace"])
def test_a_disk_that_is_full_leaves_nothing_behind(make, place, caplog, monkeypatch, call) -> None:
    whole = getattr(compiler.os, call)

    def full(*arguments: Any, **options: Any) -> Any:
        if call == "fdopen":
            whole(*arguments, **options).close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, call, full)
    cupy, made = make(place)
    with caplog.at_level(logging.WARNING, compiler.__name__):
        run(cupy, made.load("update", SOURCE))
    assert "No space left on device" in caplog.text
    assert files(place) == []


def test_an_error_of_the_compiler_passes_through_and_leaves_no_file(make, place) -> None:
    _, broken = make(place, broken_compiler=True)
    with pytest.raises(RuntimeError, match="failed to load libnvrtc"):
        broken.load("update", SOURCE)
    assert (broken.compiled, files(place)) == (0, [])


def test_code_that_the_driver_does_not_take_is_not_kept(make, place) -> None:
    cupy, made = make(place)
    refused = cupy.cuda.runtime.CUDARuntimeError(98)
    cupy.fail_next("Module", refused)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError) as caught:
        made.load("update", SOURCE)
    assert caught.value is refused
    assert files(place) == []


@pytest.mark.parametrize("shared", [True, False], ids=["one compiler", "two processes"])
def test_threads_may_compile_the_same_at_once(make, place, together, shared) -> None:
    first = make(place)
    second = first if shared else make(place)
    works = [
        lambda made=made, name=name: run(made[0], made[1].load(name, SOURCE))
        for made in (first, second)
        for name in ("update", "measure")
    ]
    together(*works)
    assert len(files(place)) == 2
    assert all((place / name).read_bytes() == b"fake cubin sm_90\n" + SOURCE.encode() for name in files(place))


# --- where it is kept ---------------------------------------------------------------------------------------------


def test_the_directory_is_cupys_else_that_of_all_kernels(tmp_path) -> None:
    cupys, ours = str(tmp_path / "cupy"), str(tmp_path / "ours")
    assert cubin_directory({"CUPY_CACHE_DIR": cupys, "STEPWIRE_CACHE_DIR": ours}) == tmp_path / "cupy"
    assert cubin_directory({"CUPY_CACHE_DIR": "", "STEPWIRE_CACHE_DIR": ours}) == tmp_path / "ours"
    assert cubin_directory({"STEPWIRE_CACHE_DIR": ours}) == tmp_path / "ours"
    assert cubin_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "stepwire"
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in tmp_path.iterdir())


def test_a_directory_that_others_can_write_is_not_trusted(tmp_path, caplog) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with caplog.at_level(logging.WARNING, kernel_cache.__name__):
        chosen = cubin_directory({"CUPY_CACHE_DIR": str(shared)})
    assert chosen != shared and chosen.stat().st_mode & 0o777 == 0o700
    assert "can be written by, another user" in caplog.text


def test_a_compiler_without_a_directory_takes_that_of_the_environment(make, place, monkeypatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(place))
    _, made = make(None)
    made.load("update", SOURCE)
    assert len(files(place)) == 1


def test_a_driver_without_memory_for_code_is_no_damaged_file(make, place) -> None:
    cupy, first = make(place)
    first.load("update", SOURCE)
    cupy, second = make(place)
    reclaimed: list[bool] = []
    second._device.on_shortage(lambda: reclaimed.append(True))
    cupy.fail_next("Module", cupy.cuda.driver.CUDADriverError(2))
    run(cupy, second.load("update", SOURCE))
    assert (second.compiled, reclaimed) == (0, [True])
    for _ in range(2):
        cupy.fail_next("Module", cupy.cuda.driver.CUDADriverError(2))
    with pytest.raises(ResourceExhaustedError, match="no memory on cuda:0"):
        second.load("update", SOURCE)
    assert (second.compiled, len(files(place))) == (0, 1)


def test_a_lost_device_is_no_damaged_file(make, place) -> None:
    cupy, first = make(place)
    first.load("update", SOURCE)
    cupy, second = make(place)
    cupy.fail_next("Module", cupy.cuda.driver.CUDADriverError(700))
    with pytest.raises(DataLossError, match="illegal address"):
        second.load("update", SOURCE)
    assert second.compiled == 0
