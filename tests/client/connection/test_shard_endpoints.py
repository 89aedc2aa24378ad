"""Endpoints of shards that a source has told: asked once for all calls of a moment, and again after it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stepwire.connection.shard_endpoints import LearntEndpoints
from stepwire.errors import InvalidRequestError, StepwireError, UnavailableError


class Source:
    """A source that tells one thing after another."""

    def __init__(self, *told: Mapping[str, str] | StepwireError) -> None:
        self.told, self.asked = list(told), list[float]()

    def endpoints(self, seconds: float) -> Mapping[str, str]:
        self.asked.append(seconds)
        found = self.told.pop(0)
        if isinstance(found, StepwireError):
            raise found
        return found


def test_calls_of_one_moment_share_a_look() -> None:
    now = [100.0]
    source = Source({"b": "h:2", "a": "h:1"}, InvalidRequestError("two serve"), {"a": "h:3", "b": ""}, {"a": "h:3"})
    known = LearntEndpoints(source, lambda: now[0])
    assert known.shards(9.0) == ["a", "b"]
    assert (known.endpoint("a", 8.0), known.endpoint("b", 7.0)) == ("h:1", "h:2")
    assert source.asked == [9.0]
    now[0] += 0.5
    for shard in ("a", "b"):
        with pytest.raises(UnavailableError, match="two serve"):
            known.endpoint(shard, 6.0)
    with pytest.raises(InvalidRequestError, match="two serve"):
        known.shards(5.0)
    assert source.asked == [9.0, 6.0]
    now[0] += 0.5
    assert known.endpoint("a", 4.0) == "h:3"
    with pytest.raises(UnavailableError, match="no server has the shard 'b' just now"):
        known.endpoint("b", 4.0)
    with pytest.raises(UnavailableError, match="no server has the shard 'b' just now"):
        known.shards(4.0)
    now[0] += 0.5
    with pytest.raises(UnavailableError, match="no server has the shard 'b' just now"):
        known.endpoint("b", 4.0)
    assert source.asked == [9.0, 6.0, 4.0, 4.0]
