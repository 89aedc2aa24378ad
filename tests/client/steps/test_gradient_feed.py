"""Gradients that are made while they are sent: the order of chunks, the end, and giving up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.arrays.packing import Packer
from stepwire.layout import TensorSpec, place
from stepwire.steps.gradient_feed import GivenUp, GradientFeed

NAMES = ("a", "b", "c")
PATIENCE_SECONDS = 120.0


@pytest.fixture
def packer() -> Packer:
    """Three tensors of 4, 6 and 2 elements, one after another."""
    return Packer(place([TensorSpec(name, (count,)) for name, count in zip(NAMES, (4, 6, 2), strict=True)], 1))


def values(start: int, count: int) -> Any:
    return np.arange(start, start + count, dtype=np.float32)


def empty(packer: Packer) -> list[Any]:
    return [np.full(tensor.count, np.nan, np.float32) for tensor in packer.layout.tensors]


def test_chunks_come_as_soon_as_all_that_lies_in_them_is_there(packer: Packer) -> None:
    feed, flat = GradientFeed(NAMES), empty(packer)
    chunks = feed.chunks(packer.chunks(4), flat)  # [0, 4) of a; [4, 8) of b; [8, 12) of b and c
    feed.give("c", values(10, 2))
    feed.give("b", values(4, 6))
    assert [next(chunks).offset, next(chunks).offset] == [4, 8]
    feed.give("a", values(0, 4))
    assert [chunk.offset for chunk in chunks] == [0]
    assert np.concatenate(flat).tolist() == list(range(12))


def test_a_chunk_waits_for_the_last_of_its_tensors(packer: Packer) -> None:
    feed = GradientFeed(NAMES)
    for name in ("a", "b"):
        feed.give(name, values(0, 1))
    with ThreadPoolExecutor(1) as thread:
        whole = thread.submit(lambda: [chunk.offset for chunk in feed.chunks(packer.chunks(12), empty(packer))])
        feed.give("c", values(0, 2))
        assert whole.result(PATIENCE_SECONDS) == [0]


def test_tensors_without_a_gradient_are_not_waited_for(packer: Packer) -> None:
    feed, flat = GradientFeed(NAMES), empty(packer)
    flat[1] = flat[1][:0]
    feed.give("c", values(0, 2))
    assert next(feed.chunks(packer.chunks(4)[2:], flat)).offset == 8


def test_a_device_is_waited_for_before_its_gradient_is_read(packer: Packer) -> None:
    feed, flat, seen = GradientFeed(NAMES), empty(packer), []
    gradient = np.zeros((2, 1), np.float32)

    def arrive() -> None:
        seen.append("waited")
        gradient[:] = 7.0

    feed.give("c", gradient, arrive)
    flat[1] = flat[1][:0]
    next(feed.chunks(packer.chunks(4)[2:], flat))
    assert (seen, flat[2].tolist()) == (["waited"], [7.0, 7.0])


def test_the_end_waits_for_the_commit() -> None:
    feed = GradientFeed(NAMES)
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(feed.committed)
        feed.commit()
        assert ended.result(PATIENCE_SECONDS) is True


def test_giving_up_ends_what_waits_and_the_exchange(packer: Packer) -> None:
    feed, cancelled = GradientFeed(NAMES), threading.Event()
    feed.bind(cancelled.set)
    with ThreadPoolExecutor(2) as threads:
        chunks = threads.submit(lambda: list(feed.chunks(packer.chunks(4), empty(packer))))
        ended = threads.submit(feed.committed)
        feed.abort()
        assert (chunks.result(PATIENCE_SECONDS), ended.result(PATIENCE_SECONDS)) == ([], False)
    assert cancelled.wait(PATIENCE_SECONDS)  # another thread cancels
    with pytest.raises(GivenUp):
        feed.check()


def test_an_exchange_that_begins_after_giving_up_ends_at_once() -> None:
    feed, cancelled = GradientFeed(NAMES), threading.Event()
    feed.abort()
    feed.bind(cancelled.set)
    assert cancelled.is_set()


def packing(feed: GradientFeed, packer: Packer, flat: list[Any], dtype: Any = np.float32) -> Any:
    """Return the chunks of a feed, with a fingerprint of each left in the feed, as a step makes its messages."""

    def encoded(chunk: Any) -> Any:
        payload = np.empty(chunk.elements, dtype)
        packer.write(flat, chunk.ranges, payload)
        return payload

    feed.open(encoded)
    for chunk in feed.chunks(packer.chunks(4), flat):
        feed.packed(chunk, lambda chunk=chunk: encoded(chunk))
        yield chunk


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0])
def test_a_gradient_that_was_sent_is_compared_by_its_content(packer: Packer, dtype: Any, factor: float) -> None:
    feed, flat = GradientFeed(NAMES), empty(packer)
    given = {name: values(1, tensor.count) for name, tensor in zip(NAMES, packer.layout.tensors, strict=True)}
    for name, gradient in given.items():
        feed.give(name, gradient)
    sent = list(packing(feed, packer, flat, dtype))
    assert len(sent) == 3
    given["c"] *= factor
    assert feed.holds() is (factor == 1.0)


@pytest.mark.parametrize(("name", "same"), [("b", True), ("a", False)])
def test_a_gradient_that_is_sent_later_may_change_before(packer: Packer, name: str, same: bool) -> None:
    feed, flat = GradientFeed(NAMES), empty(packer)
    given = {name: values(1, tensor.count) for name, tensor in zip(NAMES, packer.layout.tensors, strict=True)}
    for each, gradient in given.items():
        feed.give(each, gradient)
    messages = packing(feed, packer, flat)
    next(messages)  # the one of the first tensor
    given[name][:] = 9.0
    assert feed.holds() is same


def test_a_feed_that_was_compared_holds_no_step(packer: Packer) -> None:
    """The function that encodes chunks knows its step, and the step knows its feed: gradients would lie in a circle."""
    feed, flat = GradientFeed(NAMES), empty(packer)
    for each, tensor in zip(NAMES, packer.layout.tensors, strict=True):
        feed.give(each, values(1, tensor.count))
    list(packing(feed, packer, flat))
    assert feed.holds()
    assert (feed._pack, feed._sent) == (None, [])
    given_up = GradientFeed(NAMES)
    given_up.open(lambda chunk: values(0, chunk.elements))
    given_up.abort()
    assert given_up._pack is None


def test_messages_that_are_made_again_are_compared_with_the_gradients_of_then(packer: Packer) -> None:
    feed, flat = GradientFeed(NAMES), empty(packer)
    given = {name: values(1, tensor.count) for name, tensor in zip(NAMES, packer.layout.tensors, strict=True)}
    for name, gradient in given.items():
        feed.give(name, gradient)
    list(packing(feed, packer, flat))
    given["a"] *= 2
    list(packing(feed, packer, flat))
    assert feed.holds()


def test_a_feed_that_sent_nothing_holds_anything() -> None:
    assert GradientFeed(NAMES).holds()
