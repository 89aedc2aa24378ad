"""The client in twenty lines of generated code: its numbers, and its command line."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

from stepwire_server.testing import serving

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "plain_protobuf.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_it_minimises_a_quadratic() -> None:
    """Adam at lr 1e-3 walks its 0.11 in 200 steps, up to a last oscillation."""
    with serving() as target:
        done = run(target)
    assert (done.returncode, done.stderr) == (0, "")
    match = re.fullmatch(r"step 200: gradient norm ([0-9.e+-]+), w\[11\] = ([0-9.]+)\n", done.stdout)
    assert match is not None, done.stdout
    assert float(match[1]) < 0.02
    assert abs(float(match[2]) - 0.11) < 0.02


def test_without_a_server_it_tells_its_usage() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"usage: {SCRIPT} HOST:PORT of a server, such as localhost:50051; start one with: stepwire serve\n"
    )
