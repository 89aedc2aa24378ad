"""Programs that end in the middle of something: none hangs, and none says anything but its own error."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from tests.support.numpy_server import numpy_server

pytestmark = pytest.mark.many

ROOT = pathlib.Path(__file__).parents[1].parent

PLAIN = """
import atexit, sys, threading, numpy as np, stepwire
target = sys.argv[1]
ONE, BIG = {"w": np.ones(8, np.float32)}, {"w": np.ones(4 << 20, np.float32)}
"""
SERVER = (
    PLAIN
    + """
import structlog
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
server = Server(ServerConfig(bind="127.0.0.1:0", device="cpu", log_level="error", unix_socket="off"))
"""
)
TRAINS = """
server.start()
session = stepwire.connect(server.target).create_session(BIG, clip_grad_norm=1.0)
session.step(BIG)
"""
TORCH = (
    PLAIN
    + """
import torch, stepwire.torch
torch.manual_seed(0)
model = torch.nn.Linear(40, 30)
def backward():
    model(torch.ones(4, 40)).pow(2).sum().backward()
def optimizer(**options):
    made = stepwire.torch.Adam(model.parameters(), server=target, send_in_backward=True, **options)
    for _ in range(3):
        made.zero_grad()
        backward()
        made.step()
    backward()
    return made
"""
)
AT_EXIT = """
def train():
    opt.step()
    opt.zero_grad()
    backward()
    opt.step()
    print("trained", flush=True)
atexit.register(train)
"""

PROGRAMS = {
    "steps in the background": PLAIN
    + """
session = stepwire.connect(target).create_session(BIG)
futures = [session.step_async(BIG, steps_in_flight=4) for _ in range(4)]
""",
    "steps in the background, sys.exit": PLAIN
    + """
session = stepwire.connect(target).create_session(BIG)
futures = [session.step_async(BIG, steps_in_flight=4) for _ in range(4)]
sys.exit(3)
""",
    "shards trained at the end": PLAIN
    + """
session = stepwire.connect([target, target]).create_session(BIG, clip_grad_norm=1.0)
session.step(BIG)
atexit.register(lambda: print("trained", session.step(BIG)["w"].shape, flush=True))
""",
    "asyncio, a step under way": PLAIN
    + """
import asyncio, stepwire.aio
async def main():
    client = stepwire.aio.connect(target)
    session = await client.create_session(BIG)
    task = asyncio.create_task(session.step(BIG))
    await asyncio.sleep(0)
asyncio.run(main())
""",
    "a server that nobody reaches": PLAIN
    + """
client = stepwire.connect("127.0.0.1:1", timeout=0.2)
try:
    client.create_session(ONE)
except stepwire.StepwireError:
    pass
""",
    "a server in the process": SERVER + TRAINS,
    "a server in the process, an error": SERVER + TRAINS + "raise RuntimeError('mine')",
    "a server in the process, training at the end": SERVER
    + TRAINS
    + "atexit.register(lambda: print('trained', session.step(BIG)['w'].shape, flush=True))",
    "a server that was never started": SERVER,
    "a begun step over tcp": TORCH + "opt = optimizer(transport='tcp')",
    "a begun step over uds, an error": TORCH + "opt = optimizer(transport='uds')\nraise RuntimeError('mine')",
    "a begun step, the session closed": TORCH + "opt = optimizer(transport='tcp')\nopt.session.close()",
    "a begun step ended by training at the end": TORCH + "opt = optimizer(transport='tcp')\n" + AT_EXIT,
}
CODES = {"sys.exit": 3, "an error": 1}
SAID = {
    "shards trained": "trained (4194304,)\n",
    "in the process, training": "trained (4194304,)\n",
    "ended by": "trained\n",
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with numpy_server() as server:
        yield server.target


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends(target: str, name: str) -> None:
    if sys.version_info >= (3, 12) and "in the process" in name:
        pytest.skip("Python 3.12 and later start no thread at their exit, and gRPC needs some")
    if "torch" in PROGRAMS[name] and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    code = textwrap.dedent(PROGRAMS[name])
    ended = subprocess.run([sys.executable, "-c", code, target], cwd=ROOT, capture_output=True, text=True)
    wanted = next((code for words, code in CODES.items() if words in name), 0)
    assert ended.returncode == wanted, ended.stderr
    errors = ended.stderr.strip()
    assert errors.rpartition("\n")[2] == ("RuntimeError: mine" if wanted == 1 else "")
    assert errors.count("Traceback") == (1 if wanted == 1 else 0)
    assert ended.stdout == next((text for words, text in SAID.items() if words in name), "")
