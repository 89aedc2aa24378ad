"""Loads of some rows of tables: by indices and by ids, on disk, over shards, full tables, repeated loads."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows, Table
from stepwire.sharding import partition
from tests.support.numpy_server import numpy_server

WIDTH = 4
ADAM = stepwire.Adam(lr=0.1)
IDS = np.array([2**63 - 1, 5, 77, 2**40], np.uint64)


def values(rows: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def tables(meaning: str = "row_counter", **more: Any) -> dict[str, Table]:
    return {
        "ids": Table((12, WIDTH), meaning, 0.5, 7, hashed=True, **more),
        "plain": Table((9, WIDTH), meaning, 0.5, 7),
    }


@pytest.mark.parametrize("meaning", ["torch_sparse", "row_counter", "skipped"])
def test_loaded_rows_are_stepped_as_rows_that_had_these_values(client: stepwire.Client, meaning: str) -> None:
    """Moments and t stay, those of a new id are the first ones; all other rows stay as they are."""
    start = values(4, 1)
    with (
        client.create_session(tables(meaning), optimizer=ADAM) as session,
        client.create_session({"t": start}, optimizer=ADAM, tables={"t": meaning}) as other,
    ):
        session.load_rows({"ids": Rows(IDS[[0, 1, 2]], start[[0, 1, 2]]), "plain": Rows([8, 3], start[:2])})
        assert session.applied_step == 0 and session.row_ids("ids").tolist() == sorted(IDS[:3].tolist())
        pulled: Any = session.pull(rows={"ids": IDS[:3], "plain": [3, 8, 1]})
        assert pulled["ids"].values.tolist() == start[:3].tolist()
        assert pulled["plain"].values[:2].tolist() == start[[1, 0]].tolist()
        for turn in range(3):
            chosen, gradient = [[0, 1], [1], [2, 1]][turn], values(2, turn)
            own: Any = session.step({"ids": Rows(IDS[chosen], gradient[: len(chosen)]), "plain": Rows([], values(0))})[
                "ids"
            ]
            its: Any = other.step({"t": Rows(chosen, gradient[: len(chosen)])})["t"]
            order = np.argsort(IDS[chosen])
            places = [its.indices.tolist().index(chosen[each]) for each in order]
            assert own.values.tolist() == its.values[places].tolist()
            if turn == 1:
                session.load_rows({"ids": Rows(IDS[[1]], start[[3]])})
                whole: Any = other.pull()
                whole["t"][1] = start[3]
                other.load(whole)


def test_a_row_in_the_place_of_an_evicted_one_has_first_numbers(client: stepwire.Client) -> None:
    """Its own first values too, where a load brings it, and t and moments of a new row."""
    table = {"t": Table((2, WIDTH), "row_counter", 0.5, 7, hashed=True, max_age_steps=1)}
    ones, start = np.ones((1, WIDTH), np.float32), values(1)
    with (
        client.create_session(table, optimizer=ADAM) as session,
        client.create_session({"t": start}, optimizer=ADAM, tables={"t": "row_counter"}) as fresh,
    ):
        for ids in ([1], [1], [2], [2], [2]):
            session.step({"t": Rows(ids, ones)})
        session.load_rows({"t": Rows([3], start)})
        assert session.row_ids("t").tolist() == [2, 3] and session.info().tables[0].evicted_rows == 1
        own, its = session.step({"t": Rows([3], ones)}), fresh.step({"t": Rows([0], ones)})
        assert own["t"].values.tolist() == its["t"].values.tolist()


def test_rows_without_room_and_wrong_rows_are_refused_and_change_nothing(client: stepwire.Client) -> None:
    with client.create_session(tables(), optimizer=ADAM) as session:
        session.load_rows({"ids": Rows(IDS, values(4))})
        before: Any = session.pull()
        wrong: list[tuple[Any, str]] = [
            ({"ids": Rows(np.arange(10), values(10))}, "4 of 12 rows, and 9 ids are new"),
            ({"ids": Rows([5, 5], values(2))}, "a row comes twice"),
            ({"plain": Rows([9], values(1))}, r"row 9 is not in \[0, 9\)"),
            ({"plain": Rows([1], values(2))}, "shape"),
            ({"plain": values(9)}, "pass stepwire.Rows"),
            ({"none": Rows([1], values(1))}, "'none' is no table of this session"),
        ]
        for rows, words in wrong:
            with pytest.raises(stepwire.StepwireError, match=words):
                session.load_rows(rows)
        after: Any = session.pull()
        assert after["ids"].indices.tolist() == before["ids"].indices.tolist()
        assert [after[name].tobytes() for name in ("plain",)] == [before["plain"].tobytes()]
        session.load_rows({"ids": Rows(np.arange(9), values(9))})
        assert session.info().tables[0].rows == 12


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
def test_loaded_rows_survive_a_restart(tmp_path: pathlib.Path, durability: Any) -> None:
    """In many messages, between steps, and beside the rows that give way to them."""
    many, made = np.random.default_rng(1).integers(0, 2**63, 2000), {"t": Table((2500, 40), "skipped", hashed=True)}
    rows = Rows(many, np.random.default_rng(2).standard_normal((2000, 40)).astype(np.float32))
    step = {"t": Rows(many[:300], np.ones((300, 40), np.float32))}
    folder = tmp_path / "data"
    with numpy_server(data_dir=str(folder), max_chunk_bytes=64 << 10) as server:
        with stepwire.connect(server.target) as client:
            session = client.create_session(made, optimizer=ADAM, durability=durability)
            session.step(step)
            session.load_rows({"t": rows})
            if durability == "journal":
                session.step(step)
            wanted: Any = session.pull()
            shutil.copytree(folder, tmp_path / "image")
    with numpy_server(data_dir=str(tmp_path / "image")) as server, stepwire.connect(server.target) as client:
        again = client.session(session.own_id)
        again.attach(take_over=True)
        found: Any = again.pull()
        assert found["t"].indices.tolist() == wanted["t"].indices.tolist()
        assert found["t"].values.tobytes() == wanted["t"].values.tobytes()


def test_shards_load_the_rows_that_they_have(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also shards with none of them, and one with a dense tensor alone."""
    monkeypatch.setattr(partition, "GRAIN", WIDTH)
    monkeypatch.setattr(partition, "SMALLEST_IN_BLOCKS", 1)
    start: dict[str, Any] = {"w": np.ones(40, np.float32), "t": values(20)}
    with stepwire.connect([client.target] * 3) as several:
        with several.create_session(start, optimizer=ADAM, tables={"t": "skipped"}) as session:
            held = [sorted(name.split("[")[0] for name in shard.shapes) for shard in session.shards]
            assert ["w"] in held or ["t"] in held
            session.load_rows({"t": Rows([19, 0], values(2, 5))})
            session.load_rows({"t": Rows([7], values(1, 6))})
            found: Any = session.pull()
            expected = start["t"].copy()
            expected[[19, 0]], expected[7] = values(2, 5), values(1, 6)[0]
            assert found["t"].tobytes() == expected.tobytes() and found["w"].tolist() == [1.0] * 40
            session.step({"w": np.ones(40, np.float32), "t": Rows([3], values(1))})
        with several.create_session(tables(), optimizer=ADAM) as session:
            session.load_rows({"ids": Rows(IDS, values(4)), "plain": Rows([8], values(1))})
            pulled: Any = session.pull(rows={"ids": IDS})
            assert pulled["ids"].values.tolist() == values(4).tolist()


def test_a_load_of_rows_ends_an_open_round_and_is_seen_by_all_workers(client: stepwire.Client) -> None:
    way = {"aggregation": stepwire.Aggregation(workers=2), "request_id": "row-loads"}
    with stepwire.connect(client.target) as other:
        sessions = [
            each.create_session(tables(), optimizer=ADAM, worker=at, **way) for at, each in enumerate((client, other))
        ]
        sessions[0].load_rows({"ids": Rows(IDS, values(4))})
        pulled: Any = sessions[1].pull(rows={"ids": IDS})
        assert pulled["ids"].values.tolist() == values(4).tolist()
        sessions[0].close()


def test_a_session_without_parameters_takes_no_rows(client: stepwire.Client) -> None:
    """The refusal of a client of its own: this one loads at the creation."""
    with client.create_session({"t": values(3)}, tables={"t": "skipped"}) as session:
        session.load_rows({"t": Rows([1], np.zeros((1, WIDTH), np.float32))})
        session.load_rows({})
        whole: Any = session.pull()
        assert whole["t"][1].tolist() == [0.0] * WIDTH and session.info().applied_step == 0
