"""Steps by rows of tables: each meaning against float64, torch and the dense step; refusals, replays, pulls of rows."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire import Rows

ROWS, WIDTH, STEPS = 9, 5, 6
LR, BETA1, BETA2, EPS, MU = 0.05, 0.8, 0.9, 1e-3, 0.7
ADAM = stepwire.Adam(lr=LR, betas=(BETA1, BETA2), eps=EPS)
OPTIMIZERS = {
    "adam": ADAM,
    "amsgrad": stepwire.Adam(lr=LR, betas=(BETA1, BETA2), eps=EPS, amsgrad=True),
    "sgd": stepwire.SGD(lr=LR),
    "momentum": stepwire.SGD(lr=LR, momentum=MU),
    "adagrad": stepwire.Adagrad(lr=LR, lr_decay=0.1, eps=EPS),
}
SERVED = [
    ("torch_sparse", "adam"),
    ("torch_sparse", "sgd"),
    ("torch_sparse", "adagrad"),
    *((meaning, rule) for meaning in ("row_counter", "skipped", "global") for rule in OPTIMIZERS),
]


def drawn(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batches(seed: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw the rows of some steps, with repetitions, in no order, and rows that sleep for some steps."""
    rng, found = drawn(seed), []
    for step in range(STEPS):
        rows = rng.integers(0, ROWS - 4, 7) if step % 2 else rng.integers(2, ROWS, 4)
        found.append((rows, rng.standard_normal((len(rows), WIDTH)).astype(np.float32)))
    return found


