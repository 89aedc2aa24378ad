"""The workers of a session with what each has had answered: the key of exactly-once is (worker, number)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec

from stepwire.errors import InvalidRequestError, Reason, ResourceExhaustedError, StepMismatchError, StepwireError
from stepwire_server.durability.manifest import MemberFacts
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.attach_tokens import AttachTokens
from stepwire_server.sessions.workers import Worker
from stepwire_server.steps.step import Hold

__all__ = ["Member", "Members"]

_RETRY_SECONDS = 0.5
_FOLLOWING_SECONDS = 30.0
"""The time for which a worker whose session has moved counts as present."""


class Member:
    """One worker, and its last contribution that was answered. The session serialises its calls.

    Attributes:
        worker: the worker, with its holder.
        number: the number of the contribution; 0 before the first. Without aggregation it stays 0.
        load: the session's last load when it was answered; 0 before the first.
        loaded: the last load that the worker committed, as far as is known; 0 for none.
        result: its result, for a replay; None before the first, and for a number that a move has evened out.
        told: the result has been sent.
        clock: the contributions since it joined, and those of the slowest worker that it joined.
        awaited_until: the clock reading until which it is present without a stream: its session has moved, and it
            follows. It is inf until somebody has tried to attach, and -inf for a worker that nobody awaits.
    """

    __slots__ = ("awaited_until", "clock", "load", "loaded", "number", "result", "told", "worker")

    def __init__(self, index: int, tokens: AttachTokens) -> None:
        """Start without a contribution."""
        self.worker = Worker(index, tokens)
        self.number = self.load = self.loaded = 0
        self.result: StepResult | None = None
        self.told = False
        self.clock = 0
        self.awaited_until = -math.inf

    def is_present(self, now: float) -> bool:
        """Tell whether the worker has a stream, or is about to have one again."""
        return self.worker.attached or now < self.awaited_until

    def begins_anew(self, load: int) -> bool:
        """Tell whether the session's last load has come behind the last contribution.

        Nothing that the worker sent before counts any more, so any later number is the next one.
        """
        return load > self.load

    def admit(self, number: int, load: int) -> bool:
        """Return True for the next contribution and False for a replay of the last one.

        Args:
            number: the number of the contribution.
            load: the session's last load.

        Raises:
            StepMismatchError: neither.
        """
        if number == self.number + 1 or (number > self.number and self.begins_anew(load)):
            return True
        if number == self.number and self.result is not None:
            return False
        old = number <= self.number
        raise StepMismatchError(
            f"contribution {number} of worker {self.worker.index} {'was answered' if old else 'is too far ahead'}; its "
            f"next one is {self.number + 1}",
            reason=Reason.STEP_SUPERSEDED if old else Reason.STEP_MISMATCH,
            metadata={"expected_step": self.number + 1, "actual_step": number},
        )

    def answered(self, number: int, load: int, result: StepResult) -> None:
        """Note an answer, and the session's last load at that time."""
        self.number, self.load, self.result, self.told = number, load, result, False

    def restore(self, number: int, load: int, result: bytes | None) -> None:
        """Note the answer of an earlier server, unless a later one is known."""
        if number > self.number:
            self.number, self.load, self.told = number, load, True
            self.result = None if result is None else msgspec.msgpack.decode(result, type=StepResult)


