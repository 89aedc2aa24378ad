"""What the test needs of a machine: why it cannot run here, or the tools it runs with."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Final

from commands import CommandFailed, attempt, run

__all__ = ["PYTHON", "Unfit", "equip", "namespaces"]

# By what is run: the Debian package that brings it.
_TOOLS: Final = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "dockerd": "docker.io",
    "ip": "iproute2",
    "iptables": "iptables",
}
PYTHON: Final = (3, 11)
"""Of the base image, which is also the Dockerfile's default: wheels are fetched for it by one of the same version."""


class Unfit(Exception):
    """The test cannot run on this machine; the text says why."""


def namespaces() -> list[str]:
    """Return the command in front of what runs in mount, network and process namespaces of its own."""
    return ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def equip() -> None:
    """See whether the test can run here, and install what it needs from Debian's packages.

    Raises:
        Unfit: it cannot.
    """
    if sys.platform != "linux" or os.geteuid():
        raise Unfit("it takes root on Linux: base images, namespaces and a Docker of its own are made")
    if sys.version_info[:2] != PYTHON:
        raise Unfit(f"wheels for Python {PYTHON[0]}.{PYTHON[1]} are fetched by a Python of that version; set PYTHON")
    if (tried := attempt(*namespaces(), "mount", "-t", "tmpfs", "none", "/mnt")).returncode:
        raise Unfit(f"the kernel allows no namespaces with mounts here: {tried.stderr.strip()}")
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        _install(missing)


def _install(packages: list[str]) -> None:
    if shutil.which("apt-get") is None:
        raise Unfit(f"{', '.join(packages)} are missing, and there is no apt-get to install them with")
    # Runlevel 1 keeps the packages from starting services of theirs on this machine.
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    patient = ("-o", "DPkg::Lock::Timeout=300")
    try:
        run("apt-get", *patient, "update", "-qq", env=quiet)
        run("apt-get", *patient, "install", "-y", "-qq", "--no-install-recommends", *packages, env=quiet)
    except CommandFailed as problem:
        raise Unfit(f"{', '.join(packages)} cannot be installed: {problem}") from None
