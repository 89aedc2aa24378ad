"""Tables whose rows are named by ids: beside a table of indices, on disk, full, with rows that give way."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire import Rows, Table
from stepwire.links import table_rows
from stepwire.sharding import partition
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

WIDTH, BOUND, SEED = 4, 0.5, 11
ADAM = stepwire.Adam(lr=0.1, betas=(0.8, 0.9), eps=1e-3)
POOL = np.array([3, 2**63 - 1, 5_000_000_000, 17, 2**40 + 1, 0, 99, 2**62], np.int64)
"""Ids, whose order of first use is not theirs."""


def outputs(seed: int, number: int) -> int:
    """Return an output of SplitMix64, from 1, in integers."""
    z = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def first(ids: Any) -> np.ndarray:
    """Return the first values of rows, as the contract has them."""
    seeds = [outputs(SEED, int(each) + 1) for each in ids]
    units = [[(outputs(seed, i + 1) >> 40) / 2.0**23 - 1.0 for i in range(WIDTH)] for seed in seeds]
    return (np.array(units, np.float32) * np.float32(BOUND)).reshape(-1, WIDTH)


def hashed(capacity: int = 16, semantics: str = "torch_sparse", **options: Any) -> dict[str, Table]:
    return {"t": Table((capacity, WIDTH), semantics, BOUND, SEED, hashed=True, **options)}


def batches(count: int, seed: int = 1) -> list[Rows]:
    rng = np.random.default_rng(seed)
    ids = [rng.choice(POOL[: 2 + turn], 5) for turn in range(count)]
    return [Rows(each, rng.standard_normal((5, WIDTH)).astype(np.float32)) for each in ids]


@pytest.mark.parametrize("semantics", ["torch_sparse", "row_counter", "skipped", "row_wise"])
def test_a_row_is_stepped_as_that_of_a_table_of_indices(client: stepwire.Client, semantics: str) -> None:
    """Every reply and pull has its bits, with first values for ids that no step has named."""
    rule = stepwire.Adagrad(lr=0.1, initial_accumulator_value=0.5) if semantics == "row_wise" else ADAM
    places = {int(each): place for place, each in enumerate(POOL)}
    plain = {"t": first(POOL)}
    with (
        client.create_session(hashed(semantics=semantics), optimizer=rule) as session,
        client.create_session(plain, optimizer=rule, tables={"t": semantics}) as other,
    ):
        for rows in batches(6):
            reply = session.step({"t": rows})["t"]
            own = other.step({"t": Rows([places[int(each)] for each in rows.indices], rows.values)})["t"]
            assert reply.indices.tolist() == np.unique(rows.indices).tolist()
            expected = dict(zip(own.indices.tolist(), own.values.tolist(), strict=True))
            assert reply.values.tolist() == [expected[places[int(each)]] for each in reply.indices]
            pulled = session.pull(rows={"t": POOL[::-1]})["t"].values
            assert np.array_equal(pulled, other.pull()["t"][::-1])
        half = session.pull(rows={"t": [4, 17]}, dtype="bfloat16")["t"].values
        assert np.array_equal(half[:1], first([4]).astype(ml_dtypes.bfloat16))
        (use,) = session.info().tables
        came = np.unique(np.concatenate([rows.indices for rows in batches(6)]))
        assert (use.name, use.rows, use.evicted_rows) == ("t", len(came), 0)


def test_a_step_that_is_skipped_or_refused_makes_no_row(client: stepwire.Client) -> None:
    ones = np.ones((2, WIDTH), np.float32)
    with client.create_session(hashed(3), optimizer=ADAM, non_finite="skip") as session:
        reply = session.step({"t": Rows([8, 9], ones * np.float32("nan"))})["t"]
        assert np.array_equal(reply.values, first([8, 9])) and session.info().tables[0].rows == 0
        session.step({"t": Rows([8, 9], ones)})
        with pytest.raises(stepwire.ResourceExhaustedError, match="2 of 3 rows, and 2 ids are new") as full:
            session.step({"t": Rows([10, 11], ones)})
        assert full.value.metadata["table"] == "t" and session.info().tables[0].rows == 2
        session.step({"t": Rows([10, 8], ones)})  # the same number, with another gradient
        assert session.applied_step == 3 and session.info().tables[0].rows == 3


def test_rows_that_did_not_come_of_late_give_way_with_all_they_had(client: stepwire.Client) -> None:
    """An evicted row has its first values again, and moments and t of a new one when it comes back."""
    ones, fresh = np.ones((1, WIDTH), np.float32), ADAM
    with (
        client.create_session(hashed(2, "row_counter", max_age_steps=2), optimizer=fresh) as session,
        client.create_session(hashed(2, "row_counter"), optimizer=fresh) as other,
    ):
        for step in ([1], [2], [2]):
            session.step({"t": Rows(step, ones)})
        with pytest.raises(stepwire.ResourceExhaustedError, match="max_age_steps"):
            session.step({"t": Rows([3, 4], np.ones((2, WIDTH), np.float32))})  # 1 alone is old enough
        session.step({"t": Rows([3], ones)})
        assert np.array_equal(session.pull(rows={"t": [1]})["t"].values, first([1]))
        use = session.info().tables[0]
        assert (use.rows, use.evicted_rows) == (2, 1)
        for step in ([3], [3]):
            session.step({"t": Rows(step, ones)})
        back = session.step({"t": Rows([1], 2 * ones)})["t"].values
        assert np.array_equal(back, other.step({"t": Rows([1], 2 * ones)})["t"].values)


def test_a_reply_that_was_lost_comes_again(client: stepwire.Client) -> None:
    (rows, *_), options = batches(1), {"optimizer": ADAM}
    with client.create_session(hashed(), **options) as session, client.create_session(hashed(), **options) as twin:
        with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
            session.step({"t": rows})
        reply = session.step({"t": rows})["t"]
        assert np.array_equal(reply.values, twin.step({"t": rows})["t"].values) and session.applied_step == 1


def test_journals_checkpoints_and_forks_go_on_with_the_same_bits(tmp_path: pathlib.Path) -> None:
    """Through evictions: both sides of a restart give way the same rows, and give their places to the same ids."""
    steps, many = batches(20), np.arange(1000, 1004)
    steps[4] = Rows(many, np.ones((4, WIDTH), np.float32))

    def replies(session: stepwire.Session, some: list[Rows]) -> list[bytes]:
        return [session.step({"t": each})["t"].values.tobytes() for each in some]

    with numpy_server(data_dir=str(tmp_path / "data")) as server, stepwire.connect(server.target) as client:
        options: dict[str, Any] = {"optimizer": ADAM}
        tables = hashed(10, "skipped", max_age_steps=1)
        twin = client.create_session(tables, **options)
        wanted = replies(twin, steps)
        logged = client.create_session(tables, durability="journal", **options)
        saved = client.create_session(tables, durability="checkpoint", **options)
        assert replies(logged, steps[:9]) == replies(saved, steps[:9]) == wanted[:9]
        for session in (logged, saved):
            session.save_checkpoint("ninth")
        assert replies(logged, steps[9:13]) == wanted[9:13]
        shutil.copytree(tmp_path / "data", tmp_path / "image")
        with saved.fork(checkpoint="ninth") as fork:
            assert replies(fork, steps[9:]) == wanted[9:]
        with pytest.raises(stepwire.UnsupportedFeatureError, match="fork the state instead"):
            saved.rollback(checkpoint="ninth")
        assert twin.info().tables[0].evicted_rows > 0
    with numpy_server(data_dir=str(tmp_path / "image")) as server, stepwire.connect(server.target) as client:
        for session_id, applied in ((logged.own_id, 13), (saved.own_id, 9)):
            again = client.session(session_id)
            again.attach(take_over=True)
            assert again.applied_step == applied and replies(again, steps[applied:]) == wanted[applied:]


@pytest.mark.parametrize("shards", [1, 3])
def test_whole_tables_come_with_their_ids(
    client: stepwire.Client, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Beside a table of indices, in small messages, over several servers too; and some rows at a time."""
    monkeypatch.setattr(partition, "GRAIN", WIDTH)
    monkeypatch.setattr(partition, "SMALLEST_IN_BLOCKS", 1)
    tables = hashed(2000) | {"plain": Table((7, 2), uniform_bound=0.5, seed=3)}
    ids = np.random.default_rng(2).integers(0, 2**63, 900)
    gradient = {"t": Rows(ids, np.ones((900, WIDTH), np.float32)), "plain": Rows([3], np.ones((1, 2), np.float32))}
    with (
        stepwire.connect([client.target] * shards) as several,
        several.create_session(tables, optimizer=ADAM) as session,
    ):
        assert len(session.shards) == shards
        assert session.row_ids("t").tolist() == []
        empty: Any = session.pull()
        assert (len(empty["t"].indices), empty["t"].values.shape) == (0, (0, WIDTH))
        assert empty["plain"].shape == (7, 2)
        reply: Any = session.step(gradient)
        assert session.row_ids("t").tolist() == sorted(ids.tolist())
        whole: Any = session.pull()
        assert whole["t"].indices.tolist() == sorted(ids.tolist())
        assert whole["t"].values.tobytes() == reply["t"].values.tobytes()
        assert whole["plain"][3].tolist() == reply["plain"].values[0].tolist()
        parts: list[Any] = [session.pull(rows={"t": each})["t"] for each in np.array_split(session.row_ids("t"), 7)]
        assert np.concatenate([each.values for each in parts]).tobytes() == reply["t"].values.tobytes()
        with pytest.raises(stepwire.InvalidRequestError, match=r"'plain' has no ids; tables that have: \['t'\]"):
            session.row_ids("plain")


