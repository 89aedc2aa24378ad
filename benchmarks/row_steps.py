"""Steps by rows of a table: beside the dense step of a tensor as large, torch's local SparseAdam, and the parts.

Rounds of two workers, and tables over two servers, stand beside the step of one client on one server.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

import occupancy
import row_child
import stepwire
from child import Child, child, python
from contest import Absent, needed, timed
from echo import EchoStream, EchoTargets, bulk_messages
from stepwire import Rows
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.protocol import PARAM, RowPass, Table
from stepwire_server.processes.spawn import ServerProcess, server_process
from stepwire_server.rules import ADAM_SPARSE, Precision, Recipe
from stepwire_server.steps.summed_rows import summed_rows

__all__ = ["BESIDE", "DENSE_TO_ROWS", "ROUND_TO_STEPS", "TO_PARTS", "TO_TORCH", "row_steps"]

DENSE_TO_ROWS: Final = "dense step to step of rows"
BESIDE: Final = "bytes beside the table a row"
TO_PARTS: Final = "step of rows to its parts"
ROUND_TO_STEPS: Final = "round of 2 workers to 2 steps of rows"
TO_TORCH: Final = "step of rows to local SparseAdam"

_WORKERS: Final = 2
_REPEATS: Final = 128
"""The repetitions of one row for each row of a step, where one row comes very often."""

Action = Any


def row_steps(
    server: ServerProcess, echo: EchoTargets, *, rows: int, width: int, came: int, rounds: int
) -> dict[str, Any]:
    """Return the times of a step of some distinct rows over TCP, of its parts and its peers, and the memory of a table.

    Args:
        server: a server on this machine.
        echo: the raw gRPC server.
        rows: the rows of the table.
        width: the elements of a row.
        came: the distinct rows of a step, in no order.
        rounds: the rounds of the contest.
    """
    rng = np.random.default_rng(0)
    indices = rng.permutation(rows)[:came]
    gradient = Rows(indices, rng.standard_normal((came, width)).astype(np.float32))
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(stepwire.connect(server.target, transport="tcp"))
        with client.create_session({"table": stepwire.Table((came, width))}) as warm:
            warm.step({"table": Rows(np.arange(came), gradient.values)})
        looks = 1 if rounds < 3 else 16
        before = occupancy.settled_resident_bytes(server.pid, looks)
        table = stepwire.Table((rows, width), "torch_sparse")
        session = stack.enter_context(client.create_session({"table": table}))
        for first in range(0, rows, came):  # memory that no row has touched is not there yet
            each = np.arange(first, min(first + came, rows))
            session.step({"table": Rows(each, gradient.values[: len(each)])}, reply="none")
        beside = occupancy.settled_resident_bytes(server.pid, looks) - before - 12 * rows * width
        actions: dict[str, Action] = {
            "step": lambda: session.step({"table": gradient}),
            "step without a reply": lambda: session.step({"table": gradient}, reply="none"),
            "sort": functools.partial(summed_rows, indices.astype(np.int64), gradient.values),
            "engine": _engine(stack, rows, gradient),
            "push and pull": _echo(stack, echo, came * width),
            "dense step": _dense(stack, client, rows * width),
            "step of row_wise": _row_wise(stack, client, rows, gradient),
            "step by ids": _by_ids(stack, client, gradient),
            "sum of one row that came very often": _often(came),
            **_rounds(stack, server.target, rows, gradient),
            **_sharded(stack, server.target, rows, gradient),
        }
        with contextlib.suppress(Absent):
            actions["local SparseAdam"] = _torch(rows, width, gradient)
        for action in actions.values():
            action()
        times = dict[str, list[float]]((name, []) for name in actions)
        for _ in range(rounds):
            for name, action in actions.items():
                times[name].append(timed(action))
    return _figures(times) | {"rows": rows, "width": width, "came": came, BESIDE: beside / rows}


def _figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians in milliseconds, and medians of the ratios round by round."""
    parts = [sum(each) for each in zip(*(times[name] for name in ("sort", "engine", "push and pull")), strict=True)]
    figures: dict[str, Any] = {f"{name} ms": statistics.median(found) * 1e3 for name, found in times.items()}
    figures[DENSE_TO_ROWS] = _ratio(times["dense step"], times["step"])
    figures[TO_PARTS] = _ratio(times["step"], parts)
    figures[ROUND_TO_STEPS] = _ratio(times["round of 2 workers"], [2.0 * each for each in times["step"]])
    if "local SparseAdam" in times:
        figures[TO_TORCH] = _ratio(times["step"], times["local SparseAdam"])
    return figures


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(left / right for left, right in zip(one, other, strict=True))


