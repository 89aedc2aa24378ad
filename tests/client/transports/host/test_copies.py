"""Copies to and from shared memory: the same elements by one thread and by several."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from stepwire.transports.host import copies
from stepwire.transports.host.copies import copy_all

LENGTHS = (1, 0, 700, 1, 1300, 64)


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have so many threads copy, however few bytes there are."""
    monkeypatch.setattr(copies, "_LEAST_BYTES", 256)
    monkeypatch.setattr(copies.os, "sched_getaffinity", lambda pid: set(range(request.param)))
    count: int = request.param
    return count


def arrays(dtype: Any) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(length).astype(dtype) for length in LENGTHS]


@pytest.mark.parametrize("read", [np.float32, np.float16])
@pytest.mark.parametrize("written", [np.float32, np.float16])
def test_every_element_is_copied(threads: int, read: Any, written: Any) -> None:
    sources = arrays(read)
    places = [np.full(length, np.nan, written) for length in LENGTHS]
    copy_all(list(zip(places, sources, strict=True)))
    for place, source in zip(places, sources, strict=True):
        np.testing.assert_array_equal(place, source.astype(written))


def test_parts_have_about_as_many_bytes_and_cut_arrays(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    lock = threading.Lock()

    def noted(part: Any) -> None:
        with lock:
            sizes.append(sum(place.nbytes for place, _ in part))

    monkeypatch.setattr(copies, "_copy", noted)
    copy_all([(array, array) for array in arrays(np.float32)])
    assert (len(sizes), sum(sizes)) == (threads, 4 * sum(LENGTHS))
    assert max(sizes) - min(sizes) <= 8 * threads


def test_arrays_with_strides_are_read_as_they_are(threads: int) -> None:
    source = np.arange(4000, dtype=np.float32)[::2]
    place = np.zeros(2000, np.float32)
    copy_all([(place, source)])
    np.testing.assert_array_equal(place, source)


def test_a_value_beyond_float16_becomes_infinite_without_a_warning(threads: int) -> None:
    place = np.zeros(2000, np.float16)
    copy_all([(place, np.full(2000, 1e9, np.float32))])
    assert np.isposinf(place).all()


def test_a_copy_that_fails_is_told(threads: int) -> None:
    places = [np.zeros(1000, np.float32), np.zeros(1000, np.float32)]
    places[1].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_all([(place, np.ones(1000, np.float32)) for place in places])
