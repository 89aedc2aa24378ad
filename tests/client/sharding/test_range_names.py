"""Names of ranges, there and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError
from stepwire.layout import TensorSpec
from stepwire.sharding.range_names import Origin, origin_of, range_spec

NAMES = st.text(min_size=1, max_size=30) | st.sampled_from(
    ["w", "w[0:6]of(2,3)", "w[0:6]of(2,3)[0:6]of(6)", "[0:1]of()", "x[0:1]of()", "a[1:2]of(2", "w[0:6]of(2,3) "]
)
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@given(NAMES, SHAPES, st.data(), st.integers(0, 3), st.booleans())
def test_a_name_says_what_it_is_a_range_of(name, shape, data, group: int, frozen: bool) -> None:
    count = math.prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    spec = range_spec(TensorSpec(name, shape, group, frozen), begin, end)
    assert origin_of(spec) == Origin(name, shape, begin, end)
    assert (spec.count, spec.group, spec.frozen) == (end - begin, group, frozen)


def test_names_are_told_as_they_are_written() -> None:
    assert range_spec(TensorSpec("w", (512, 1024)), 65536, 131072) == TensorSpec(
        "w[65536:131072]of(512,1024)", (65536,)
    )
    assert range_spec(TensorSpec("w", (512, 1024)), 0, 512 * 1024) == TensorSpec("w", (512, 1024))
    assert range_spec(TensorSpec("w[0:6]of(2,3)", ()), 0, 1).name == "w[0:6]of(2,3)[0:1]of()"


def test_who_is_only_named_like_a_range_is_none() -> None:
    for name, shape in (("w[0:6]of(2,3)", (2, 3)), ("w[0:6]of(5)", (6,)), ("w[1:6]of(6)", (4,))):
        assert origin_of(TensorSpec(name, shape)) == Origin(name, shape, 0, math.prod(shape))


def test_a_name_that_becomes_too_long_is_refused() -> None:
    range_spec(TensorSpec("w" * 501, (10,)), 0, 5)
    with pytest.raises(
        InvalidRequestError, match="has 513 characters with the bounds of a range; at most 512"
    ) as refused:
        range_spec(TensorSpec("w" * 502, (10,)), 0, 5)
    assert refused.value.metadata["tensor"] == "w" * 502
