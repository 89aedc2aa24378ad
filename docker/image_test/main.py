"""Builds the images and runs them for real, on a machine where neither a registry nor a Docker need be.

    python docker/image_test/main.py

A base image is made of Debian's packages, buildah builds the Dockerfile as it is, and a Docker that lives in namespaces
of this test's own runs what comes out. Exit code 0: everything was shown; 1: something failed; 77: the machine does
not allow it, and nothing was shown.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from compose_checks import check_compose
from durability_checks import check_durability
from engine import private_docker
from gpu_checks import check_gpu
from image_checks import check_images
from images import BASE, TARGETS, Builder
from materials import Materials
from prepare import FOLDER, REPOSITORY, prepare
from report import Report
from server_checks import check_server
from settings_checks import check_settings
from surroundings import namespaces


def main() -> int:
    """Prepare, and show everything in namespaces of its own; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().inside:
        return _show()
    return prepare() or subprocess.call([*namespaces(), sys.executable, __file__, "--inside"])


def _show() -> int:
    report = Report()
    with private_docker(FOLDER / "docker"):
        names = _build(report)
        if not report.failed:
            _run(report, names)
    print(f"\n{report.passed} passed, {report.failed} failed, in {report.seconds:.0f} s")
    return 1 if report.failed else 0


def _build(report: Report) -> dict[str, str]:
    """Build every target and hand it to Docker; returns the names of the images by what they are."""
    materials = Materials(FOLDER, REPOSITORY)
    materials.lay_out()
    builder = Builder(FOLDER / "store")
    report.heading(f"building with buildah, isolation chroot, store {builder.driver}, without network")
    names = {"base": BASE} | {target: f"stepwire:{target}" for target in TARGETS}
    with report.showing("a base image is made of Debian's packages") as figures:
        builder.import_base(materials.base)
        builder.hand_over(BASE, BASE)
        figures.append(BASE)
    for target in TARGETS:
        with report.showing(f"the Dockerfile is built as it is, target {target}") as figures:
            started = report.seconds
            builder.build(target, materials.context)
            builder.hand_over(f"localhost/stepwire:{target}", names[target])
            figures.append(f"{report.seconds - started:.0f} s")
    builder.remove()
    materials.clear()
    return names


def _run(report: Report, names: dict[str, str]) -> None:
    report.heading("images")
    check_images(report, names)
    report.heading("settings")
    check_settings(report, names["cpu"])
    report.heading("the server for CPUs")
    check_server(report, names["cpu"])
    check_durability(report, names["cpu"])
    report.heading("the server for GPUs, where there is none")
    check_gpu(report, names["gpu"])
    report.heading("compose")
    check_compose(report, REPOSITORY / "docker")


if __name__ == "__main__":
    sys.exit(main())
