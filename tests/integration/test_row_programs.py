"""Random programs of rows on several workers and several servers, with lost replies, against a model in float64.

A program has one worker or two, in rounds or one after another, and one server or three, over which tables of a few
rows are cut. Rows of one of its tables may be named by ids. `EXAMPLES` in the environment is the number of programs, in
the place of a few.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows, Table
from stepwire.sharding import partition
from tests.client.test_row_id_programs import BOUND, FIRST, POOL, SEED
from tests.client.test_rows import ADAM, ROWS, WIDTH, Reference
from tests.integration.workers.together import together
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

EXAMPLES = int(os.environ.get("EXAMPLES", "12"))
MEANINGS = ("torch_sparse", "row_counter", "skipped", "global")


@pytest.fixture(scope="module")
def targets() -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(numpy_server(max_chunk_bytes=64 << 10)).target for _ in range(3)]


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tables of a few rows."""
    monkeypatch.setattr(partition, "GRAIN", WIDTH)
    monkeypatch.setattr(partition, "SMALLEST_IN_BLOCKS", 1)


class Program:
    """A session with two tables and a dense tensor, its workers, and the model of it.

    With ids, table `a` is made by the servers, and there is no dense tensor: nothing is loaded.
    """

    def __init__(self, seed: int, targets: list[str], stack: contextlib.ExitStack) -> None:
        self.chance, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.meanings = {name: self.chance.choice(MEANINGS) for name in ("a", "b")}
        self.mode = self.chance.choice([None, "sync", "async"])
        start: dict[str, Any] = {name: self.values(ROWS) for name in self.meanings}
        start["w"] = np.zeros(3, np.float32)
        chosen = self.chance.choice([targets[:1], targets])
        options: dict[str, Any] = {
            "optimizer": ADAM,
            "groups": [{"params": ["w"], "lr": 0.5, "beta1": 0.0, "beta2": 0.0, "eps": 0.0}],
            "tables": self.meanings,
            "missing_gradient": "keep",
            "non_finite": self.chance.choice(["reject", "allow"]),
        }
        self.names = dict.fromkeys(self.meanings, np.arange(ROWS))
        self.has_ids = self.chance.random() < 0.4 and (self.mode is None or chosen == targets[:1])
        if self.has_ids:
            self.names["a"], self.meanings["a"] = POOL, self.chance.choice(MEANINGS[:3])
            start = {"a": Table((4 * ROWS, WIDTH), self.meanings["a"], BOUND, SEED, hashed=True)}
            start["b"] = Table((ROWS, WIDTH), self.meanings["b"])
            del options["groups"], options["tables"]
        first = {"a": FIRST, "b": np.zeros((ROWS, WIDTH))} if self.has_ids else start
        self.model = {name: Reference("adam", self.meanings[name], first[name]) for name in self.meanings}
        self.w = np.zeros(3)
        if self.mode is not None:
            options["aggregation"] = stepwire.Aggregation(workers=2, mode=self.mode)
            options["request_id"] = uuid.uuid4().hex
        self.clients = [
            stack.enter_context(stepwire.connect(chosen, timeout=120.0)) for _ in range(1 if self.mode is None else 2)
        ]
        self.sessions = [each.create_session(start, worker=at, **options) for at, each in enumerate(self.clients)]

    def values(self, rows: int) -> np.ndarray:
        return self.rng.standard_normal((rows, WIDTH)).astype(np.float32)

    def gradient(self) -> dict[str, Any]:
        dense = {} if self.has_ids else {"w": self.chance.choice([None, np.ones(3, np.float32)])}
        drawn: dict[str, Any] = dense
        for name in self.meanings:
            count = self.chance.choice([None, 0, 1, 3, 12])
            if count is not None:
                drawn[name] = Rows(self.names[name][self.rng.integers(0, ROWS, count)], self.values(count))
        return drawn if any(each is not None for each in drawn.values()) else self.gradient()

    def expect(self, gradients: list[dict[str, Any]]) -> None:
        """Step the model by the mean of gradients."""
        self.w -= 0.5 * any(each.get("w") is not None for each in gradients)
        for name, reference in self.model.items():
            parts = [each[name] for each in gradients if each.get(name) is not None]
            if parts:
                rows = self.rows_of(name, np.concatenate([part.indices for part in parts]))
                values = np.concatenate([part.values for part in parts]).astype(np.float64) / len(gradients)
                reference.step(rows, values)

    def step(self) -> None:
        """Step together, or one alone; perhaps a reply is lost, and the same call finds it."""
        workers = range(len(self.sessions)) if self.mode == "sync" else [self.chance.randrange(len(self.sessions))]
        gradients = {worker: self.gradient() for worker in workers}
        unlucky = self.chance.choice([None, None, *workers])
        applied = self.chance.choice([True, False]) or self.mode == "sync"
        if unlucky is not None and self.mode != "sync" and self.chance.random() < 0.5:
            self.lose(unlucky, self.gradient(), applied=applied)
            unlucky = None

        def call(worker: int) -> Any:
            if worker == unlucky:
                with contextlib.suppress(stepwire.DeadlineExceededError):
                    self.sessions[worker].step(gradients[worker])
            else:
                return self.sessions[worker].step(gradients[worker])
            return None

        lost = contextlib.nullcontext() if unlucky is None else lost_replies(applied=applied, of=self.is_of(unlucky))
        with lost:
            replies = dict(zip(workers, together(*(functools.partial(call, each) for each in workers)), strict=True))
        if unlucky is not None:
            replies[unlucky] = self.sessions[unlucky].step(gradients[unlucky])
        self.expect(list(gradients.values()))
        for worker, reply in replies.items():
            for name in self.meanings:
                if (own := gradients[worker].get(name)) is not None:
                    came = self.rows_of(name, np.unique(own.indices))
                    self.close(reply[name].values, self.model[name].p[came])

    def rows_of(self, name: str, names: np.ndarray) -> np.ndarray:
        """Return the rows of the model that indices or ids name."""
        known = self.names[name].tolist()
        return np.array([known.index(each) for each in names.tolist()], np.int64)

    def lose(self, worker: int, gradient: dict[str, Any], *, applied: bool) -> None:
        """Lose a step's reply for good: another step follows."""
        with lost_replies(applied=applied, of=self.is_of(worker)), pytest.raises(stepwire.DeadlineExceededError):
            self.sessions[worker].step(gradient)
        if applied:
            self.expect([gradient])

    def is_of(self, worker: int) -> Any:
        holds = [link.hold for link in self.sessions[worker]._known.shards]  # type: ignore[attr-defined]
        return lambda hold: any(hold is each for each in holds)

    def pull(self) -> None:
        session = self.chance.choice(self.sessions)
        rows = self.rng.integers(0, ROWS, 5)
        pulled: Any = session.pull(rows={"b": rows, "a": self.names["a"][rows[:2]]})
        self.close(pulled["b"].values, self.model["b"].p[rows])
        self.close(pulled["a"].values, self.model["a"].p[rows[:2]])
        if self.has_ids:  # whole tables have no names of rows
            every: Any = session.pull(rows=self.names)
            whole: Any = {name: rows.values for name, rows in every.items()}
        else:
            whole = session.pull()
            self.close(whole["w"], self.w)
        for name, reference in self.model.items():
            self.close(whole[name], reference.p)

    def load(self) -> None:
        """Load the parameters of some rows; moments and numbers stay. Other workers learn of it by a pull."""
        rows = self.rng.permutation(ROWS)[:4]
        loaded = {name: self.values(4) for name in self.meanings if self.chance.random() < 0.7}
        named = {name: Rows(self.names[name][rows], values) for name, values in loaded.items()}
        session = self.chance.choice(self.sessions)
        session.pull(rows={"b": [0]})  # it may not know of the others' steps
        session.load_rows(named)
        for name, values in loaded.items():
            self.model[name].p[rows] = values
        for session in self.sessions:
            session.pull(rows={"b": [0]})

    def cut(self) -> None:
        """Lose a stream between two steps."""
        for link in self.chance.choice(self.sessions)._known.shards:
            link.detach()

    def another_client(self) -> None:
        """Go on from a client that knows the id alone."""
        worker = self.chance.randrange(len(self.sessions))
        session_id = self.sessions[worker].session_id
        self.sessions[worker].detach()
        self.sessions[worker] = self.clients[worker].session(session_id, worker=worker)
        self.sessions[worker].attach(take_over=True)

    def close(self, found: Any, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_a_program_ends_as_its_model(targets: list[str], seed: int) -> None:
    with contextlib.ExitStack() as stack:
        program = Program(seed, targets, stack)
        for _ in range(8):
            program.chance.choice(
                [program.step] * 5 + [program.pull, program.load, program.cut, program.another_client]
            )()
        program.pull()
        program.sessions[0].close()
