"""What the doctor finds on machines that lack something, and what it tells to do."""

from __future__ import annotations

import logging
import os
import pathlib
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from stepwire_server.doctor import machine as doctor
from stepwire_server.engines.probe import Finding

MIB = 1 << 20


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Have the probe of GPUs find these findings, by number; returns the stand-in for CuPy that it expects."""

    def play(*found: list[Finding]) -> Any:
        cupy = types.SimpleNamespace(
            cuda=types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: len(found)))
        )

        def examine_cuda(index: int, given: Any = None) -> list[Finding]:
            assert given is cupy
            return found[index]

        monkeypatch.setattr(doctor, "examine_cuda", examine_cuda)
        return cupy

    return play


CUPY = Finding("cupy", True, "CuPy 14.2.0 for CUDA 13.2")
GOOD = Finding("nvrtc", True, "computes")
BAD = Finding("nvrtc", False, "does not compile", "pip install something")
NO_IPC = Finding("ipc", False, "cannot be shared", "docker run --ipc=host --pid=host", optional=True)


# --- the report -----------------------------------------------------------------------------------------------


def test_the_report_is_aligned_and_names_remedies() -> None:
    assert doctor.report([CUPY, BAD, NO_IPC]).splitlines() == [
        "ok      cupy           CuPy 14.2.0 for CUDA 13.2",
        "WRONG   nvrtc          does not compile",
        "                       -> pip install something",
        "note    ipc            cannot be shared",
        "                       -> docker run --ipc=host --pid=host",
    ]


def test_what_is_optional_makes_nobody_ill() -> None:
    assert doctor.healthy([])
    assert doctor.healthy([CUPY, NO_IPC])
    assert not doctor.healthy([CUPY, BAD, NO_IPC])


def test_everything_is_examined(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("STEPWIRE_CACHE_DIR", str(tmp_path / "kernels"))
    findings = doctor.examine("cpu", "127.0.0.1:0")
    assert [finding.check for finding in findings] == [
        "processor",
        "kernel cache",
        "device",
        "port",
        "shared memory",
        "open files",
    ]
    assert all(len(finding.check) <= 14 for finding in findings)
    assert not any("\n" in finding.detail for finding in findings)
    assert [finding.ok for finding in findings] == [not finding.remedy for finding in findings]


# --- the machine ----------------------------------------------------------------------------------------------


def test_numba_compiles_the_kernels() -> None:
    numba = pytest.importorskip("numba")
    finding = doctor.examine_processor()
    assert (finding.ok, finding.remedy) == (True, "")
    assert finding.detail.endswith(f" threads, kernels by Numba {numba.__version__}")


def test_a_numba_that_is_told_to_compile_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    finding = doctor.examine_processor()
    assert (finding.ok, finding.optional, finding.remedy) == (False, True, "unset NUMBA_DISABLE_JIT")
    assert finding.detail.endswith("kernels by NumPy, many times slower: NUMBA_DISABLE_JIT is set")


def test_without_numba_numpy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    finding = doctor.examine_processor()
    assert (finding.check, finding.ok, finding.optional) == ("processor", False, True)
    assert finding.detail.endswith("kernels by NumPy, many times slower: Numba is not installed")
    assert finding.remedy == "pip install numba"


def test_a_broken_numba_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs\\nNumPy 1')\n")
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.examine_processor()
    assert (finding.ok, finding.optional) == (False, False)
    assert finding.detail.endswith("; Numba cannot be imported: Numba needs NumPy 1")
    assert finding.remedy == "pip install --upgrade --force-reinstall numba llvmlite"


def test_the_kernel_cache_is_named(tmp_path: pathlib.Path) -> None:
    environ = {"STEPWIRE_CACHE_DIR": str(tmp_path / "kernels")}
    assert doctor.examine_kernel_cache(environ) == Finding("kernel cache", True, str(tmp_path / "kernels"))


def test_a_kernel_cache_that_others_can_write_is_not_used(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    log = logging.getLogger("stepwire_server.engines.compiled.cache")
    log.setLevel(logging.ERROR)
    try:
        finding = doctor.examine_kernel_cache({"STEPWIRE_CACHE_DIR": str(tmp_path)})
        assert (log.level, log.filters) == (logging.ERROR, [])
    finally:
        log.setLevel(logging.NOTSET)
    assert (finding.check, finding.ok, finding.optional) == ("kernel cache", False, False)
    assert finding.detail == f"{tmp_path} belongs to, or can be written by, another user"
    assert finding.remedy.startswith("mkdir -m 700 ~/stepwire-cache && export STEPWIRE_CACHE_DIR=~/stepwire-cache; ")
    assert caplog.records == []


def test_a_kernel_cache_that_nobody_named_is_done_without(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    finding = doctor.examine_kernel_cache({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert (finding.ok, finding.optional) == (False, True)
    assert "; kernels are kept in " in finding.detail
    assert finding.detail.endswith(" until the process ends")


def test_no_place_for_kernels_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(doctor.kernel_cache, "_temporary", lambda: pathlib.Path(os.devnull) / "kernels")
    (tmp_path / "file").touch()
    finding = doctor.examine_kernel_cache({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert (finding.ok, finding.optional) == (False, False)
    assert finding.detail.endswith("; no temporary directory can be written either")
    assert finding.remedy == "export TMPDIR=/dev/shm; in a container use: docker run --tmpfs /tmp"


SHARED_REMEDY = "docker run --shm-size=1g, or: docker run --ipc=host"


def shared(size_mib: int, free_mib: int) -> Callable[[pathlib.Path], Any]:
    blocks = MIB // 4096
    return lambda _: types.SimpleNamespace(f_frsize=4096, f_blocks=size_mib * blocks, f_bavail=free_mib * blocks)


@pytest.mark.parametrize("free", [64, 0])
def test_shared_memory_as_docker_gives_it(free: int) -> None:
    finding = doctor.examine_shared_memory(statvfs=shared(64, free))
    detail = f"/dev/shm: {free} MiB of 64 MiB are free"
    assert finding == Finding("shared memory", False, detail, SHARED_REMEDY, optional=True)


def test_enough_shared_memory() -> None:
    finding = doctor.examine_shared_memory(statvfs=shared(2048, 1024))
    assert finding == Finding("shared memory", True, "/dev/shm: 1,024 MiB of 2,048 MiB are free", optional=True)


def test_no_shared_memory(tmp_path: pathlib.Path) -> None:
    finding = doctor.examine_shared_memory(tmp_path / "shm")
    assert (finding.ok, finding.optional, finding.remedy) == (False, True, SHARED_REMEDY)
    assert finding.detail.startswith(f"{tmp_path / 'shm'}: [Errno 2] No such file or directory")


def test_no_anonymous_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    finding = doctor.examine_shared_memory(statvfs=shared(2048, 1024))
    assert (finding.ok, "memfd_create" in finding.detail) == (False, True)


@pytest.mark.parametrize(
    ("most", "ok", "detail"),
    [(256, False, "at most 256"), (1024, True, "at most 1024"), (resource.RLIM_INFINITY, True, "no limit")],
)
def test_open_files(most: int, ok: bool, detail: str) -> None:
    remedy = "" if ok else "ulimit -n 4096; in a container use: docker run --ulimit nofile=4096"
    finding = doctor.examine_open_files(lambda _: (most, most))
    assert finding == Finding("open files", ok, detail, remedy, optional=True)


# --- GPUs -----------------------------------------------------------------------------------------------------


def test_a_gpu_that_nobody_asks_for_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine_cuda", None)
    monkeypatch.setattr(doctor, "visible_gpus", None)
    assert doctor.examine_devices("cpu") == [Finding("device", True, "no GPU is asked for (--device cpu)")]


def test_one_gpu(probed: Any) -> None:
    cupy = probed([CUPY, GOOD, NO_IPC])
    for device in ("cuda", "cuda:0", "auto"):
        assert doctor.examine_devices(device, cupy) == [CUPY, GOOD, NO_IPC]


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_asked_for_must_work(probed: Any, device: str) -> None:
    findings = doctor.examine_devices(device, probed([CUPY, BAD]))
    assert findings == [CUPY, BAD]
    assert not doctor.healthy(findings)


def test_for_auto_the_cpu_serves(probed: Any) -> None:
    findings = doctor.examine_devices("auto", probed([CUPY, BAD]))
    assert findings == [CUPY, BAD._replace(optional=True)]
    assert doctor.healthy(findings)


def named(finding: Finding, number: int) -> Finding:
    return finding._replace(detail=f"cuda:{number}: {finding.detail}")


def test_of_cuda_one_gpu_must_work(probed: Any) -> None:
    findings = doctor.examine_devices("cuda", probed([CUPY, BAD], [CUPY, GOOD]))
    assert findings == [CUPY, named(BAD, 0)._replace(optional=True), named(GOOD, 1)]
    assert not doctor.healthy(doctor.examine_devices("cuda", probed([CUPY, BAD], [CUPY, BAD])))


def test_of_gpus_by_number_all_must_work(probed: Any) -> None:
    findings = doctor.examine_devices("cuda:0,cuda:2", probed([CUPY, GOOD], [], [CUPY, BAD]))
    assert findings == [CUPY, named(GOOD, 0), named(BAD, 2)]
    assert not doctor.healthy(findings)


def test_without_cupy_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    (finding,) = doctor.examine_devices("cuda:0,cuda:1")
    assert (finding.check, finding.ok, finding.optional) == ("cupy", False, False)
    (finding,) = doctor.examine_devices("auto")
    assert (finding.check, finding.ok, finding.optional) == ("cupy", False, True)
