"""Tables that are cut over servers by ranges of rows: the bits of one server, failures of a shard, workers, torch."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows
from tests.integration.sharding.pair import decided
from tests.integration.workers.together import together
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

SHAPES = {"a": (1500, 10, 10), "w": (50,), "b": (8000, 30), "c": (4, 2)}
MEANINGS = {"a": "torch_sparse", "b": "row_counter", "c": "torch_sparse"}
GROUPS = [{"params": ["b"], "lr": 0.05}]
ADAM = stepwire.Adam(lr=0.1)


@pytest.fixture(scope="module")
def targets() -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(numpy_server(max_chunk_bytes=64 << 10)) for _ in range(3)]
        yield [server.target for server in servers]


@pytest.fixture(scope="module")
def many(targets: list[str]) -> Iterator[stepwire.Client]:
    with stepwire.connect(targets) as client:
        yield client


@pytest.fixture(scope="module")
def one(targets: list[str]) -> Iterator[stepwire.Client]:
    with stepwire.connect(targets[0]) as client:
        yield client


def start() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def drawn(step: int) -> dict[str, Any]:
    """Draw rows with repetitions, of all shards or of the first one alone."""
    rng = np.random.default_rng(step + 1)
    found: dict[str, Any] = {"w": rng.standard_normal(50, np.float32)}
    for name in MEANINGS:
        rows = rng.integers(0, SHAPES[name][0] if step % 2 else 4, 40 if step % 3 else 400)
        found[name] = Rows(rows, rng.standard_normal((len(rows), *SHAPES[name][1:]), np.float32))
    return found


def plain(found: Any) -> Any:
    return {
        name: (value.indices.tolist(), value.values.tobytes()) if isinstance(value, Rows) else value.tobytes()
        for name, value in found.items()
    }


def state_of(session: stepwire.Session) -> Any:
    state = session.state()
    return state.step, state.tensor_steps, {slot: plain(named) for slot, named in state.slots.items()}


@pytest.mark.many
@pytest.mark.parametrize(
    "options", [{}, {"non_finite": "allow"}, {"clip_grad_norm": 1.0}], ids=["reject", "allow", "norm"]
)
@pytest.mark.parametrize("meaning", [None, "global", "skipped"])
def test_shards_of_tables_have_the_bits_of_one_server(
    one: stepwire.Client, many: stepwire.Client, options: dict[str, Any], meaning: str | None
) -> None:
    tables = MEANINGS if meaning is None else dict.fromkeys(MEANINGS, meaning)
    shared: dict[str, Any] = {"optimizer": ADAM, "tables": tables, "groups": GROUPS} | options
    with one.create_session(start(), **shared) as whole, many.create_session(start(), **shared) as cut:
        held = [name.split("[")[0] for shard in cut.shards for name in shard.shapes]
        assert held.count("a") == held.count("b") == 2
        for step in range(4):
            told: list[str] = []
            reply = cut.step(drawn(step), on_tensor=lambda name, values, told=told: told.append(name))
            assert plain(reply) == plain(whole.step(drawn(step)))
            assert sorted(told) == sorted(SHAPES)
            if options != {"non_finite": "allow"}:
                assert decided(cut.last_result) == decided(whole.last_result)
        asked = {"b": np.random.default_rng(9).integers(0, 8000, 50), "a": [3, 3, 1499], "c": []}
        assert plain(cut.pull(rows=asked)) == plain(whole.pull(rows=asked))
        assert plain(cut.pull(rows={"c": [1]})) == plain(whole.pull(rows={"c": [1]}))
        assert state_of(cut) == state_of(whole)
        again = many.session(cut.session_id)
        assert plain(again.pull(rows=asked)) == plain(whole.pull(rows=asked))
        again.attach(take_over=True)
        assert plain(again.step(drawn(4))) == plain(whole.step(drawn(4)))


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("policy", ["reject", "allow"])
def test_a_step_whose_reply_one_shard_lost_is_finished_once(
    one: stepwire.Client, many: stepwire.Client, applied: bool, policy: Any
) -> None:
    shared: dict[str, Any] = {"optimizer": ADAM, "tables": MEANINGS, "groups": GROUPS, "non_finite": policy}
    with one.create_session(start(), **shared) as whole, many.create_session(start(), **shared) as cut:
        link: Any = cut._link.shards[1]

        def is_second(hold: Any) -> bool:
            return bool(hold is link.hold)

        for step in range(3):
            with (
                lost_replies(applied=applied, of=is_second),
                pytest.raises(stepwire.StepwireError),
            ):
                cut.step(drawn(step), timeout=5.0)
            assert plain(cut.step(drawn(step))) == plain(whole.step(drawn(step)))
        assert state_of(cut) == state_of(whole)


def test_a_row_that_is_not_finite_is_named_in_the_whole(many: stepwire.Client) -> None:
    with many.create_session(start(), tables=MEANINGS) as session:
        bad = drawn(1) | {"b": Rows([7999], np.full((1, 30), np.nan, np.float32))}
        with pytest.raises(stepwire.NonFiniteGradientError, match="'b'") as refused:
            session.step(bad)
        assert refused.value.metadata["element"] == str(7999 * 30)
        session.step(drawn(1))
        assert session.applied_step == 1


def test_a_table_that_servers_make_has_the_values_of_one(one: stepwire.Client, many: stepwire.Client) -> None:
    table = stepwire.Table((5000, 64), "skipped", uniform_bound=0.5, seed=2**64 - 3)
    with one.create_session({"t": table}) as whole, many.create_session({"t": table}) as cut:
        assert len(cut.shards) == 3
        assert plain(cut.pull()) == plain(whole.pull())
        found: Any = many.session(cut.session_id)
        assert found.shapes == {"t": (5000, 64)}
        assert plain(found.pull(rows={"t": [4999, 0]})) == plain(whole.pull(rows={"t": [4999, 0]}))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_step_shards_of_tables(one: stepwire.Client, targets: list[str], mode: Any) -> None:
    """Gradients of a few bits, whose sums are exact; asynchronous workers take turns."""
    shared: dict[str, Any] = {"optimizer": ADAM, "tables": {"t": "row_counter"}}
    way = {"aggregation": stepwire.Aggregation(workers=2, mode=mode), "request_id": uuid.uuid4().hex}
    zeros = {"t": np.zeros((5000, 64), np.float32), "w": np.zeros(3, np.float32)}
    rng = np.random.default_rng(5)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(stepwire.connect(targets)) for _ in range(2)]
        sessions = [client.create_session(zeros, worker=at, **way, **shared) for at, client in enumerate(clients)]
        alone = stack.enter_context(one.create_session(zeros, **shared))
        for _ in range(3):
            given, total, came = [], np.zeros((5000, 64)), np.zeros(0, np.int64)
            for _ in range(2):
                rows, values = rng.integers(0, 5000, 60), rng.integers(-9, 10, (60, 64)).astype(np.float32)
                given.append({"t": Rows(rows, values), "w": np.ones(3, np.float32)})
                np.add.at(total, rows, values)
                came = np.union1d(came, rows)
            calls = [functools.partial(each.step, own) for each, own in zip(sessions, given, strict=True)]
            replies: list[Any] = together(*calls) if mode == "sync" else [call() for call in calls]
            if mode == "sync":
                alone.step({"t": Rows(came, (total[came] / 2).astype(np.float32)), "w": np.ones(3, np.float32)})
            else:
                for own in given:
                    alone.step(own)
            pulled: Any = alone.pull()
            indices = np.unique(given[1]["t"].indices)
            assert replies[1]["t"].values.tobytes() == pulled["t"][indices].tobytes()
        assert state_of(sessions[0]) == state_of(alone)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_worker_loads_after_steps_that_another_made(targets: list[str], mode: Any) -> None:
    """Rows, and whole parameters: the number of a worker's own contributions is not the step of the session."""
    way = {"aggregation": stepwire.Aggregation(workers=2, mode=mode), "request_id": uuid.uuid4().hex}
    zeros = {"t": np.zeros((5000, 64), np.float32), "w": np.zeros(3, np.float32)}
    gradient = {"t": Rows([1], np.ones((1, 64), np.float32)), "w": np.ones(3, np.float32)}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(stepwire.connect(targets)) for _ in range(2)]
        sessions = [
            each.create_session(zeros, worker=at, tables={"t": "skipped"}, **way) for at, each in enumerate(clients)
        ]
        steps = [functools.partial(each.step, gradient) for each in sessions]
        if mode == "sync":
            together(*steps)
        else:
            steps[0](), steps[0](), steps[1]()
        sessions[1].load_rows({"t": Rows([4999, 0], np.full((2, 64), 7.0, np.float32))})
        found: Any = sessions[0].pull()
        assert found["t"][[4999, 0, 2], 0].tolist() == [7.0, 7.0, 0.0]
        sessions[0].load(zeros)
        assert sessions[1].pull(rows={"t": [4999, 1]})["t"].values.max() == 0.0  # type: ignore[call-overload]
        assert [shard.info().applied_step for shard in sessions[0].shards] == [1 if mode == "sync" else 3] * len(
            sessions[0].shards
        )


