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

from stepwire.v1 import optimizer_pb2, step_pb2, tensor_pb2
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


@pytest.fixture
def table(numpy_server_here: Server, connect: Any, make_config: Any, make_live: Any) -> Iterator[Any]:
    config = make_config((6, 2), (3,))
    config.tensors[0].table.semantics = tensor_pb2.ROW_SEMANTICS_TORCH_SPARSE
    config.optimizer.rule = optimizer_pb2.RULE_SGD
    config.optimizer.hyperparameters.lr = 1.0
    with connect(numpy_server_here.target) as wire:
        yield make_live(wire, wire.create(config))


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


TWO = begin((1, 2))
WRONG: dict[str, tuple[list[pb.AttachRequest], str, str]] = {
    "a row beyond the table": ([TWO, rows(0, 6)], "chunk.rows", "row 6 is not below 6"),
    "a row beyond 64 bits' half": ([TWO, rows(0, 2**64 - 1)], "chunk.rows", "is not below 6"),
    "fewer than declared": ([TWO, DENSE, rows(1), COMMIT], "begin.tables", "1 rows of table 't0' came"),
    "none of those declared": ([TWO, DENSE, COMMIT], "begin.tables", "0 rows of table 't0' came"),
    "more than declared": ([TWO, rows(1, 2), rows(3)], "chunk.rows", "3 rows, and `begin.tables` says 2"),
    "rows of the dense tensor": ([TWO, rows(0, 1, offset=0)], "chunk.offset", "0 is not the offset of a table"),
    "rows from the middle": ([TWO, rows(0, 1, offset=258)], "chunk.offset", "258 is not the offset of a table"),
    "a count of half a row": ([TWO, rows(0, 1, count=3)], "chunk.rows", "2 rows of 2 elements, and `count` is 3"),
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
    refusal(lambda: table.attach(*messages), "INVALID_ARGUMENT", "INVALID_TENSOR", text, field=field)
    assert (table.fingerprint(), table.wire.reserved_bytes()) == (before, reserved)


def test_more_rows_than_there_is_room_for_are_refused_before_they_come(table: Any, refusal: Any) -> None:
    before, told = table.fingerprint(), []
    for entries in (10_000_000, 10_070):  # beyond the whole budget, and beyond what the state leaves of it
        text = "the session's state with this step needs"
        attach = functools.partial(table.attach, begin((1, entries)))
        told.append(refusal(attach, "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", text).retry_after)
    assert (table.fingerprint(), told) == (before, [None, None]), "waiting does not help"


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


def test_rows_are_added_up_in_the_thread_of_their_own_stream(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the threads of commits, which are few and everybody's, nor under the lock of the session."""
    threads: list[str] = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return summed_rows(*arguments)

    monkeypatch.setattr(row_gradients, "summed_rows", noted)
    table.attach(begin((1, 2)), DENSE, rows(1, 5), COMMIT)
    assert threads == ["call"]


def test_a_pull_of_rows_has_them_in_the_order_of_the_request(table: Any) -> None:
    table.attach(begin((1, 2)), DENSE, rows(1, 5), COMMIT)
    asked = [tensor_pb2.TableRows(tensor=1, rows=[5, 0, 5])]
    request = pb.PullRequest(session_id=table.id, rows=asked)
    header, chunk = map(pb.PullResponse.FromString, table.wire.stream("Pull", [request]))
    assert (header.header.step, list(chunk.chunk.rows), chunk.slot) == (1, [5, 0, 5], "param")
    assert np.frombuffer(chunk.payload, np.float32).tolist() == [-3, -4, 0, 0, -3, -4]