def test_a_step_between_ids_and_rows_begins_the_pull_again(
    client: stepwire.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client.create_session(hashed(), optimizer=ADAM) as session:
        session.step({"t": Rows([8], np.ones((1, WIDTH), np.float32))})
        read, moments = table_rows.read_rows, []

        def reading(*arguments: Any) -> Any:
            moments.append(session.applied_step)
            if len(moments) == 1:
                session.step({"t": Rows([5, 8], np.ones((2, WIDTH), np.float32))})
            return read(*arguments)

        monkeypatch.setattr(table_rows, "read_rows", reading)
        whole: Any = session.pull()
        assert moments == [1, 2] and whole["t"].indices.tolist() == [5, 8]


def test_what_needs_a_whole_table_is_refused(client: stepwire.Client) -> None:
    with client.create_session(hashed(), optimizer=ADAM) as session:
        with pytest.raises(stepwire.UnsupportedFeatureError, match="named by ids, and whole slots name none"):
            session.state()
        with pytest.raises(stepwire.UnsupportedFeatureError, match="named by ids, and whole slots name none"):
            session.load({"t": np.zeros((16, WIDTH), np.float32)})
        for ids in ([-1], [2**63]):
            with pytest.raises(stepwire.InvalidRequestError, match=r"is not in \[0, 9223372036854775808\)"):
                session.pull(rows={"t": np.array(ids, np.int64 if ids[0] < 0 else np.uint64)})
    refused: list[tuple[dict[str, Table], str]] = [
        (hashed(semantics="global"), "'global' steps rows that never came too"),
        (hashed(max_age_steps=-1), "-1 is negative"),
        ({"t": Table((4, WIDTH), max_age_steps=2)}, "rows give way in a table with ids alone"),
        ({"t": Table((1 << 31, 1), hashed=True)}, "a table with ids has at most 1073741824"),
    ]
    for tables, words in refused:
        with pytest.raises(stepwire.StepwireError, match=words):
            client.create_session(tables, optimizer=ADAM)
