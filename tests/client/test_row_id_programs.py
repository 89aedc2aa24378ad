"""Random programs of rows by ids in a small table: new rows, full tables, evictions, loads, lost replies, new clients.

The model has a row in float64 for each id of a pool. `EXAMPLES` in the environment is the number of programs, in the
place of a few.
"""

from __future__ import annotations

import contextlib
import os
import random
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows, Table
from tests.client.test_row_ids import outputs
from tests.client.test_rows import ADAM, ROWS, WIDTH, Reference
from tests.support.lost_replies import lost_replies

EXAMPLES = int(os.environ.get("EXAMPLES", "4"))
MEANINGS = ("torch_sparse", "row_counter", "skipped")
POOL = np.random.default_rng(5).integers(0, 2**63, ROWS, dtype=np.int64)
CAPACITY, BOUND, SEED = 6, 0.5, 11


def first_values() -> np.ndarray:
    """Return the first values of the pool's rows, in integers."""
    seeds = [outputs(SEED, int(each) + 1) for each in POOL]
    units = [[(outputs(seed, i + 1) >> 40) / 2.0**23 - 1.0 for i in range(WIDTH)] for seed in seeds]
    return (np.array(units, np.float32) * np.float32(BOUND)).astype(np.float64)


FIRST = first_values()


class Program:
    """A session with one table, and the model of it."""

    def __init__(self, seed: int, client: stepwire.Client) -> None:
        self.chance, self.rng, self.client = random.Random(seed), np.random.default_rng(seed), client
        self.age = self.chance.choice([0, 1, 3])
        meaning = self.chance.choice(MEANINGS)
        table = Table((CAPACITY, WIDTH), meaning, BOUND, SEED, hashed=True, max_age_steps=self.age)
        self.session = client.create_session({"t": table}, optimizer=ADAM)
        self.model = Reference("adam", meaning, FIRST)
        self.last: dict[int, int] = {}
        self.evicted = 0

    def make_room(self, rows: set[int]) -> bool:
        """Make the rows of a step in the model; False where there is no room, and nothing changes."""
        model, new = self.model, rows - self.last.keys()
        lacking = len(new) - (CAPACITY - len(self.last))
        aged = {row for row, t in self.last.items() if self.age and model.t + 1 - t > self.age} - rows
        if lacking > 0:
            if lacking > len(aged):
                return False
            for row in aged:
                model.p[row] = FIRST[row]
                model.m[row] = model.v[row] = model.own[row] = 0
                del self.last[row]
            self.evicted += len(aged)
        self.last |= dict.fromkeys(rows, model.t + 1)
        return True

    def step(self) -> None:
        """Step some rows; perhaps the reply is lost, and the same call finds it."""
        rows = self.rng.integers(0, ROWS, self.chance.choice([0, 1, 2, 5]))
        values = self.rng.standard_normal((len(rows), WIDTH)).astype(np.float32)
        gradient = {"t": Rows(POOL[rows], values)}
        if not self.make_room(set(rows.tolist())):
            with pytest.raises(stepwire.ResourceExhaustedError, match="ids are new") as full:
                self.session.step(gradient)
            assert full.value.metadata["rows"] == str(len(self.last))
            return
        if self.chance.random() < 0.2:
            lost = lost_replies(applied=self.chance.choice([True, False]))
            with lost, contextlib.suppress(stepwire.DeadlineExceededError):
                self.session.step(gradient)
        reply: Any = self.session.step(gradient)
        self.model.step(rows, values)
        named = np.sort(np.unique(POOL[rows]))
        assert reply["t"].indices.tolist() == named.tolist()
        self.close(reply["t"].values, self.model.p[[POOL.tolist().index(each) for each in named.tolist()]])

    def load(self) -> None:
        """Load the parameters of some rows, of new ids too; moments and numbers stay."""
        rows = self.rng.permutation(ROWS)[: self.chance.choice([0, 1, 3])]
        values = self.rng.standard_normal((len(rows), WIDTH)).astype(np.float32)
        loaded = {"t": Rows(POOL[rows], values)}
        if not self.make_room(set(rows.tolist())):
            with pytest.raises(stepwire.ResourceExhaustedError, match="ids are new"):
                self.session.load_rows(loaded)
            return
        self.session.load_rows(loaded)
        self.model.p[rows] = values

    def pull(self) -> None:
        order = self.rng.permutation(ROWS)
        pulled: Any = self.session.pull(rows={"t": POOL[order]})
        self.close(pulled["t"].values, self.model.p[order])
        (use,) = self.session.info().tables
        assert (use.rows, use.evicted_rows) == (len(self.last), self.evicted)

    def another_client(self) -> None:
        """Go on from a client that knows the session's id alone."""
        session_id = self.session.session_id
        self.session.detach()
        self.session = self.client.session(session_id)
        self.session.attach(take_over=True)

    def close(self, found: Any, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_a_program_ends_as_its_model(client: stepwire.Client, seed: int) -> None:
    program = Program(seed, client)
    for _ in range(20):
        program.chance.choice([program.step] * 6 + [program.pull, program.load, program.another_client])()
    program.pull()
    program.session.close()
