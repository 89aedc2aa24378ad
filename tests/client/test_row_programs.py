"""Random programs of row steps, dense steps, pulls, loads and new clients, against a model in float64.

`EXAMPLES` in the environment is the number of programs, in the place of a few.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows
from tests.client.test_rows import ADAM, LR, ROWS, WIDTH, Reference

EXAMPLES = int(os.environ.get("EXAMPLES", "4"))
MEANINGS = ("torch_sparse", "row_counter", "skipped", "global")


class Program:
    """A session with two tables and a dense tensor, and the model of it."""

    def __init__(self, seed: int, client: stepwire.Client) -> None:
        self.chance, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.meanings = {name: self.chance.choice(MEANINGS) for name in ("a", "b")}
        self.client = client
        values = {name: self.values() for name in self.meanings}
        self.model = {name: Reference("adam", self.meanings[name], table) for name, table in values.items()}
        self.w = np.zeros(3)
        self.session = client.create_session(
            {"a": values["a"], "w": np.zeros(3, np.float32), "b": values["b"]},
            optimizer=ADAM,
            groups=[{"params": ["w"], "lr": 0.5, "beta1": 0.0, "beta2": 0.0, "eps": 0.0}],
            tables=self.meanings,
            missing_gradient="keep",
        )

    def values(self) -> np.ndarray:
        return self.rng.standard_normal((ROWS, WIDTH)).astype(np.float32)

    def step(self) -> None:
        """Step any of the three; Adam without a past moves `w` by its learning rate."""
        gradients: dict[str, Any] = {"w": self.chance.choice([None, np.ones(3, np.float32)])}
        for name in self.meanings:
            count = self.chance.choice([None, 0, 1, 3, 12])
            if count is not None:
                rows = self.rng.integers(0, ROWS, count)
                gradients[name] = Rows(rows, self.rng.standard_normal((count, WIDTH)).astype(np.float32))
        if all(gradient is None for gradient in gradients.values()):
            return
        reply = self.session.step(gradients, reply=self.chance.choice(["parameters", "none"]))
        self.w -= 0.5 * (gradients["w"] is not None)
        for name, gradient in gradients.items():
            if isinstance(gradient, Rows):
                self.model[name].step(gradient.indices, gradient.values)
                if reply:
                    self.close(reply[name].values, self.model[name].p[np.unique(gradient.indices)])

    def pull_rows(self) -> None:
        rows = self.rng.integers(0, ROWS, 5)
        pulled = self.session.pull(rows={"b": rows, "a": rows[:2]})
        self.close(pulled["b"].values, self.model["b"].p[rows])
        self.close(pulled["a"].values, self.model["a"].p[rows[:2]])

    def pull(self) -> None:
        pulled = self.session.pull()
        for name, reference in self.model.items():
            self.close(pulled[name], reference.p)
        self.close(pulled["w"], self.w)

    def load(self) -> None:
        """Replace the parameters; moments and numbers of rows stay."""
        loaded = {name: self.values() for name in self.meanings}
        self.session.load({**loaded, "w": np.ones(3, np.float32)})
        self.w = np.ones(3)
        for name, values in loaded.items():
            self.model[name].p = values.astype(np.float64)

    def another_client(self) -> None:
        """Go on from a client that knows the session's id alone."""
        session_id = self.session.session_id
        self.session.detach()
        self.session = self.client.session(session_id)
        self.session.attach(take_over=True)

    def close(self, found: Any, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, rtol=5e-6, atol=5e-6 * LR / 0.05)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_a_program_ends_as_its_model(client: stepwire.Client, seed: int) -> None:
    program = Program(seed, client)
    actions = [program.step] * 6 + [program.pull_rows, program.pull, program.load, program.another_client]
    for _ in range(15):
        program.chance.choice(actions)()
    program.pull()
    program.session.close()
