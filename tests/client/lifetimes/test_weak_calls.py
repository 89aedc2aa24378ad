"""Calls of a method that do not keep its object."""

from __future__ import annotations

import re
import weakref

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.lifetimes.weak_calls import weak_call


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int, *, twice: bool = False) -> int:
        self.count += number * (2 if twice else 1)
        return self.count


def test_a_weak_call_calls_the_method_and_keeps_no_object() -> None:
    counter = Counter()
    call, weak = weak_call(counter.add, "counter"), weakref.ref(counter)
    assert (call(2), call(3, twice=True)) == (2, 8)
    del counter
    assert weak() is None
    with pytest.raises(InvalidRequestError, match=re.escape("counter: the counter is gone; keep a reference to it")):
        call(1)


def test_a_plain_function_is_itself() -> None:
    assert weak_call(len, "function") is len
