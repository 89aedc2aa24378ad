"""The GPU benchmark, in a tiny form, on the stand-in for CuPy: that it runs through, not what it measures."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import json
import mmap
import pathlib
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from stepwire.transports.cuda.driver import CudaDriver
from stepwire_server.engines import CudaEngine
from stepwire_server.engines.cuda.engine import CudaOptions
from tests.support.fake_cupy import FakeCupy

ROOT = pathlib.Path(__file__).parents[1]
TORCH_FIGURES = {"ratio_torch", "ratio_torch_bfloat16"}
TINY: dict[str, Any] = {
    "sizes": (1500, 3000),
    "bus_sizes": (5000,),
    "rounds": 1,
    "bus_rounds": 1,
    "pipeline_steps": 3,
    "chunk_bytes": 4096,
    "pinned_chunk_bytes": 8192,
    "tensors": (3, 1000),
    "guard_size": 1500,
    "wiped_bytes": 4096,
}
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed; it compiles the CUDA kernels for the processor"
)


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The directory of compiled kernels, which outlives a run, as for the tests of engines."""
    cache = getattr(request.config, "cache", None)
    directory = pathlib.Path(cache.mkdir("stepwire-kernels")) if cache else tmp_path_factory.mktemp("kernels")
    directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPWIRE_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture(scope="module")
def bench() -> Iterator[types.SimpleNamespace]:
    """The benchmark's modules, which import one another by their bare names."""
    names = [path.stem for path in (ROOT / "benchmarks").glob("gpu*.py")] + ["idle_cupy", "machine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        modules = types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")
        gc.freeze()  # sections search for cycles before they measure, and need not search modules
        yield modules
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def fake(directory: pathlib.Path) -> Callable[..., Any]:
    """Make stand-ins for CuPy."""

    def make(**options: Any) -> Any:
        cupy = FakeCupy(directory, order="lazy", **options)
        cupy.cuda.get_elapsed_time = lambda begin, end: 1.0  # events of the stand-in have no time
        return cupy

    return make


@pytest.fixture
def devices() -> list[Any]:
    """The stand-ins that `make_gpu` has made."""
    return []


@pytest.fixture
def make_gpu(
    bench: types.SimpleNamespace, fake: Callable[..., Any], devices: list[Any]
) -> Iterator[Callable[..., Any]]:
    """Make what the sections are run on: a device without a clock of its own, and torch's CPU."""
    made: list[Any] = []

    def make(*, torch: bool, **extent: Any) -> Any:
        cupy = fake()
        devices.append(cupy)
        engine = CudaEngine(0, cupy, CudaOptions(buffers=3, buffer_bytes=1 << 15, cells=32), cupy.libcuda)
        side = bench.gpu_torch.TorchSide(pytest.importorskip("torch"), "cpu", None) if torch else None
        chosen = bench.gpu_clock.Extent(**(TINY | extent))
        gpu = bench.gpu_clock.Gpu(engine, bench.gpu_clock.Clock(engine._resources.device, 4096), side, chosen)
        made.append((gpu, cupy))
        return gpu

    yield make
    for gpu, cupy in made:
        gpu.tidy()
        gpu.engine.close()
        cupy.check()


