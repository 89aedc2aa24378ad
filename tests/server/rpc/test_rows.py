"""Hostile rows, replays and pulls of rows, from a client of generated code alone.

The session has a dense tensor of 3 elements at [0, 3), and a table of 6 rows of 2 elements at [256, 268).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.v1 import aggregation_pb2, optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from stepwire_server.steps import row_gradients
from stepwire_server.steps.summed_rows import summed_rows
from tests.support.numpy_server import numpy_server

WHOLE_TABLE = pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=256, count=12), payload=bytes(48))
COMMIT = pb.AttachRequest(commit=step_pb2.StepCommit())
DENSE = pb.AttachRequest(chunk=tensor_pb2.Chunk(count=3), payload=np.ones(3, np.float32).tobytes())


@pytest.fixture(scope="module")
def numpy_server_here() -> Iterator[Server]:
    with numpy_server(memory_budget=1 << 20) as server:
        yield server


@pytest.fixture(params=["tcp", "unix"])
def wire(request: pytest.FixtureRequest, numpy_server_here: Server, connect: Any) -> Iterator[Any]:
    """Connect over each of the ways that rows have: those in memory of the host are refused."""
    server = numpy_server_here
    with connect(server.target if request.param == "tcp" else f"unix:{server.unix_socket}") as wire:
        yield wire


@pytest.fixture
def make_table(wire: Any, make_config: Any, make_live: Any) -> Any:
    """Make sessions with a table; with a number of workers those of rounds."""

    def make(workers: int = 0) -> Any:
        config = make_config((6, 2), (3,))
        config.tensors[0].table.semantics = tensor_pb2.ROW_SEMANTICS_TORCH_SPARSE
        config.optimizer.rule = optimizer_pb2.RULE_SGD
        config.optimizer.hyperparameters.lr = 1.0
        if workers:
            config.aggregation.mode = aggregation_pb2.AGGREGATION_MODE_SYNC
            config.aggregation.workers = workers
        return make_live(wire, wire.create(config))

    return make


@pytest.fixture
def make_ids(wire: Any, make_config: Any, make_live: Any) -> Any:
    """Make sessions with a table of 6 rows of 2 elements whose rows are named by ids, at [0, 12)."""

    def make() -> Any:
        config = make_config((6, 2))
        config.tensors[0].table.semantics = tensor_pb2.ROW_SEMANTICS_TORCH_SPARSE
        config.tensors[0].table.hashed = True
        config.initialization = session_pb2.INITIALIZATION_ZEROS
        config.optimizer.rule = optimizer_pb2.RULE_SGD
        config.optimizer.hyperparameters.lr = 1.0
        return make_live(wire, wire.create(config))

    return make


@pytest.fixture
def table(make_table: Any) -> Any:
    return make_table()


def begin(*tables: tuple[int, int], step: int = 1, **fields: Any) -> pb.AttachRequest:
    entries = [tensor_pb2.TableEntries(tensor=tensor, entries=count) for tensor, count in tables]
    return pb.AttachRequest(begin=step_pb2.StepBegin(step=step, tables=entries, **fields))


def rows(*indices: int, offset: int = 256, count: int | None = None, payload: bytes | None = None) -> pb.AttachRequest:
    elements = 2 * len(indices)
    values = np.arange(1, elements + 1, dtype=np.float32)
    return pb.AttachRequest(
        chunk=tensor_pb2.Chunk(offset=offset, count=elements if count is None else count, rows=indices),
        payload=values.tobytes() if payload is None else payload,
    )


def loaded(*indices: int, offset: int = 256, count: int | None = None) -> pb.LoadRequest:
    chunk = rows(*indices, offset=offset, count=count)
    return pb.LoadRequest(slot="param", chunk=chunk.chunk, payload=chunk.payload)


TWO = begin((1, 2))
DENSE_ROWS = tensor_pb2.TableEntries(tensor=0, entries=2)
FIFTH = rows(2**63 - 1, offset=0, payload=np.array([5, 6], np.float32).tobytes())
WRONG: dict[str, tuple[list[pb.AttachRequest], str, str]] = {
    "a row beyond the table": ([TWO, rows(0, 6)], "chunk.rows", "row 6 is not below 6"),
    "a row beyond 64 bits' half": ([TWO, rows(0, 2**64 - 1)], "chunk.rows", "is not below 6"),
    "fewer than declared": ([TWO, DENSE, rows(1), COMMIT], "begin.tables", "1 rows of table 't0' came"),
    "none of those declared": ([TWO, DENSE, COMMIT], "begin.tables", "0 rows of table 't0' came"),
    "more than declared": ([TWO, rows(1, 2), rows(3)], "chunk.rows", "3 rows, and `begin.tables` says 2"),
    "rows of the dense tensor": ([TWO, rows(0, 1, offset=0)], "chunk.offset", "0 is not the offset of a table"),
    "rows from the middle": ([TWO, rows(0, 1, offset=258)], "chunk.offset", "258 is not the offset of a table"),
    "a count of half a row": ([TWO, rows(0, 1, count=3)], "chunk.rows", "2 rows of 2 elements, and `count` is 3"),
    "two rows of too many bytes": ([TWO, rows(0, 1, payload=bytes(4_194_305))], "payload", "holds at most 4194304"),
    "a chunk without a row": ([TWO, rows()], "chunk", "is not a non-empty part of [0, 256)"),
    "a payload of half a row": ([TWO, rows(0, 1, payload=b"1234" * 3)], "chunk.count", "the payload has 12 bytes"),
    "a table that is not named": ([begin(), DENSE, COMMIT], "begin.tables", "table 't0' is not named"),
    "rows of a table that is not named": ([begin(), rows(0)], "chunk.offset", "not the offset of a table"),
    "a dense chunk of the table": ([TWO, WHOLE_TABLE], "chunk", "is not a non-empty part of [0, 256)"),
    "entries of a dense tensor": ([begin((0, 2))], "begin.tables[0].tensor", "tensor 0 is no table"),
    "entries of no tensor": ([begin((7, 2))], "begin.tables[0].tensor", "tensor 7 is no table"),
    "entries twice": ([begin((1, 2), (1, 2))], "begin.tables[1].tensor", "they rise"),
    "entries beyond all numbers": ([begin((1, 2**63))], "begin.tables[0].entries", "a step has at most"),
}


@pytest.mark.parametrize("what", WRONG)
def test_hostile_rows_are_refused_and_change_nothing(table: Any, refusal: Any, what: str) -> None:
    messages, field, text = WRONG[what]
    before, reserved = table.fingerprint(), table.wire.reserved_bytes()
    reason = "INVALID_FRAME" if field == "payload" else "INVALID_TENSOR"
    refusal(lambda: table.attach(*messages), "INVALID_ARGUMENT", reason, text, field=field)
    assert (table.fingerprint(), table.wire.reserved_bytes()) == (before, reserved)


def test_more_rows_than_there_is_room_for_are_refused_before_they_come(table: Any, refusal: Any) -> None:
    before, told = table.fingerprint(), []
    for entries in (10_000_000, 10_070):  # beyond the whole budget, and beyond what the state leaves of it
        text = "the session's state with this step needs"
        attach = functools.partial(table.attach, begin((1, entries)))
        told.append(refusal(attach, "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", text).retry_after)
    assert (table.fingerprint(), told) == (before, [None, None]), "waiting does not help"


IDS: dict[str, tuple[list[pb.AttachRequest], str, str]] = {
    "an id beyond all ids": ([begin((0, 1)), rows(2**63, offset=0)], "chunk.rows", f"row {2**63} is not below {2**63}"),
    "more ids than declared": (
        [begin((0, 1)), rows(5, 6, offset=0)],
        "chunk.rows",
        "2 rows, and `begin.tables` says 1",
    ),
    "fewer ids than declared": ([begin((0, 3)), rows(5, 5, offset=0), COMMIT], "begin.tables", "2 rows of table 't0'"),
    "a dense chunk": (
        [begin((0, 1)), pb.AttachRequest(chunk=tensor_pb2.Chunk(count=12), payload=bytes(48))],
        "chunk",
        "",
    ),
}


@pytest.mark.parametrize("what", IDS)
def test_hostile_ids_are_refused_and_make_no_row(make_ids: Any, refusal: Any, what: str) -> None:
    table, (messages, field, text) = make_ids(), IDS[what]
    before, reserved = table.wire.get(table.id).tables[0].rows, table.wire.reserved_bytes()
    refusal(lambda: table.attach(*messages), "INVALID_ARGUMENT", "INVALID_TENSOR", text, field=field)
    assert (table.wire.get(table.id).tables[0].rows, table.wire.reserved_bytes()) == (before, reserved) == (0, reserved)


def test_pulls_of_ids_come_alone_and_of_tables_that_have_some(make_ids: Any, table: Any, refusal: Any) -> None:
    made = make_ids()
    made.attach(begin((0, 3)), rows(2**63 - 1, 0, offset=0), FIFTH, COMMIT)
    header, chunk = map(
        pb.PullResponse.FromString, made.wire.stream("Pull", [pb.PullRequest(session_id=made.id, row_ids=[0, 0])])
    )
    assert (header.header.step, chunk.chunk.count, chunk.chunk.offset) == (1, 2, 0)
    assert np.frombuffer(chunk.payload, "<u8").tolist() == [0, 2**63 - 1]
    for session, index in ((made.id, 1), (table.id, 0), (table.id, 1)):
        pull = functools.partial(made.wire.pull, session, row_ids=[index])
        refusal(pull, "INVALID_ARGUMENT", "INVALID_TENSOR", f"tensor {index} is no table", field="row_ids[0]")
    both = functools.partial(made.wire.pull, made.id, row_ids=[0], rows=[tensor_pb2.TableRows(tensor=0, rows=[5])])
    refusal(both, "INVALID_ARGUMENT", "INVALID_CONFIG", "ids come alone", field="row_ids")


LOADS: dict[str, tuple[dict[str, Any], list[pb.LoadRequest], str, str]] = {
    "a row twice": ({}, [loaded(1, 1)], "chunk.rows", "row 1 comes twice"),
    "a row beyond": ({}, [loaded(1, 6)], "chunk.rows", "row 6 is not below 6"),
    "fewer rows": ({}, [loaded(1)], "open.tables", "1 rows of table 't0' came, and `open.tables` says 2"),
    "more rows": ({}, [loaded(1, 2), loaded(3)], "chunk.rows", "3 rows, and `open.tables` says 2"),
    "half a row": ({}, [loaded(1, 2, count=3)], "chunk.rows", "2 rows of 2 elements, and `count` is 3"),
    "another tensor": ({}, [loaded(1, 2, offset=0)], "chunk.offset", "0 is not the offset of a table"),
    "a whole chunk": ({}, [pb.LoadRequest(chunk=DENSE.chunk, payload=DENSE.payload)], "chunk", "name no rows"),
    "no table": ({"tables": [DENSE_ROWS]}, [], "open.tables[0].tensor", "is no table"),
}


@pytest.mark.parametrize("what", LOADS)
def test_hostile_loads_of_rows_are_refused_and_change_nothing(table: Any, refusal: Any, what: str) -> None:
    fields, chunks, field, text = LOADS[what]
    before, reserved = table.fingerprint(), table.wire.reserved_bytes()
    entries = fields.get("tables", [tensor_pb2.TableEntries(tensor=1, entries=2)])
    messages = [table.load_opening(1, by_rows=True, tables=entries), *chunks, pb.LoadRequest(commit=True)]
    refusal(lambda: table.load(*messages), "INVALID_ARGUMENT", "INVALID_TENSOR", text, field=field)
    assert (table.fingerprint(), table.wire.reserved_bytes()) == (before, reserved)


@pytest.mark.parametrize(
    ("slots", "fields", "field"),
    [
        (("exp_avg",), {"by_rows": True}, "open.slots"),
        (("param",), {"by_rows": True, "tensor_steps": [1, 1]}, "open.slots"),
        (("param",), {"tables": [tensor_pb2.TableEntries(tensor=1, entries=2)]}, "open.tables"),
    ],
)
def test_loads_of_rows_bring_parameters_alone(
    table: Any, refusal: Any, make_config: Any, make_live: Any, slots: Any, fields: dict[str, Any], field: str
) -> None:
    config = make_config((6, 2), (3,))
    config.tensors[0].table.semantics = tensor_pb2.ROW_SEMANTICS_TORCH_SPARSE
    adam = make_live(table.wire, table.wire.create(config))
    load = functools.partial(adam.load, adam.load_opening(1, *slots, **fields))
    refusal(load, "INVALID_ARGUMENT", "INVALID_CONFIG", field, field=field)
    assert adam.load(adam.load_opening(1, by_rows=True), pb.LoadRequest(commit=True)).session.applied_load == 1


def test_ids_come_unsorted_and_often(make_ids: Any) -> None:
    """Learning rate 1: the largest id gets −(1 + 5), −(2 + 6), id 0 gets −3, −4."""
    table = make_ids()
    *_, reply, result = table.attach(begin((0, 3)), rows(2**63 - 1, 0, offset=0), FIFTH, COMMIT)
    assert list(reply.chunk.rows) == [0, 2**63 - 1] and result.result.step == 1
    assert np.frombuffer(reply.payload, np.float32).tolist() == [-3.0, -4.0, -6.0, -8.0]
    assert table.wire.get(table.id).tables[0].rows == 2


@pytest.mark.parametrize(
    "option", [{"overlap": True}, {"reply": step_pb2.ReplyOptions(first=[0])}, {"in_shared_memory": True}]
)
def test_options_that_tables_exclude_are_refused(table: Any, refusal: Any, option: dict[str, Any]) -> None:
    refusal(lambda: table.attach(begin((1, 2), **option)), "FAILED_PRECONDITION", "UNSUPPORTED_FEATURE", "tables")


def test_a_unary_step_and_a_pull_of_other_rows_are_refused(table: Any, refusal: Any) -> None:
    unary = table.unary_step(1, payload=bytes(12))
    refusal(lambda: table.wire.unary("Step", unary), "INVALID_ARGUMENT", "INVALID_FRAME", "attach a stream")
    asked = [tensor_pb2.TableRows(tensor=1, rows=[2, 6])]
    refusal(
        lambda: table.wire.pull(table.id, rows=asked),
        "INVALID_ARGUMENT",
        "INVALID_TENSOR",
        "row 6",
        field="rows[0].rows",
    )


def test_a_step_of_unsorted_rows_in_pieces_is_replied_to_once_a_row_and_a_replay_likewise(table: Any) -> None:
    """Learning rate 1: row 4 gets −(1 + 5), −(2 + 6), row 0 gets −1, −2 of the second message."""
    messages = [begin((1, 4)), rows(4, 2), DENSE, rows(0, 4), COMMIT]
    *_, first, result = table.attach(*messages)
    assert (list(first.chunk.rows), first.chunk.offset, first.chunk.count) == ([0, 2, 4], 256, 6)
    want = [[-1.0, -2.0], [-3.0, -4.0], [-4.0, -6.0]]
    assert np.frombuffer(first.payload, np.float32).reshape(3, 2).tolist() == want
    before = table.fingerprint()
    *_, again, replayed = table.attach(*messages)
    assert replayed.result.replayed and not result.result.replayed
    assert again == first and table.fingerprint() == before
    alone = table.attach(pb.AttachRequest(begin=messages[0].begin, commit=COMMIT.commit))
    assert alone[-1].result.replayed and not any(reply.chunk.rows for reply in alone)  # none are named
    none = table.attach(begin((1, 1), step=2, reply=step_pb2.ReplyOptions(omit_rows=True)), DENSE, rows(5), COMMIT)
    assert none[-1].HasField("result") and not any(reply.chunk.rows for reply in none)


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_added_up_in_the_thread_of_their_own_stream(
    make_table: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Not in the threads of commits, which are few and everybody's, nor under the lock of the session.

    Those of a replay are not added up.
    """
    table = make_table(workers)
    threads: list[str] = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return summed_rows(*arguments)

    monkeypatch.setattr(row_gradients, "summed_rows", noted)
    table.attach(begin((1, 2)), DENSE, rows(1, 5), COMMIT)
    assert threads[0] == "call"
    threads.clear()
    table.attach(begin((1, 2)), DENSE, rows(1, 5), COMMIT)
    assert threads == []


def test_a_pull_of_rows_has_them_in_the_order_of_the_request(table: Any) -> None:
    table.attach(begin((1, 2)), DENSE, rows(1, 5), COMMIT)
    asked = [tensor_pb2.TableRows(tensor=1, rows=[5, 0, 5])]
    request = pb.PullRequest(session_id=table.id, rows=asked)
    header, chunk = map(pb.PullResponse.FromString, table.wire.stream("Pull", [request]))
    assert (header.header.step, list(chunk.chunk.rows), chunk.slot) == (1, [5, 0, 5], "param")
    assert np.frombuffer(chunk.payload, np.float32).tolist() == [-3, -4, 0, 0, -3, -4]