class Members:
    """The workers of one session, made as they first attach. The session serialises its calls.

    Attributes:
        most: the number of workers that there may be.
        tokens: the tokens of their holds.
    """

    def __init__(self, most: int) -> None:
        """Allow the indices [0, most)."""
        self.most = most
        self.tokens = AttachTokens()
        self._members = {0: Member(0, self.tokens)}

    def __getitem__(self, index: int) -> Member:
        """Return a worker.

        Raises:
            InvalidRequestError: the session has no such worker.
        """
        if (member := self._members.get(index)) is not None:
            return member
        if index >= self.most:
            raise InvalidRequestError.of(
                "worker", f"the session has the workers 0 to {self.most - 1}, and {index} is none of them"
            )
        member = self._members[index] = Member(index, self.tokens)
        return member

    def is_held_by(self, holder: Hold) -> bool:
        """Tell whether a hold is its worker's present one."""
        member = self._members.get(holder.worker)
        return member is not None and member.worker.holder is holder

    def __iter__(self) -> Iterator[Member]:
        """Iterate over the workers that have attached so far, by index."""
        return iter([self._members[index] for index in sorted(self._members)])

    def follows(self, load: int, last: int) -> bool:
        """Tell whether a load may follow on the last one; of several workers, under any later number.

        So a number is one load's at all shards of a model, whatever the others are at.
        """
        return load > last if self.most > 1 else load == last + 1

    def loader(self, load: int) -> int | None:
        """Return the worker that committed a load; None where nobody knows any more, and for a single worker."""
        found = (index for index, member in self._members.items() if member.loaded == load)
        return next(found, None) if self.most > 1 else None

    def join(self, member: Member, now: float, *, was_present: bool) -> None:
        """Have a worker that has come begin beside the slowest present one: nobody waits until it has caught up.

        Args:
            member: the worker, which somebody holds now.
            now: the clock reading.
            was_present: it was present before.
        """
        if not was_present:
            others = (other for other in self._members.values() if other is not member)
            present = [other.clock for other in others if other.is_present(now)]
            member.clock = max(member.clock, min(present, default=0))
        member.awaited_until = -math.inf

    def await_followers(self, present: Collection[int], clocks: Mapping[int, int]) -> None:
        """Go on with the clocks that workers had where the session was, and count those who follow as present."""
        for index, clock in clocks.items():
            self[index].clock = clock
        for index in present:
            self[index].awaited_until = math.inf

    def note_attempt(self, now: float) -> None:
        """Have the time of those that follow begin, with the first attempt to attach: the move is over by then."""
        for member in self._members.values():
            if member.awaited_until == math.inf:
                member.awaited_until = now + _FOLLOWING_SECONDS

    def next_absence(self, now: float) -> float:
        """Return the clock reading at which the next one that is awaited counts as absent; inf for none."""
        times = (member.awaited_until for member in self._members.values() if not member.worker.attached)
        return min((until for until in times if until > now), default=math.inf)

    def await_no_longer(self, came: Collection[int]) -> None:
        """Count workers that have not followed by the end of a round as absent, but those that came."""
        for index, member in self._members.items():
            if index not in came:
                member.awaited_until = -math.inf

    def present(self, now: float) -> frozenset[int]:
        """Return the indices of the present workers."""
        return frozenset(index for index, member in self._members.items() if member.is_present(now))

    def clocks(self) -> dict[int, int]:
        """Return the clock of each worker that somebody has acquired so far, by index."""
        return {index: member.clock for index, member in self.joined().items()}

    @property
    def acquisitions(self) -> int:
        """The sum of the generations in which the workers were acquired, and of their contributions.

        It grows with each acquisition, and with each answer: one moment of a session has one.
        """
        return sum(member.worker.holder.acquired + member.number for member in self._members.values())

    def even_out(self, numbers: Mapping[int, int], load: int) -> None:
        """Have workers go on from numbers that other shards answered before a load, which this one has too."""
        for index, number in numbers.items():
            member = self[index]
            if number > member.number and member.begins_anew(load):
                member.number, member.result = number, None

    def begin_anew(self, load: int) -> frozenset[int]:
        """Return the workers whose next contribution may have any later number."""
        return frozenset(index for index, member in self._members.items() if member.begins_anew(load))

    def generations(self) -> dict[int, int]:
        """Return the number of each worker's hold."""
        return {index: member.worker.holder.generation for index, member in self._members.items()}

    def resume(self, generations: Mapping[int, int]) -> None:
        """Go on from holds of this server, whose session was parked."""
        for index, generation in generations.items():
            self[index].worker.resume(generation)

    def joined(self) -> dict[int, Member]:
        """Return the workers that somebody has acquired so far, by index."""
        return {member.worker.index: member for member in self if member.worker.holder.acquired}

    def facts(self, load: int) -> tuple[MemberFacts, ...]:
        """Return what a checkpoint of a load tells of the workers; nothing of a single one without aggregation."""
        if self.most == 1 and self[0].result is None:
            return ()
        return tuple(
            MemberFacts(
                worker=member.worker.index,
                contribution=member.number,
                generation=member.worker.holder.generation,
                acquired=member.worker.holder.acquired,
                last_result=None if member.result is None else msgspec.msgpack.encode(member.result),
                load=None if member.load == load or not member.number else member.load,
                loaded=member.loaded,
            )
            for member in self
        )

    def restore(self, facts: Sequence[MemberFacts], load: int, epoch: int) -> None:
        """Go on from the workers of an earlier server.

        Args:
            facts: what a checkpoint tells of them.
            load: the last load of that checkpoint.
            epoch: the epoch of this server.
        """
        for each in facts:
            member = self[each.worker]
            member.worker.restore(each.acquired, epoch)
            member.loaded = max(member.loaded, each.loaded)
            member.restore(each.contribution, load if each.load is None else each.load, each.last_result)

    @property
    def attached(self) -> frozenset[int]:
        """The indices of the workers that have a stream."""
        return frozenset(index for index, member in self._members.items() if member.worker.attached)

    def vacant(self, acquisition: int, now: float) -> int:
        """Return the lowest index that was never held, or else of a worker that is not present.

        Args:
            acquisition: the client's number of its attempts, or 0. The worker that an earlier one got comes first.
            now: the clock reading.

        Raises:
            ResourceExhaustedError: all are present.
        """
        if acquisition:
            for index, member in self._members.items():
                if member.worker.holder.acquisition == acquisition:
                    return index
        for index in range(self.most):
            if index not in self._members or not self._members[index].worker.holder.generation:
                return index
        for index in range(self.most):
            if not self._members[index].is_present(now):
                return index
        raise ResourceExhaustedError(
            f"all {self.most} workers of the session are attached; wait until one leaves, or create it with more",
            reason=Reason.TOO_MANY_STREAMS,
            metadata={"workers": self.most},
            retry_after_seconds=_RETRY_SECONDS,
        )

    def end(self, error: StepwireError) -> None:
        """End all streams with an error: the session is gone."""
        for member in self._members.values():
            member.worker.end(error)
