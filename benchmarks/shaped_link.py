"""Steps over a link of 1 Gb/s, beside the link's own time for the bytes.

    python benchmarks/shaped_link.py [--quick]

A pair of virtual interfaces connects two network namespaces, and a token bucket shapes each end. The server is in one
namespace, the client in the other. The section needs root, `ip` and `tc`; without them it is skipped with the reason.
The namespaces are removed in every case. A run also removes the namespaces of a run that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import contest
import variants
from child import child, output_of, python
from contest import Action, Contender, Ratios
from sockets import SocketStream, addresses

__all__ = ["RATIOS", "shaped_link"]

_RATE = "1gbit"
_NAMES = ("stepwire-bench-server", "stepwire-bench-client")
_HOSTS = ("10.213.77.1", "10.213.77.2")
_LINK = "stepwire0"
_START_SECONDS = 60.0
# Beyond a burst the bucket passes bytes at its rate. A burst must be larger than the kernel's largest unit.
_BUCKET = ("rate", _RATE, "burst", "256kb", "latency", "50ms")
_FLOAT32, _BFLOAT16, _INT8 = 4.0, 2.0, 260 / 256


class Case(NamedTuple):
    """A step over the link.

    Attributes:
        variant: the name of the variant.
        up: the bytes of an element of the gradient.
        down: the bytes of an element of the parameters.
    """

    variant: str
    up: float
    down: float


_CASES = (
    Case("tcp", _FLOAT32, _FLOAT32),
    Case("tcp overlap", _FLOAT32, _FLOAT32),
    Case("tcp bfloat16", _BFLOAT16, _BFLOAT16),
    Case("tcp int8 up, bfloat16 down", _INT8, _BFLOAT16),
)
RATIOS: Ratios = {
    **{f"{case.variant} to its link time": (case.variant, (f"link for {case.variant}",)) for case in _CASES},
    **{f"{case.variant} to tcp": (case.variant, ("tcp",)) for case in _CASES[1:]},
}


def shaped_link(*, size: int, rounds: int) -> dict[str, Any]:
    """Return times over the link and their ratios, or why there are none."""
    if reason := _obstacle():
        return {"skipped": reason}
    try:
        with (
            _ended_in_order(),
            _namespaces(),
            _server() as target,
            child(_inside(0, python(_SOCKETS, _HOSTS[0]))) as raw,
        ):
            printed = raw.read()
            command = python(__file__, "--client", target, printed, size, rounds)
            figures: dict[str, Any] = json.loads(output_of(_inside(1, command)))
    except subprocess.CalledProcessError as problem:
        return {"skipped": f"{' '.join(map(str, problem.cmd[:6]))} … failed; its message is above"}
    return {"rate": _RATE, **figures}


def main() -> None:
    """Print the figures; as a child, measure from inside the client's namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, to check the benchmark itself")
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        target, printed, size, rounds = arguments.client
        print(json.dumps(_measure(target, printed, int(size), int(rounds))))
        return
    figures = shaped_link(size=100_000 if arguments.quick else 32_000_000, rounds=2 if arguments.quick else 7)
    for name, value in figures.items():
        print(f"{name:<42} {value:.3f}" if isinstance(value, float) else f"{name:<42} {value}")


# --- in the client's namespace ---------------------------------------------------------------------------------


def _measure(target: str, printed: str, size: int, rounds: int) -> dict[str, Any]:
    at = addresses(printed, _HOSTS[0]).tcp
    entrants = [Contender(f"link for {case.variant}", _link_time(at, case)) for case in _CASES if case.up]
    entrants += [variants.contender(variants.named(case.variant), [target]) for case in _CASES]
    result = contest.run_contest(entrants, size, rounds=rounds)
    return result.figures() | result.ratios(RATIOS)


def _link_time(at: tuple[str, int], case: Case) -> Callable[[contextlib.ExitStack, int], Action]:
    """Return a plain transfer of the bytes of a case: one after the other, or with overlap both ways at once."""

    def prepare(stack: contextlib.ExitStack, size: int) -> Action:
        stream = stack.enter_context(contextlib.closing(SocketStream(at)))
        up, down = (np.ones(round(size * each), np.uint8).data for each in (case.up, case.down))
        exchange = stream.duplex if "overlap" in case.variant else stream.push_pull
        return lambda: exchange(up, down)

    return prepare


# --- the link --------------------------------------------------------------------------------------------------

_SOCKETS = pathlib.Path(__file__).with_name("sockets.py")


def _obstacle() -> str:
    """Return the reason why this machine can have no link; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed; install iproute2"
    tried = subprocess.run(["ip", "netns", "add", _NAMES[0]], capture_output=True, text=True, check=False)
    if tried.returncode and "exists" not in tried.stderr:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    _remove()
    return ""


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM end a block as an exception does, so that the block cleans up."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _namespaces() -> Iterator[None]:
    """Make both ends and shape them, for a block."""
    try:
        for name in _NAMES:
            _run("ip", "netns", "add", name)
        peer = ("peer", "name", _LINK, "netns", _NAMES[1])
        _run("ip", "link", "add", _LINK, "netns", _NAMES[0], "type", "veth", *peer)
        for name, host in zip(_NAMES, _HOSTS, strict=True):
            _run("ip", "-n", name, "address", "add", f"{host}/30", "dev", _LINK)
            for device in ("lo", _LINK):
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("tc", "-n", name, "qdisc", "add", "dev", _LINK, "root", "tbf", *_BUCKET)
        yield
    finally:
        _remove()


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """Run a server inside its namespace for a block; yields where it listens."""
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        port_file = pathlib.Path(folder, "port")
        flags = ("--bind", f"{_HOSTS[0]}:0", "--insecure", "--device", "cpu", "--log-level", "warning")
        command = python("-m", "stepwire_server", "serve", *flags, "--port-file", port_file)
        process = subprocess.Popen(_inside(0, command))
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not port_file.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if not port_file.exists():
                raise RuntimeError(f"the server in {_NAMES[0]} did not start; its message is above")
            yield f"{_HOSTS[0]}:{int(port_file.read_text())}"
        finally:
            process.terminate()
            process.wait()


def _inside(end: int, command: Sequence[str]) -> list[str]:
    return ["ip", "netns", "exec", _NAMES[end], *command]


def _remove() -> None:
    for name in _NAMES:  # a pair of interfaces goes with the first of them
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