@pytest.fixture
def child(
    bench: types.SimpleNamespace, fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Stand in for a new process: a new engine on a new stand-in."""

    def run(environ: Mapping[str, str]) -> dict[str, float]:
        with monkeypatch.context() as patch:
            patch.setenv("CUPY_CACHE_DIR", environ["CUPY_CACHE_DIR"])
            seconds: dict[str, float] = bench.gpu_creation.seconds(fake())
        return seconds

    return run


@pytest.fixture
def client(bench: types.SimpleNamespace, devices: list[Any]) -> Callable[..., Any]:
    """Stand in for a client's process: the driver's library over the same device."""
    return lambda told: bench.gpu_ipc_child.Opened(told, CudaDriver(devices[-1].libcuda))


@pytest.fixture
def described() -> dict[str, dict[str, str]]:
    return {"machine": {"cores": "2"}, "device": {"name": "Pretended GPU"}}


@pytest.mark.slow
def test_every_goal_gets_a_figure_beside_torch(bench, make_gpu, child, client, described) -> None:
    gpu, kept = make_gpu(torch=True), []
    results = bench.gpu.run(gpu, lambda results: kept.append(len(results.figures)), child, client)
    assert not results.reasons and not results.failed
    assert kept == list(range(1, len(results.figures) + 1))
    assert {goal.section for goal in bench.gpu.GOALS} <= {name.split()[0] for name in results.figures}
    for section, figures in results.figures.items():
        assert all(value is not None for value in figures.values()), section
        assert {goal.figure for goal in bench.gpu.GOALS if goal.section == section.split()[0]} <= figures.keys()
    assert results.figures["guard"]["relative_error"] < bench.gpu_sections.GUARD_ERROR
    assert results.figures["memory"]["rest_bytes"] == pytest.approx(12.0, abs=0.5)
    assert results.figures["memory"]["step_bytes"] == pytest.approx(16.0, abs=0.5)
    assert results.figures["memory"]["left_bytes"] == 0.0
    told = bench.gpu.report(described, results)
    judged = told.partition("\ngoals\n")[2].splitlines()
    assert len(judged) == 5 * 2 + 1 + 2 + 1
    assert all(line.endswith(("  met", "  missed")) for line in judged)


def test_without_torch_the_report_says_so(bench, make_gpu, child, client, described) -> None:
    results = bench.gpu.run(make_gpu(torch=False, bus_sizes=()), child=child, client=client)
    missing = {name for figures in results.figures.values() for name, value in figures.items() if value is None}
    assert missing == TORCH_FIGURES and not results.reasons
    assert results.figures["guard"]["relative_error"] < bench.gpu_sections.GUARD_ERROR
    judged = bench.gpu.report(described, results).partition("\ngoals\n")[2].splitlines()
    assert sum(line.endswith("not measured: torch is not installed") for line in judged) == 2 * 2 + 1


def test_what_does_not_fit_and_what_time_is_too_short_for_is_told(bench, make_gpu, child, client, described) -> None:
    results = bench.gpu.run(
        make_gpu(torch=False, sizes=(1500, 10**12), bus_sizes=(10**12,)), child=child, client=client
    )
    assert (
        set(results.reasons) == {"kernel 1e+06M", "moments 1e+06M", "ipc 1e+06M", "bus 1e+06M"} and not results.failed
    )
    assert all("of device memory, " in reason for reason in results.reasons.values())
    assert "kernel 1e+06M: not measured, a pass over" in bench.gpu.report(described, results)
    late = bench.gpu.run(make_gpu(torch=False, seconds=-1.0), child=child, client=client)
    assert all(reason == "the benchmark's -1 seconds were over" for reason in late.reasons.values())
    assert late.reasons.keys() == late.figures.keys()


def test_a_section_that_breaks_leaves_the_others(bench, make_gpu, child, client, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench.gpu, "many_small", lambda gpu: {}["gone"])
    results = bench.gpu.run(make_gpu(torch=False, sizes=(1500,), bus_sizes=()), child=child, client=client)
    assert results.failed and results.reasons == {"many_small": "KeyError: 'gone'"}
    assert "Traceback" in capsys.readouterr().err
    assert results.figures["memory"]


def test_a_wrong_kernel_is_not_measured(bench, make_gpu, monkeypatch) -> None:
    monkeypatch.setattr(bench.gpu, "guard", lambda gpu: {"relative_error": float("nan")})
    with pytest.raises(SystemExit, match="a wrong kernel is not measured"):
        bench.gpu.run(make_gpu(torch=False))


def test_results_are_written_under_the_devices_name(bench, make_gpu, described, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench.gpu, "__file__", str(tmp_path / "gpu.py"))
    results = bench.gpu.Results()
    results.figures["memory"] = {"rest_bytes": 12.0}
    bench.gpu._write(described, results)
    written = json.loads((tmp_path / "results" / "pretended-gpu.json").read_text())
    assert written == {**described, "memory": {"rest_bytes": 12.0}, "reasons": {}}
    assert set(bench.gpu._describe(make_gpu(torch=False))) >= {"name", "driver", "runtime", "cupy", "torch"}


def test_the_command_measures_prints_and_writes(bench, fake, tmp_path, monkeypatch, capsys) -> None:
    """But for new processes, which have no stand-in for CuPy."""
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    for name, module in (("cupy", fake()), ("torch", torch)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(bench.gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(bench.gpu, "QUICK", bench.gpu_clock.Extent(**TINY))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    ran = types.SimpleNamespace(returncode=1, stderr="no")  # of the section's alone: the stand-in runs a compiler
    monkeypatch.setattr("gpu_sections.subprocess", types.SimpleNamespace(run=lambda *_, **__: ran))
    monkeypatch.setattr(bench.gpu, "_driver", lambda: "580.0")
    with pytest.raises(SystemExit) as ended:
        bench.gpu.main()
    assert ended.value.code == 0
    assert "creation: not measured, a new process failed: no" in capsys.readouterr().out
    assert json.loads((tmp_path / "results" / "pretended-gpu.json").read_text())["device"]["driver"] == "580.0"


def test_a_machine_without_a_gpu_is_told_so() -> None:
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is installed")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU benchmark: CuPy cannot be imported")


def test_pythons_time_for_a_piece_is_told_of_every_kind_of_moments(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_python.py", "--quick"])
    monkeypatch.setattr(bench.gpu_python, "_PIECES", {"4 KiB": 1 << 10})
    bench.gpu_python.main()
    rows = [line.split() for line in capsys.readouterr().out.partition("moments")[2].splitlines()[1:]]
    assert [row[:3] for row in rows] == [[name, "4", "KiB"] for name in ("float32", "telemetry", "bfloat16", "int8")]
    assert all(float(figure) > 0.0 for row in rows for figure in row[3:])


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "blocks"),
    [
        (32, 0, {"75": 4, "90": 8, "100": 8}),
        (50, 24_332, {"75": 2, "90": 4, "100": 4}),
        (65, 0, {"75": 3, "90": 3, "100": 3}),
        (40, 3072, {"75": 4, "90": 6, "100": 6}),
        (16, 60_000, {"75": 1, "90": 3, "100": 3}),
    ],
)
def test_blocks_follow_from_registers_shared_memory_and_threads(bench, registers, shared_bytes, blocks) -> None:
    """The numbers are those of NVIDIA's occupancy calculator."""
    figures = bench.gpu_kernels.Figures(registers, 0, 0, shared_bytes)
    limits = bench.gpu_kernels.ARCHITECTURES
    assert {arch: figures.blocks(limits[arch]) for arch in limits} == blocks


def test_the_assemblers_words_become_figures(bench, monkeypatch) -> None:
    told = """
ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers, 8 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""
    done = types.SimpleNamespace(returncode=0, stdout="", stderr=told)
    monkeypatch.setattr(bench.gpu_kernels.subprocess, "run", lambda *_, **__: done)
    found = bench.gpu_kernels.figures_of("nvcc", [], "90")
    assert found == {"one": (42, 8, 16, 8192), "other": (30, 0, 0, 0)}


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not installed; it compiles the kernels for real devices"
)
def test_the_command_tells_figures_of_kernels(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--arch", "90", "--only", "decode_signed"])
    bench.gpu_kernels.main()
    _, row = capsys.readouterr().out.splitlines()
    name, arch, registers, *others = row.split()
    assert (name, arch) == ("decode_signed_blocks", "90") and 0 < int(registers) <= 64
    assert [int(other) for other in others] == [0, 0, 1024, 8]


def test_a_client_that_cannot_open_the_memory_is_told_with_its_last_words(bench, make_gpu) -> None:
    with pytest.raises(bench.gpu_clock.Skipped, match="a client process failed: .*"):
        bench.gpu_ipc.ipc(make_gpu(torch=False), 1500)


def test_a_device_without_ipc_is_told(bench, make_gpu, devices, client) -> None:
    gpu = make_gpu(torch=False)
    devices[-1].libcuda.statuses["cuIpcGetMemHandle"] = 801
    with pytest.raises(bench.gpu_clock.Skipped, match="CUDA does not share memory of cuda:0"):
        bench.gpu_ipc.ipc(gpu, 1500, client)


# --- experiments ---------------------------------------------------------------------------------------------------


@pytest.fixture
def workbench(bench: types.SimpleNamespace, fake: Callable[..., Any]) -> Iterator[Any]:
    """A device for experiments in a tiny form."""
    cupy = fake(memory_bytes=16 << 20)
    engine = CudaEngine(0, cupy, CudaOptions(buffers=3, buffer_bytes=1 << 15, cells=32), cupy.libcuda)
    yield bench.gpu_trials.Workbench(
        engine,
        bench.gpu_clock.Clock(engine._resources.device, 4096),
        size=3000,
        piece_bytes=(4096, 8192),
        copies=2,
        copy_bytes=4096,
        pinned_bytes=4 * mmap.PAGESIZE,
        busy_ms=1.0,
        rounds=1,
    )
    engine.close()
    cupy.check()


def test_experiments_have_an_outcome_each_as_a_line(bench, workbench) -> None:
    """That they run through, not what they find."""
    written = io.StringIO()
    outcomes = dict(bench.gpu_experiments.run(workbench, bench.gpu_experiments.EXPERIMENTS, 60.0, [written]))
    assert not [outcome for outcome in outcomes.values() if "error" in outcome or "left_out" in outcome]
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["experiment"] for line in lines] == list(bench.gpu_experiments.EXPERIMENTS)
    assert outcomes["shortage"]["too_much"].startswith("MEMORY_EXHAUSTED: no memory on cuda:0")
    assert outcomes["shortage"]["session_afterwards"] == "done"
    assert {"sum_behind_copies_us", "small_copy_behind_copies_us"} <= outcomes["sums"].keys()
    assert all(value >= 0.0 for value in outcomes["pieces"].values())


def test_experiments_that_fail_or_come_too_late_are_named(bench, workbench, capsys) -> None:
    chosen = {"broken": lambda bench: {}["gone"], "late": lambda bench: {}}
    broken, _ = bench.gpu_experiments.run(workbench, chosen, 60.0, [])
    assert broken == ("broken", {"error": "KeyError: 'gone'"}) and "Traceback" in capsys.readouterr().err
    _, late = bench.gpu_experiments.run(workbench, chosen, -1.0, [])
    assert late == ("late", {"left_out": "the -1 seconds were over"})
