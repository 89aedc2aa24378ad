"""The gate of compiled lanes: it knows the grants that have begun, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire_server.rpc.lane_gate import LaneGate


class Seat:
    """A seat whose grant the system may refuse."""

    def __init__(self, problem: OSError | None = None) -> None:
        self.problem, self.ended = problem, 0

    def grant(self) -> None:
        if self.problem is not None:
            raise self.problem

    def end(self) -> None:
        self.ended += 1


def test_a_grant_that_the_system_refuses_is_none_that_a_drain_would_end() -> None:
    """Another lane may have the place by then, and another file the descriptor of the bell."""
    gate = LaneGate()
    granted: Any = Seat()
    refused: Any = Seat(OSError("no memory"))
    assert gate.grant(granted)
    with pytest.raises(OSError, match="no memory"):
        gate.grant(refused)
    assert gate.statistics().granted == 1
    gate.close()
    assert (granted.ended, refused.ended) == (1, 0)
    assert not gate.grant(refused), "nothing is granted any more"