def _engine(stack: contextlib.ExitStack, rows: int, gradient: Rows) -> Action:
    """Return the engine's own pass over the rows, in this process."""
    indices, values = np.sort(np.asarray(gradient.indices)).astype(np.int64), np.asarray(gradient.values)
    recipe, engine = Recipe(ADAM_SPARSE, measures=True), CpuEngine()
    stack.callback(engine.close)
    state = engine.allocate(dict.fromkeys((PARAM, *ADAM_SPARSE.slots), Precision.FLOAT32), rows * values.shape[1])
    staged = state.receive(values.size).put(0, values.reshape(-1))
    scalars = [1.0, 1.0, *ADAM_SPARSE.scalars(stepwire.Adam().hyperparameters(), 1)]
    step = RowPass(recipe, np.array([scalars], np.float32), np.zeros(len(indices), np.int32))
    table, out = Table(0, rows, values.shape[1]), np.empty(values.size, np.float32)
    return lambda: state.update_rows(step, table, indices, staged, 0, out).wait()


def _echo(stack: contextlib.ExitStack, echo: EchoTargets, elements: int) -> Action:
    """Return a push and a pull of the bytes of the rows by gRPC alone."""
    raw = stack.enter_context(contextlib.closing(EchoStream(echo.tcp, "PushPull")))
    messages = bulk_messages(elements * FLOAT32.itemsize)
    return lambda: raw.exchange(messages)


def _dense(stack: contextlib.ExitStack, client: stepwire.Client, elements: int) -> Action:
    """Return the dense step of as many elements, on the same server."""
    gradient, out = {"w": np.full(elements, 0.01, np.float32)}, {"w": np.zeros(elements, np.float32)}
    session = stack.enter_context(client.create_session(out))
    return lambda: session.step(gradient, out=out)


def _row_wise(stack: contextlib.ExitStack, client: stepwire.Client, rows: int, gradient: Rows) -> Action:
    """Return the step of Adagrad with one sum a row, of the same rows."""
    table = stepwire.Table((rows, np.asarray(gradient.values).shape[1]), "row_wise")
    session = stack.enter_context(client.create_session({"table": table}, optimizer=stepwire.Adagrad()))
    return lambda: session.step({"table": gradient})


def _by_ids(stack: contextlib.ExitStack, client: stepwire.Client, gradient: Rows) -> Action:
    """Return the step of as many rows that are named by ids, all of them there, in a table that is half full."""
    came, width = np.asarray(gradient.values).shape
    ids = np.random.default_rng(1).integers(0, 2**63 - 1, came)
    session = stack.enter_context(client.create_session({"table": stepwire.Table((2 * came, width), hashed=True)}))
    named = Rows(ids, gradient.values)
    return lambda: session.step({"table": named})


def _often(came: int) -> Action:
    """Return the exact sum of one element of a row that came very often, with numbers of very different sizes."""
    values = np.tile(np.array([1e8, 1.0, -1e8, 1.0], np.float32), _REPEATS * came // 4)[:, np.newaxis]
    return functools.partial(summed_rows, np.zeros(len(values), np.int64), values)


def _rounds(stack: contextlib.ExitStack, target: str, rows: int, gradient: Rows) -> dict[str, Action]:
    """Return rounds of processes with as many rows each, by indices and by ids."""
    threads = stack.enter_context(ThreadPoolExecutor(_WORKERS))
    came, width = np.asarray(gradient.values).shape

    def round_of(kind: str) -> Action:
        script = pathlib.Path(__file__).with_name("row_child.py")
        sizes = (kind, rows, width, came)
        group = [stack.enter_context(child(python(script, *sizes, rank, _WORKERS, target))) for rank in range(_WORKERS)]
        list(threads.map(Child.read, group))
        return lambda: list(threads.map(lambda each: each.ask("1"), group))

    return {"round of 2 workers": round_of("rows"), "round of 2 workers by ids": round_of("ids")}


def _sharded(stack: contextlib.ExitStack, target: str, rows: int, gradient: Rows) -> dict[str, Action]:
    """Return steps over this server and another one, by indices and by ids."""
    another = stack.enter_context(server_process("--device", "cpu"))
    client = stack.enter_context(stepwire.connect([target, another.target], transport="tcp"))
    came, width = np.asarray(gradient.values).shape

    def step_of(kind: str, count: int) -> Action:
        session = stack.enter_context(client.create_session({"table": row_child.table_of(kind, count, width)}))
        named = Rows(row_child.named_rows(kind, rows, came, 0), gradient.values)
        return lambda: session.step({"table": named})

    return {"step over 2 servers": step_of("rows", rows), "step by ids over 2 servers": step_of("ids", 4 * came)}


def _torch(rows: int, width: int, gradient: Rows) -> Action:
    """Return torch's SparseAdam in this process."""
    torch = needed("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    parameter = torch.nn.Parameter(torch.zeros(rows, width))
    indices, values = torch.from_numpy(np.asarray(gradient.indices)), torch.from_numpy(np.asarray(gradient.values))
    parameter.grad = torch.sparse_coo_tensor(indices[None], values, (rows, width), check_invariants=True)
    step: Action = torch.optim.SparseAdam([parameter]).step
    return step