def dense(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Add rows up in float64."""
    gradient = np.zeros((ROWS, WIDTH))
    np.add.at(gradient, rows, values.astype(np.float64))
    return gradient


class Reference:
    """One table in float64, row by row, from the equations of the documentation."""

    def __init__(self, rule: str, meaning: str, parameters: np.ndarray) -> None:
        self.rule, self.meaning = rule, meaning
        self.p = parameters.astype(np.float64)
        self.m, self.v, self.x = (np.zeros_like(self.p) for _ in range(3))
        self.t, self.own, self.last = 0, np.zeros(ROWS, int), np.zeros(ROWS, int)

    def step(self, rows: np.ndarray, values: np.ndarray) -> None:
        gradient, came = dense(rows, values), set(rows.tolist())
        self.t += 1
        for row in range(ROWS):
            if row not in came and self.meaning != "global":
                continue
            self.own[row] += 1
            slept = self.t - 1 - self.last[row]
            self.last[row] = self.t
            if self.meaning == "skipped":
                weights = {"adam": (BETA1, BETA2), "amsgrad": (BETA1, BETA2), "momentum": (MU, 1.0)}
                first, second = weights.get(self.rule, (1.0, 1.0))
                self.m[row] *= first**slept
                self.v[row] *= second**slept
            t = int(self.own[row]) if self.meaning == "row_counter" else self.t
            self.p[row] -= self.displacement(row, gradient[row], t)

    def displacement(self, row: int, g: np.ndarray, t: int) -> Any:
        if self.rule == "sgd":
            return LR * g
        if self.rule == "momentum":
            self.m[row] = MU * self.m[row] + g
            return LR * self.m[row]
        if self.rule == "adagrad":
            self.v[row] += g * g
            return LR / (1 + (t - 1) * 0.1) * g / (np.sqrt(self.v[row]) + EPS)
        self.m[row] = BETA1 * self.m[row] + (1 - BETA1) * g
        self.v[row] = BETA2 * self.v[row] + (1 - BETA2) * g * g
        c1, c2 = 1 - BETA1**t, 1 - BETA2**t
        if self.meaning == "torch_sparse":
            return LR * math.sqrt(c2) / c1 * self.m[row] / (np.sqrt(self.v[row]) + EPS)
        self.x[row] = np.maximum(self.x[row], self.v[row])
        second = self.x[row] if self.rule == "amsgrad" else self.v[row]
        return LR / c1 * self.m[row] / (np.sqrt(second) / math.sqrt(c2) + EPS)


@pytest.mark.parametrize(("meaning", "rule"), SERVED)
def test_every_meaning_is_that_of_its_equations(client: stepwire.Client, meaning: str, rule: str) -> None:
    """Beside a dense tensor, and a table of another width whose rows never come."""
    table = drawn().standard_normal((ROWS, WIDTH)).astype(np.float32)
    parameters = {"other": np.ones((4, 3), np.float32), "table": table, "w": np.zeros(2, np.float32)}
    tables = {"table": meaning, "other": "row_counter"}
    reference = Reference(rule, meaning, table)
    with client.create_session(parameters, optimizer=OPTIMIZERS[rule], tables=tables) as session:
        for rows, values in batches():
            reference.step(rows, values)
            none = Rows([], np.empty((0, 3), np.float32))
            gradients = {"table": Rows(rows, values), "w": np.ones(2, np.float32), "other": none}
            reply = session.step(gradients)
            came = np.unique(rows)
            assert list(reply) == list(gradients) and reply["table"].indices.tolist() == came.tolist()
            np.testing.assert_allclose(reply["table"].values, reference.p[came], rtol=2e-6, atol=2e-6)
            norm = math.sqrt((dense(rows, values) ** 2).sum() + 2)
            assert session.last_result.grad_norm == pytest.approx(norm, rel=1e-6)
        pulled = session.pull()
        np.testing.assert_allclose(pulled["table"], reference.p, rtol=2e-6, atol=2e-6)
        assert np.all(pulled["other"] == 1.0)


@pytest.mark.parametrize("meaning", ["global", "row_counter", "skipped"])
def test_where_every_row_comes_the_meanings_are_the_dense_step(client: stepwire.Client, meaning: str) -> None:
    table, rng = drawn().standard_normal((ROWS, WIDTH)).astype(np.float32), drawn(2)
    options = {"optimizer": ADAM, "clip_grad_norm": 1.0}
    with (
        client.create_session({"table": table}, tables={"table": meaning}, **options) as session,
        client.create_session({"table": table}, **options) as other,
    ):
        for _ in range(3):
            gradient = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
            order = rng.permutation(ROWS)
            session.step({"table": Rows(order, gradient[order])}, lr=0.02)
            other.step({"table": gradient}, lr=0.02)
            assert np.array_equal(session.pull()["table"], other.pull()["table"])


def test_global_is_the_dense_step_bit_for_bit_and_skipped_has_its_moments(client: stepwire.Client) -> None:
    table = drawn().standard_normal((ROWS, WIDTH)).astype(np.float32)
    decayed = stepwire.AdamW(lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.1)
    with (
        client.create_session({"table": table}, optimizer=decayed, tables={"table": "global"}) as session,
        client.create_session({"table": table}, optimizer=decayed) as other,
        client.create_session({"table": table}, optimizer=ADAM, tables={"table": "skipped"}) as lazy,
    ):
        for rows, values in batches():
            gradient = dense(rows, values).astype(np.float32)
            session.step({"table": Rows(rows, values)})
            other.step({"table": gradient})
            lazy.step({"table": Rows(rows, values)})
        everything = Rows(np.arange(ROWS), np.zeros((ROWS, WIDTH), np.float32))
        lazy.step({"table": everything})
        other.step({"table": everything.values})
        session.step({"table": everything})
        states = [each.state() for each in (session, other, lazy)]
    for slot in ("param", "exp_avg", "exp_avg_sq"):
        assert np.array_equal(states[0].slots[slot]["table"], states[1].slots[slot]["table"])
    for slot in ("exp_avg", "exp_avg_sq"):
        wanted = states[1].slots[slot]["table"]
        np.testing.assert_allclose(states[2].slots[slot]["table"], wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_rows_travel_in_every_encoding_and_in_many_messages(client: stepwire.Client, dtype: str) -> None:
    """600 rows of 100 elements take several messages of 64 KiB, with a reply in bfloat16 of several too."""
    rng = drawn(3)
    table, rows = np.zeros((900, 100), np.float32), rng.permutation(900)[:600]
    values = rng.integers(-127, 128, (600, 100)).astype(np.float32)
    values[:, [0, 99]] = 127.0  # so that a quantum of int8 is 1 in every block, the last ones too
    options = {"tables": {"table": "torch_sparse"}, "gradient_dtype": dtype, "reply_dtype": "bfloat16"}
    with client.create_session({"table": table}, optimizer=stepwire.SGD(lr=1.0), **options) as session:
        reply = session.step({"table": Rows(rows, values)})["table"]
        assert session.pull(rows={"table": rows[:3]})["table"].values.tolist() == (-values[:3]).tolist()
    assert reply.indices.tolist() == sorted(rows.tolist()) and reply.values.dtype == ml_dtypes.bfloat16
    assert np.array_equal(reply.values, -values[np.argsort(rows)].astype(ml_dtypes.bfloat16))


def test_the_order_of_repeated_rows_changes_no_bit(client: stepwire.Client) -> None:
    probe = np.array([1e8, 1.0, -1e8, 1.0], np.float32)[:, np.newaxis]
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [1, 3, 0, 2]):
        options = {"optimizer": stepwire.SGD(lr=1.0), "tables": {"table": "torch_sparse"}}
        with client.create_session({"table": np.zeros((2, 1), np.float32)}, **options) as session:
            assert session.step({"table": Rows([1] * 4, probe[order])})["table"].values.tolist() == [[-2.0]]


def test_finite_policies_see_the_sum_of_each_row(client: stepwire.Client) -> None:
    table = {"table": np.ones((4, 2), np.float32)}
    bad = {"table": Rows([3, 1, 3], np.array([[1, np.inf], [1, 1], [0, -np.inf]], np.float32))}
    with client.create_session(table, tables={"table": "row_counter"}) as session:
        with pytest.raises(stepwire.NonFiniteGradientError, match="'table'") as refused:
            session.step(bad)
        assert (refused.value.metadata["element"], refused.value.metadata["non_finite_count"]) == ("7", "1")
        assert np.all(session.pull()["table"] == 1.0)
    with client.create_session(table, tables={"table": "row_counter"}, non_finite="skip") as session:
        reply = session.step(bad)["table"]
        assert session.last_result.skipped and (reply.indices.tolist(), reply.values.tolist()) == ([1, 3], [[1, 1]] * 2)


def test_a_table_may_be_left_out_and_then_its_t_stays(client: stepwire.Client) -> None:
    parameters = {"a": np.ones((3, 2), np.float32), "b": np.ones((3, 2), np.float32)}
    tables = dict.fromkeys(parameters, "torch_sparse")
    rows = Rows([0], np.ones((1, 2), np.float32))
    with client.create_session(parameters, tables=tables, missing_gradient="keep") as session:
        assert session.step({"a": rows, "b": None})["b"] is None
        session.step({"a": rows, "b": Rows([], np.empty((0, 2), np.float32))})
        assert session.state().tensor_steps == {"a": 2, "b": 1}


WRONG = {
    "a dense gradient": (np.ones((9, 5), np.float32), "pass stepwire.Rows"),
    "a row beyond the table": (Rows([9], np.ones((1, 5), np.float32)), r"row 9 is not in \[0, 9\)"),
    "a row below 0": (Rows([-1], np.ones((1, 5), np.float32)), r"row -1 is not in"),
    "another width": (Rows([1], np.ones((1, 4), np.float32)), r"shape \(1, 4\) for 1 rows, each of shape \(5,\)"),
    "more indices than rows": (Rows([1, 2], np.ones((1, 5), np.float32)), r"shape \(1, 5\) for 2 rows"),
    "float indices": (Rows([1.0], np.ones((1, 5), np.float32)), "one-dimensional integers"),
    "float64": (Rows([1], np.ones((1, 5))), "float64 is not served"),
    "nothing": (None, "the table has no gradient"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows_are_refused_by_the_client(client: stepwire.Client, what: str) -> None:
    gradient, message = WRONG[what]
    with client.create_session({"table": np.ones((9, 5), np.float32)}, tables={"table": "skipped"}) as session:
        with pytest.raises(stepwire.InvalidRequestError, match=message):
            session.step({"table": gradient})
        with pytest.raises(stepwire.InvalidRequestError, match="row 9 is not"):
            session.pull(rows={"table": [0, 9]})
        with pytest.raises(stepwire.UnsupportedFeatureError, match="rows come without the average"):
            session.pull(rows={"table": [0]}, average=True)
        assert session.applied_step == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "accumulation": (
        {"accumulation_steps": 2},
        "accumulation_steps.*use 'global' for all tables, or sum the gradients",
    ),
    "an average": (
        {"parameter_average_decay": 0.9},
        "parameter_average_decay.*use 'global' for all tables, or average",
    ),
    "moments in bfloat16": ({"state_precision": "bfloat16"}, "has bfloat16 moments"),
    "a median": ({"aggregation": stepwire.Aggregation(workers=2, reduction="median")}, "aggregation.reduction"),
    "weight decay": ({"optimizer": stepwire.AdamW()}, "weight decay 0.01 has no meaning"),
    "a layerwise rule": ({"optimizer": stepwire.LAMB()}, "adam, sgd, adagrad"),
    "momentum": ({"optimizer": stepwire.SGD(momentum=0.9)}, "'global'"),
    "amsgrad": ({"optimizer": stepwire.Adam(amsgrad=True)}, "SparseAdam has no AMSGrad"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_tables_exclude_is_refused_at_creation(client: stepwire.Client, what: str) -> None:
    options, message = REFUSED[what]
    with pytest.raises(stepwire.UnsupportedFeatureError, match=message) as refused:
        client.create_session({"table": np.ones((9, 5), np.float32)}, tables={"table": "torch_sparse"}, **options)
    assert refused.value.metadata["feature"] == "sparse_rows"


@pytest.mark.parametrize("policy", ["reject", "skip"])
@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_global_tables_accumulate_and_average_as_dense_tensors_do(
    client: stepwire.Client, rule: str, policy: Any
) -> None:
    """Bit for bit, with clipping over the sum; a sum that is not finite is dropped, or refused beforehand."""
    start = {"table": drawn().standard_normal((ROWS, WIDTH)).astype(np.float32), "w": np.ones(3, np.float32)}
    options: dict[str, Any] = {"optimizer": OPTIMIZERS[rule], "accumulation_steps": 2, "parameter_average_decay": 0.5}
    options |= {"clip_grad_norm": 0.75, "non_finite": policy}
    with (
        client.create_session(start, tables={"table": "global"}, **options) as session,
        client.create_session(start, **options) as whole,
    ):
        for number, (rows, values) in enumerate(batches()):
            if number in (2, 3) and policy == "skip":
                values = np.full_like(values, 3e38 if number == 2 else np.inf)
            with np.errstate(over="ignore"):
                gradient = dense(rows, values).astype(np.float32)
            w = np.full(3, number, np.float32)
            reply: Any = session.step({"table": Rows(rows, values), "w": w})
            other: Any = whole.step({"table": gradient, "w": w})
            assert reply["table"].values.tobytes() == other["table"][np.unique(rows)].tobytes()
            assert session.last_result is not None and whole.last_result is not None
            assert session.last_result.grad_norm == whole.last_result.grad_norm
            assert session.last_result.skipped == whole.last_result.skipped == (policy == "skip" and number == 3)
        mine, its = session.state(), whole.state()
        assert mine.tensor_steps == its.tensor_steps
        for slot, named in its.slots.items():
            for name, expected in named.items():
                assert mine.slots[slot][name].tobytes() == expected.tobytes(), (slot, name)
        assert session.pull(average=True)["table"].tobytes() == whole.pull(average=True)["table"].tobytes()


def test_the_average_of_a_table_that_the_server_makes_begins_with_its_first_values(client: stepwire.Client) -> None:
    table = {"table": stepwire.Table((5, 3), "global", uniform_bound=0.5, seed=3)}
    with client.create_session(table, optimizer=stepwire.SGD(lr=1.0), parameter_average_decay=0.5) as session:
        first: Any = session.pull()
        assert session.pull(average=True)["table"].tobytes() == first["table"].tobytes()
        session.step({"table": Rows([4], np.ones((1, 3), np.float32))})
        assert session.pull(average=True)["table"][4].tolist() == pytest.approx((first["table"][4] - 0.5).tolist())


def test_a_load_of_moments_without_the_numbers_of_rows_is_refused(client: stepwire.Client) -> None:
    table = {"table": np.ones((3, 2), np.float32)}
    with client.create_session(table, tables={"table": "row_counter"}) as session:
        state = session.state()
        with pytest.raises(stepwire.UnsupportedFeatureError, match="numbers of its rows"):
            session.load_state(state)
        session.load({"table": np.full((3, 2), 2.0, np.float32)})
        assert session.step({"table": Rows([1], np.zeros((1, 2), np.float32))})["table"].values.tolist() == [[2, 2]]


def test_a_server_makes_a_table_that_no_client_holds(client: stepwire.Client) -> None:
    """Output 1 of SplitMix64 for seed 1234567 is 6457827717110365317, by the reference code."""
    table = stepwire.Table((5, 3), "row_counter", uniform_bound=0.5, seed=1234567)
    with client.create_session({"table": table}, optimizer=stepwire.SGD(lr=1.0)) as session:
        values = session.pull()["table"]
        assert values[0, 0] == np.float32(0.5 * ((6457827717110365317 >> 40) / 2**23 - 1))
        assert np.all(np.abs(values) <= 0.5) and len(np.unique(values)) == 15
        reply = session.step({"table": Rows([4, 4], np.ones((2, 3), np.float32))})
        assert np.array_equal(reply["table"].values[0], values[4] - 2)
    with pytest.raises(stepwire.InvalidRequestError, match="nothing else to load"):
        client.create_session({"table": table, "w": np.ones(2, np.float32)})
    with pytest.raises(stepwire.InvalidRequestError, match=r"uniform_bound.*-1"):
        client.create_session({"table": stepwire.Table((5, 3), uniform_bound=-1.0)})


def test_a_table_stands_beside_moments_in_8_bits(client: stepwire.Client) -> None:
    """A dense tensor of 5,000 elements ends inside a block of its moments, and the table begins at the next."""
    rng = drawn(4)
    table, w = np.ones((ROWS, WIDTH), np.float32), rng.standard_normal(5000).astype(np.float32)
    options: dict[str, Any] = {"optimizer": ADAM, "state_precision": "int8"}
    mixed = {"tensor_precision": {"table": "float32"}, "tables": {"table": "row_counter"}}
    with (
        client.create_session({"table": table, "w": w}, **options, **mixed) as session,
        client.create_session({"w": w}, **options) as alone,
        client.create_session({"table": table}, optimizer=ADAM, tables={"table": "row_counter"}) as other,
    ):
        for rows, values in batches()[:3]:
            gradient = rng.standard_normal(5000).astype(np.float32)
            reply = session.step({"table": Rows(rows, values), "w": gradient})
            assert np.array_equal(reply["w"], alone.step({"w": gradient})["w"])
            assert np.array_equal(reply["table"].values, other.step({"table": Rows(rows, values)})["table"].values)


@pytest.mark.parametrize("tables", [{}, {"table": "torch_sparse"}])
def test_rows_of_a_dense_tensor_are_refused(client: stepwire.Client, tables: dict[str, Any]) -> None:
    start = {"table": np.ones((3, 2), np.float32), "w": np.ones((3, 2), np.float32)}
    with client.create_session(start, tables=tables) as session:
        with pytest.raises(stepwire.InvalidRequestError, match=r"gradients\['w'\]: rows are for tables"):
            session.step({**start, **{name: Rows([0], start["w"][:1]) for name in (*tables, "w")}})
        with pytest.raises(stepwire.InvalidRequestError, match=r"parameters\['w'\]: rows are for tables"):
            session.load(start | {"w": Rows([0], start["w"][:1])})
