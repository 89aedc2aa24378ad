"""Programs that fork: loaders go on, children use sessions of their own, and nobody steps a session of its parent."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.numpy_server import numpy_server

ROOT = pathlib.Path(__file__).parents[2]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

# A child says what happened to it in a line of its own, and its parent in the last ones.
PROGRAM = """
import multiprocessing, os, sys, numpy as np, stepwire
target, transport = sys.argv[1:]
ONE = {"w": np.ones(8, np.float32)}
client = stepwire.connect(target, transport=transport)
session = client.create_session(ONE, optimizer=stepwire.SGD(lr=1.0))
session.step(ONE)

def child(call):
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            said = call()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, str(said).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as text:
        print(text.read(), flush=True)
    assert os.waitpid(process, 0)[1] == 0
"""

REFUSED = {
    "step": "session.step(ONE)",
    "step_async": "session.step_async(ONE).result()",
    "pull": "session.pull()",
    "load": "session.load(ONE)",
    "attach": "session.attach()",
    "create": "client.create_session(ONE)",
    "find": "client.session(session.own_id)",
    "list": "list(client.sessions())",
    "server's info": "client.info()",
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with numpy_server() as server:
        yield server.target


def run(code: str, *arguments: str) -> list[str]:
    """Run a program, which says nothing on standard error by itself, and return its lines."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    # gRPC notes, now and then, that a fork met one of its calls.
    said = [line for line in ended.stderr.splitlines() if "skipping fork() handlers" not in line]
    assert (ended.returncode, said) == (0, [])
    return ended.stdout.splitlines()


@pytest.mark.parametrize("transport", ["tcp", "uds", "packets"])
def test_a_child_has_sessions_of_its_own_and_none_of_its_parents(target: str, transport: str) -> None:
    calls = "".join(f"child(lambda: {call})\n" for call in REFUSED.values())
    lines = run(
        PROGRAM
        + """
def own():
    with stepwire.connect(target, transport=transport) as client, client.create_session(ONE) as mine:
        mine.step(ONE)
        return mine.applied_step
for _ in range(10):
    child(own)
    session.step(ONE)
"""
        + calls
        + """
def leave():
    with client, session:
        session.detach()
    return session.applied_step
child(leave)
session.step(ONE)
print(session.applied_step, session.pull()["w"][0], session.info().attached, client.info().sessions)
""",
        target,
        transport,
    )
    refusals = lines[10 : 10 + len(REFUSED)]
    assert lines[:10] == ["1"] * 10
    for call, line in zip(REFUSED, refusals, strict=True):
        name = "client" if call in ("create", "find", "list", "server's info") else "session"
        assert line.startswith(f"InvalidRequestError: {name}: the {name} is of process "), call
        assert "in the child" in line, call
    assert lines[10 + len(REFUSED) :] == ["11", "12 -11.0 True 1"]


def test_a_fork_in_the_middle_of_steps_in_the_background_loses_none(target: str) -> None:
    lines = run(
        PROGRAM
        + """
BIG = {"w": np.ones(2 << 20, np.float32)}
session = client.create_session(BIG, optimizer=stepwire.SGD(lr=1.0))
futures = []
for _ in range(12):
    futures.append(session.step_async(BIG, steps_in_flight=4))
    child(lambda: "child")
for future in futures:
    future.result()
print(session.applied_step, session.pull()["w"][:2].tolist())
""",
        target,
        "tcp",
    )
    assert lines == ["child"] * 12 + ["12 [-11.0, -11.0]"]


def test_a_child_that_ends_normally_ends_its_sessions_and_leaves_those_of_its_parent(target: str) -> None:
    lines = run(
        PROGRAM
        + """
def work(queue):
    mine = stepwire.connect(target).create_session(ONE, label="of the child")
    mine.step(ONE)
    queue.put(mine.applied_step)
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=work, args=(queue,))
process.start()
process.join()
print(queue.get(), process.exitcode, [each.label for each in client.sessions() if each.label == "of the child"])
session.step(ONE)
""",
        target,
        "tcp",
    )
    assert lines == ["1 0 []"]


TORCH = """
import multiprocessing, sys, torch, stepwire.torch
target, way = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
options = {"views": {"shared_views": True}, "backward": {"transport": "tcp", "send_in_backward": True}}.get(way, {})
options = options or {"transport": way}
model = torch.nn.Linear(3, 2)
optimizer = stepwire.torch.SGD(model.parameters(), lr=0.1, server=target, **options)
context = multiprocessing.get_context("fork")

def backward():
    optimizer.zero_grad()
    model(torch.ones(2, 3)).pow(2).sum().backward()

def train():
    backward()
    optimizer.step()

def child(call):
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(said(call)))
    process.start()
    process.join()
    return process.exitcode, None if queue.empty() else queue.get()

def said(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def weights():
    return [float(value) for parameter in model.parameters() for value in parameter.detach().flatten()]

train()
train()
"""


@needs_torch
@pytest.mark.parametrize("way", ["tcp", "uds", "shm", "views", "backward"])
def test_children_read_a_model_and_do_not_step_it(target: str, way: str) -> None:
    lines = run(
        TORCH
        + """
print(child(weights) == (0, weights()))
code, refused = child(train)
print(code, refused[:48], "Hogwild" in refused)
backward()
code, refused = child(optimizer.step)
print(code, refused[:48])
print(child(optimizer.close))
before = weights()
code, gradients = child(lambda: (backward(), [float(p.grad.abs().sum()) > 0 for p in model.parameters()])[1])
print(code, gradients, weights() == before)
train()
print(optimizer.applied_step, weights() != before)
""",
        target,
        way,
    )
    refused = "0 InvalidRequestError: optimizer: the optimizer is"
    assert lines == ["True", f"{refused} True", refused, "(0, None)", "0 [True, True] True", "3 True"]


@needs_torch
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_forked_loaders_go_on(target: str, transport: str) -> None:
    lines = run(
        TORCH
        + """
from torch.utils.data import DataLoader, TensorDataset
data = TensorDataset(torch.ones(16, 3))
for epoch in range(3):
    for (batch,) in DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork"):
        optimizer.zero_grad()
        model(batch).pow(2).sum().backward()
        optimizer.step()
print(optimizer.applied_step)
""",
        target,
        transport,
    )
    assert lines == ["14"]
