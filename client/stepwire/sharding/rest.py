"""The moment at which the shards of a model rest for a move: one step, and one number of each worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stepwire.errors import StateChangedError, StepMismatchError
from stepwire.v1 import move_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["Rest"]


class Rest(NamedTuple):
    """The moment that shards come to.

    Attributes:
        step: the last step.
        load: the last load.
        epoch: the epoch of the first shard.
        contributions: of several workers, those that have joined, with their last contributions.
        begin_anew: the workers whose last contributions a load has come behind at all shards. Nobody repeats these, so
            they go on from the largest.
    """

    step: int = 0
    load: int = 0
    epoch: int = 0
    contributions: dict[int, int] = {}
    begin_anew: frozenset[int] = frozenset()

    @classmethod
    def of(cls, frozen: Sequence[pb.FreezeSessionResponse]) -> Rest:
        """Return the moment that frozen shards will come to: the latest that any of them admits.

        Raises:
            StepMismatchError: a load was committed on some of them alone.
        """
        if len({each.applied_load for each in frozen}) > 1:
            raise StepMismatchError(
                "a load of this session was committed on some servers alone; load again, and move it then"
            )
        contributions: dict[int, int] = {}
        for each in frozen:
            for worker, number in _numbers(each.last_contributions).items():
                contributions[worker] = max(number, contributions.get(worker, 0))
        step = max(each.last_step for each in frozen)
        anew = frozenset.intersection(*map(_begin_anew, frozen))
        return cls(step, frozen[0].applied_load, frozen[0].epoch, dict(sorted(contributions.items())), anew)

    @property
    def wire_contributions(self) -> list[move_pb2.WorkerNumber]:
        """The contributions as messages."""
        return [
            move_pb2.WorkerNumber(worker=worker, contribution=number, begins_anew=worker in self.begin_anew)
            for worker, number in self.contributions.items()
        ]

    def check_reached(self, frozen: Sequence[pb.FreezeSessionResponse]) -> None:
        """Refuse to go on before all shards are there.

        Raises:
            StateChangedError: a shard is not there yet.
            StepMismatchError: no shard lacks a contribution, and they have made different numbers of steps of them.
        """
        if any(_numbers(each.contributions) != self.contributions for each in frozen):
            raise StateChangedError(f"the shards have not all come to the contributions {self.contributions}")
        if all(each.applied_step == self.step for each in frozen):
            return
        if self.contributions:
            steps = [each.applied_step for each in frozen]
            raise StepMismatchError(
                f"the shards have made {steps} steps of the same contributions; load one state into all of them, and "
                "move the session then",
                metadata={"steps": ",".join(map(str, steps))},
            )
        raise StateChangedError(f"the shards have not all come to step {self.step}")


def _begin_anew(frozen: pb.FreezeSessionResponse) -> frozenset[int]:
    return frozenset(each.worker for each in frozen.contributions if each.begins_anew)


def _numbers(message: Iterable[move_pb2.WorkerNumber]) -> dict[int, int]:
    return {each.worker: each.contribution for each in message}
