"""Chunks of a reply leave in order, each when it is complete, and none after an error."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire_server.steps.reply import ReplyPipeline, split_range


class Work:
    """Something pending that writes down when it is waited for."""

    def __init__(self, log: list[str], name: str, error: BaseException | None = None) -> None:
        self._log, self._name, self._error = log, name, error

    def wait(self) -> None:
        self._log.append(self._name)
        if self._error is not None:
            raise self._error


class LoggingWriter:
    """Notes the chunks that are complete."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.flushed = 0

    def buffer(self, offset: int, count: int) -> np.ndarray:
        return np.empty(count, np.float32)

    def flush(self) -> None:
        self._log.append(f"chunk {self.flushed}")
        self.flushed += 1


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def writer(log) -> LoggingWriter:
    return LoggingWriter(log)


def test_with_a_depth_of_one_each_chunk_is_done_before_the_next_is_asked_for(log, writer) -> None:
    with ReplyPipeline(writer, 1) as reply:
        for name in "abc":
            log.append(f"ask {name}")
            reply.add([Work(log, name)])
    assert log == ["ask a", "a", "chunk 0", "ask b", "b", "chunk 1", "ask c", "c", "chunk 2"]


def test_with_a_depth_of_three_two_are_under_way_while_the_next_is_asked_for(log, writer) -> None:
    with ReplyPipeline(writer, 3) as reply:
        for name in "abcd":
            log.append(f"ask {name}")
            reply.add([Work(log, name)])
        log.append("end")
    asked = ["ask a", "ask b", "ask c", "a", "chunk 0", "ask d", "b", "chunk 1"]
    assert log == [*asked, "end", "c", "chunk 2", "d", "chunk 3"]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_chunk_is_complete_when_all_its_work_is(log, writer, depth) -> None:
    with ReplyPipeline(writer, depth) as reply:
        reply.add([Work(log, "a0"), Work(log, "a1")])
        reply.add([])
        reply.add([Work(log, "c")])
    assert log == ["a0", "a1", "chunk 0", "chunk 1", "c", "chunk 2"]


def test_a_reply_without_chunks_flushes_nothing(log, writer) -> None:
    with ReplyPipeline(writer, 3):
        pass
    assert log == []


@pytest.mark.parametrize(("depth", "before"), [(2, ["a", "b", "chunk 0"]), (3, []), (9, [])])
def test_after_an_error_all_is_waited_for_and_nothing_is_flushed(log, writer, depth, before) -> None:
    with pytest.raises(KeyError, match="the caller's"), ReplyPipeline(writer, depth) as reply:
        reply.add([Work(log, "a"), Work(log, "b")])
        reply.add([Work(log, "c", ValueError("its own")), Work(log, "d")] if depth > 2 else [])
        assert log == before
        raise KeyError("the caller's")
    assert log == before if depth == 2 else ["a", "b", "c", "d"]
    assert writer.flushed == len(before) // 3


@pytest.mark.parametrize("more", [0, 1])
def test_an_error_of_a_chunk_is_that_of_the_reply_and_the_rest_is_waited_for(log, writer, more) -> None:
    """The error comes out while chunks are added or at the end; the work behind the failed one is waited for too."""
    problem = ValueError("first")
    with pytest.raises(ValueError) as caught, ReplyPipeline(writer, 4) as reply:
        reply.add([Work(log, "a")])
        reply.add([Work(log, "b"), Work(log, "c", problem), Work(log, "d", ValueError("second"))])
        reply.add([Work(log, "e", ValueError("third")), Work(log, "f")])
        for _ in range(2 * more):
            reply.add([Work(log, "g")])
    assert caught.value is problem
    assert log == ["a", "chunk 0", "b", "c", *"bcdef", *"g" * 2 * more]
    assert writer.flushed == 1


def test_the_chunks_of_a_range_cover_it_once() -> None:
    assert split_range(3, 10, 3) == [(3, 6), (6, 9), (9, 10)]
    assert split_range(4, 10, 3) == [(4, 6), (6, 9), (9, 10)]
    assert split_range(4, 5, 3) == [(4, 5)]
    assert split_range(3, 3, 3) == []
