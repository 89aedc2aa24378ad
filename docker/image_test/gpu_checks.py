"""The image for GPUs on a machine without one: it says what is missing, or does without where it may."""

from __future__ import annotations

from containers import once, running
from report import Report, require
from server_checks import ACCURACY, train

__all__ = ["check_gpu"]


def check_gpu(report: Report, image: str) -> None:
    """Ask for a GPU that is not there."""
    with report.showing("without a device `cuda` fails at start with what is missing and what to do") as figures:
        outcome = once(image, INSECURE="1", DEVICE="cuda")
        (line,) = outcome.err.splitlines()
        require(outcome.code == 2 and not outcome.out, outcome)
        require("no NVIDIA driver: libcuda.so.1 does not load" in line and "docker run --gpus all" in line, line)
        figures += [f"exit code {outcome.code}", f"{outcome.seconds:.1f} s", f"“{line[:90]}…”"]
    with report.showing("the doctor of that image finds the same") as figures:
        outcome = once(image, "doctor", "--device", "cuda", INSECURE="1")
        wrong = [line for line in outcome.out.splitlines() if line.startswith("WRONG")]
        require(outcome.code == 1 and len(wrong) == 1 and wrong[0].split()[1] == "driver", outcome)
        figures.append(f"“{wrong[0][:70]}…”")
    with running(image, INSECURE="1") as server, report.showing("`auto` warns, and serves on the CPU") as figures:
        server.await_health()
        warnings = [event for event in server.events() if event["level"] == "warning"]
        require([warning["event"] for warning in warnings] == ["devices chosen"], warnings)
        require(warnings[0]["devices"] == "cpu" and "no NVIDIA driver" in warnings[0]["why"], warnings)
        told = train(server.target())
        require(told["test_accuracy"] >= ACCURACY, told)
        figures += [f"accuracy {told['test_accuracy']:.4f}", f"“{warnings[0]['why'][:60]}…”"]