def test_a_load_of_moments_is_refused_before_a_shard_has_it(many: stepwire.Client) -> None:
    with many.create_session(start(), tables=MEANINGS) as session:
        session.step(drawn(1))
        with pytest.raises(stepwire.UnsupportedFeatureError, match="moments and t of table 'b'"):
            session.load_state(session.state())
        session.load(start())
        session.step(drawn(2))
        assert session.applied_step == 2


@pytest.mark.many
@pytest.mark.parametrize(
    ("optimizer", "meaning"),
    [
        (ADAM, None),
        (ADAM, "skipped"),
        (stepwire.Adagrad(lr=0.1, initial_accumulator_value=0.5), "row_wise"),
        (stepwire.SGD(lr=0.1), "torch_sparse"),
    ],
    ids=["mixed", "skipped", "row_wise", "sgd"],
)
def test_tables_move_with_the_numbers_of_their_rows(
    one: stepwire.Client, targets: list[str], optimizer: Any, meaning: str | None
) -> None:
    tables = MEANINGS if meaning is None else dict.fromkeys(MEANINGS, meaning)
    shared: dict[str, Any] = {"optimizer": optimizer, "tables": tables, "groups": GROUPS}
    with stepwire.connect(targets[:2]) as client:
        with one.create_session(start(), **shared) as whole, client.create_session(start(), **shared) as cut:
            for step in range(7):
                if step in (2, 4, 5):
                    onto = {2: targets, 4: targets[2:], 5: targets[::-1][:2]}[step]
                    stepwire.move_session(cut.session_id, targets, onto)
                assert plain(cut.step(drawn(step))) == plain(whole.step(drawn(step)))
            if meaning != "row_wise":  # of which no state has the sums, and each step of which shows them
                assert state_of(cut) == state_of(whole)
            assert plain(cut.pull()) == plain(whole.pull())
