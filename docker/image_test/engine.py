"""A Docker of the test's own: in namespaces that end with it, on a folder that is removed."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Final

from commands import attempt, run
from report import Failed

__all__ = ["private_docker"]

_START_SECONDS: Final = 40.0
_CGROUP: Final = "stepwire-image-test"


@contextlib.contextmanager
def private_docker(folder: pathlib.Path) -> Iterator[None]:
    """Run dockerd for a block, with bridges and ports as everywhere, in the network namespace this process is in.

    Raises:
        Failed: it does not start.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The sockets and pid files of daemons go where the machine's own do not see them.
    run("mount", "-t", "tmpfs", "none", "/run")
    run("ip", "link", "set", "lo", "up")
    places = ("--data-root", str(folder / "data"), "--exec-root", "/run/docker", "--pidfile", "/run/docker.pid")
    options = ("--host", "unix:///run/docker.sock", "--cgroup-parent", _CGROUP)
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(["dockerd", *places, *options], stdout=log, stderr=log)
        try:
            _await(daemon, folder / "log")
            yield
        finally:
            for container in attempt("docker", "ps", "-aq").stdout.split():
                attempt("docker", "rm", "-f", container)
            daemon.terminate()
            daemon.wait()
            _remove_control_groups()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_control_groups() -> None:
    """Remove what no namespace hides: the control groups that held the containers, one a controller in version 1."""
    for group in [*pathlib.Path("/sys/fs/cgroup").glob(f"*/{_CGROUP}"), pathlib.Path("/sys/fs/cgroup", _CGROUP)]:
        with contextlib.suppress(OSError):
            group.rmdir()


def _await(daemon: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while attempt("docker", "version").returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"dockerd does not start: {' | '.join(log.read_text().splitlines()[-5:])}")
        time.sleep(0.2)
