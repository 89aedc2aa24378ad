"""Adagrad with one sum a row: against float64 and TorchRec's arithmetic, kept on disk, and refused elsewhere."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows
from tests.client.test_rows import ROWS, STEPS, WIDTH, batches, dense, drawn
from tests.support.numpy_server import numpy_server

LR, DECAY, FIRST, EPS = 0.1, 0.2, 0.5, 1e-3
OPTIMIZER = stepwire.Adagrad(lr=LR, lr_decay=DECAY, initial_accumulator_value=FIRST, eps=EPS)
TABLES: Any = {"table": "row_wise"}


class Reference:
    """One table in float64, row by row, from the equations of the documentation."""

    def __init__(self, parameters: np.ndarray) -> None:
        self.p, self.s, self.t = parameters.astype(np.float64), np.full(ROWS, FIRST), 0

    def step(self, rows: np.ndarray, values: np.ndarray, treated: Any = lambda g: g) -> None:
        gradient = treated(dense(rows, values))
        self.t += 1
        for row in set(rows.tolist()):
            self.s[row] += (gradient[row] ** 2).mean()
            size = LR / (1 + (self.t - 1) * DECAY) / (np.sqrt(self.s[row]) + EPS)
            self.p[row] -= size * gradient[row]


def table() -> np.ndarray:
    return drawn().standard_normal((ROWS, WIDTH)).astype(np.float32)


def test_a_row_moves_by_the_root_of_its_own_sum(client: stepwire.Client) -> None:
    """Beside a dense tensor, whose elements have sums of their own; a step of no row counts."""
    reference, parameters = Reference(table()), {"table": table(), "w": np.ones(2, np.float32)}
    local = client.create_session({"w": np.ones(2, np.float32)}, optimizer=OPTIMIZER)
    with local, client.create_session(parameters, optimizer=OPTIMIZER, tables=TABLES) as session:
        for rows, values in [*batches(), (np.empty(0, int), np.empty((0, WIDTH), np.float32)), *batches(9)]:
            reference.step(rows, values)
            reply = session.step({"table": Rows(rows, values), "w": np.full(2, 0.5, np.float32)})
            alone = local.step({"w": np.full(2, 0.5, np.float32)})
            assert np.array_equal(reply["w"], alone["w"])
            came = np.unique(rows)
            np.testing.assert_allclose(reply["table"].values, reference.p[came], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(session.pull()["table"], reference.p, rtol=2e-6, atol=2e-6)


def test_the_squares_are_those_of_the_gradient_that_the_rule_gets(client: stepwire.Client) -> None:
    """Unscaled, clipped by norm, then by value; and several messages each way."""
    reference = Reference(table())
    options: dict[str, Any] = {"clip_grad_norm": 2.0, "clip_grad_value": 0.75}

    def treated(gradient: np.ndarray) -> np.ndarray:
        norm = np.sqrt((gradient**2).sum())
        return np.clip(gradient * min(2.0 / (norm + 1e-6), 1.0), -0.75, 0.75)

    with client.create_session({"table": table()}, optimizer=OPTIMIZER, tables=TABLES, **options) as session:
        for rows, values in batches():
            reference.step(rows, values, treated)
            session.step({"table": Rows(rows, values * np.float32(8))}, loss_scale=8.0, reply="none")
        np.testing.assert_allclose(session.pull()["table"], reference.p, rtol=3e-6, atol=3e-6)
    wide, rng = np.zeros((700, 100), np.float32), drawn(3)
    gradient = rng.standard_normal((600, 100)).astype(np.float32)
    rows = rng.permutation(700)[:600]
    with client.create_session({"table": wide}, optimizer=OPTIMIZER, tables=TABLES) as session:
        reply = session.step({"table": Rows(rows, gradient)})["table"]
    sums = FIRST + (gradient.astype(np.float64) ** 2).mean(axis=1)
    moved = -LR / (np.sqrt(sums) + EPS)[:, np.newaxis] * gradient
    np.testing.assert_allclose(reply.values, moved[np.argsort(rows)], rtol=1e-6)


def test_a_table_alone_keeps_four_bytes_a_row_beside_itself(client: stepwire.Client) -> None:
    table = stepwire.Table((4096, 64), "row_wise", uniform_bound=0.5, seed=3)
    with client.create_session({"table": table}, optimizer=stepwire.Adagrad(lr=0.1)) as session:
        assert session.slots == ("param",)
        assert session.info().memory_bytes == 4096 * 64 * 4 + 4096 * 4
        session.step({"table": Rows([5], np.ones((1, 64), np.float32))})
        moved = session.pull(rows={"table": [5, 6]})["table"].values
        assert moved[0].tolist() == pytest.approx((session.pull()["table"][5]).tolist())


def test_checkpoints_forks_and_journals_have_the_sums(tmp_path: pathlib.Path) -> None:
    """A table alone with a journal, and one beside a dense tensor with checkpoints: later steps have the same bits."""
    parameters = {"table": table(), "w": np.ones(2, np.float32)}
    w = {"w": np.ones(2, np.float32)}
    steps = [{"table": Rows(rows, values)} for rows, values in batches()]
    with numpy_server(data_dir=str(tmp_path / "data")) as server, stepwire.connect(server.target) as client:
        options: dict[str, Any] = {"optimizer": OPTIMIZER, "tables": TABLES}
        alone = client.create_session({"table": table()}, durability="journal", **options)
        beside = client.create_session(parameters, durability="checkpoint", **options)
        for step in steps[:3]:
            alone.step(step)
            beside.step({**step, **w})
        beside.save_checkpoint("third")
        alone.save_checkpoint("third")
        alone.step(steps[3])
        with pytest.raises(stepwire.UnsupportedFeatureError, match="fork the state instead"):
            beside.rollback(checkpoint="third")
        with pytest.raises(stepwire.UnsupportedFeatureError, match="which no load brings"):
            beside.load_state(beside.state())
        shutil.copytree(tmp_path / "data", tmp_path / "image")
        wanted = [alone.step(step)["table"].values.tobytes() for step in steps[4:]]
        with beside.fork(checkpoint="third") as fork:
            forked = [fork.step({**step, **w})["table"].values.tobytes() for step in steps[3:]]
        assert forked == [beside.step({**step, **w})["table"].values.tobytes() for step in steps[3:]]
    with numpy_server(data_dir=str(tmp_path / "image")) as server, stepwire.connect(server.target) as client:
        again = client.session(alone.own_id)
        again.attach(take_over=True)
        assert again.applied_step == 4
        assert [again.step(step)["table"].values.tobytes() for step in steps[4:]] == wanted
    assert len(steps) == STEPS


def test_other_rules_and_weight_decay_are_refused(client: stepwire.Client) -> None:
    for optimizer, words in [
        (stepwire.Adam(), "one sum a row is Adagrad's, and the rule is 'adam'; use Adagrad"),
        (stepwire.Adagrad(weight_decay=0.1), "has no meaning for rows that sleep"),
    ]:
        with pytest.raises(stepwire.UnsupportedFeatureError, match=words):
            client.create_session({"table": table()}, optimizer=optimizer, tables=TABLES)


def test_a_sum_that_is_not_finite_stops_its_row_alone(client: stepwire.Client) -> None:
    """As of an element: an infinite sum moves nothing any more, and NaN stays NaN."""
    options: dict[str, Any] = {"optimizer": stepwire.Adagrad(lr=1.0), "tables": TABLES, "non_finite": "allow"}
    with client.create_session({"table": np.zeros((4, 2), np.float32)}, **options) as session:
        session.step({"table": Rows([0, 1], np.array([[3e38, 3e38], [np.nan, 1.0]], np.float32))})
        session.step({"table": Rows([0, 1, 2], np.ones((3, 2), np.float32))})
        pulled = session.pull()["table"]
    assert pulled[0].tolist() == [0.0, 0.0] and np.isnan(pulled[1]).all()
    assert pulled[2].tolist() == [-1.0, -1.0] and pulled[3].tolist() == [0.0, 0.0]
