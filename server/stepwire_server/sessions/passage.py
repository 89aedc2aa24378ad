"""The ways of a session out of memory, where it lives on: on the disk alone, or on other servers; and the way in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping

from stepwire.errors import DataLossError, InvalidRequestError, StateChangedError
from stepwire_server.sessions.calls_under_way import CallsUnderWay
from stepwire_server.sessions.contributions import Contributions, Parts
from stepwire_server.sessions.exchange import Captured, StateExchange
from stepwire_server.sessions.freeze import Freeze, Frozen, Rest
from stepwire_server.sessions.imported_state import ImportedNumbers, ImportedState
from stepwire_server.sessions.ledger import session_parked
from stepwire_server.steps.step import Hold

__all__ = ["Passage"]


class Passage:
    """The door of a session that lives on elsewhere, or comes from there. Thread-safe: it shares the session's lock."""

    def __init__(
        self, parts: Parts, exchange: StateExchange, calls: CallsUnderWay, contributions: Contributions | None
    ) -> None:
        """Use the parts of a session.

        Args:
            parts: the parts.
            exchange: its state in and out.
            calls: its calls.
            contributions: its door for several workers; None for one worker.
        """
        self._config, self._state, self._ledger, self._lock = parts.config, parts.state, parts.ledger, parts.lock
        self._progress, self._clock = parts.progress, parts.clock
        self._exchange = exchange
        self._calls, self._contributions = calls, contributions

    @property
    def in_use(self) -> bool:
        """A stream is attached, or a call is under way."""
        return bool(self._ledger.attached or self._exchange.loads or self._calls)

    def release(self) -> None:
        """Free the memory. Under the lock."""
        try:
            if self._contributions is not None:
                self._contributions.close()
        finally:
            self._state.close()

    def retire(self, step: int, load: int, position: int, *, half: bool = False) -> bool:
        """Leave memory, if the disk has the present moment, a `Saved`, and nobody uses the session.

        With `half` a step is half applied, and is dropped with whoever is sending it.

        Returns:
            False if it is in use, has moved on since, or is about to live on elsewhere; nothing has changed then.
        """
        with self._lock:
            ledger = self._ledger
            moved = (step, load) != (ledger.applied_step, ledger.applied_load) or self._progress.last.number > position
            used = not half and self.in_use
            leaves = ledger.freeze is not None and ledger.freeze.is_lasting
            if moved or used or leaves or ledger.closed or (self._state.unfinished is not None) != half:
                return False
            self._leave()
            return True

    def freeze(
        self,
        move_id: str,
        last_step: int,
        seconds: float,
        last_contributions: Mapping[int, int] | None = None,
        begin_anew: Collection[int] = (),
    ) -> Frozen:
        """Admit no step beyond the present one, or a later one, and no load, for some seconds; again to renew.

        A step that is half applied is the present one. Of several workers, an open round ends with `UnavailableError`
        if it has contributions beyond the last ones. Workers that begin anew behind a load go on from those at once.

        Raises:
            InvalidRequestError: a contribution is of no worker of the session.
            SessionNotFoundError, DataLossError, SessionNotReadyError: there is no sound state.
            FencedError: another server owns the data directory.
        """
        with self._lock:
            ledger, half = self._ledger, self._state.unfinished
            ledger.check_usable()
            present = ledger.applied_step if half is None else half.number
            bounds = [last_contributions or {}]
            self._check_workers(bounds[0])
            ledger.members.even_out({index: bounds[0][index] for index in begin_anew}, ledger.applied_load)
            numbers, anew = self._numbers(), ledger.members.begin_anew(ledger.applied_load)
            former, followers = ledger.freeze, self._present()
            if former is not None and former.move_id == move_id and not former.is_over:
                last_step = max(last_step, former.last_step)
                bounds.append(former.last_contributions)
                followers = former.present | followers
            if former is None or not former.is_lasting:
                last = _largest(numbers, *bounds)
                former = Freeze(move_id, max(last_step, present), seconds, self._clock, last, followers)
            ledger.freeze = former
            if self._contributions is not None:
                self._contributions.rest(former)
            last, load, epoch = former.last_contributions, ledger.applied_load, ledger.epoch
            frozen = Frozen(ledger.applied_step, former.last_step, load, epoch, numbers, last, anew)
            mark = self._progress.last
        self._progress.read(mark)
        return frozen

    def thaw(self, move_id: str) -> None:
        """Go on, if this move has frozen the session."""
        with self._lock:
            freeze = self._ledger.freeze
            if freeze is not None and freeze.move_id == move_id and not freeze.is_lasting:
                self._ledger.freeze = None

    @contextlib.contextmanager
    def exported(self, move_id: str) -> Iterator[Captured]:
        """Keep the state of a frozen session for a block, so that it can be read.

        Raises:
            StateChangedError: the session is not frozen by this move, is not at rest, or a checkpoint is being read.
            StepwireError: as `StateExchange.captured`.
        """
        with self._lock:
            last_step = self._at_rest(move_id)
            assert self._ledger.freeze is not None
            followers, clocks = self._ledger.freeze.present | self._present(), self._ledger.members.clocks()
        with self._exchange.captured() as captured:
            if captured.numbers.step != last_step:
                raise _not_frozen(move_id)
            yield captured._replace(present=followers, clocks=clocks)

    @contextlib.contextmanager
    def leaving(self, move_id: str, rest: Rest | None) -> Iterator[Mapping[int, Hold]]:
        """End the session after a block that keeps the record of its successor.

        The session rests meanwhile, and its lock is free: the block waits for a disk, and perhaps for a store. If that
        fails with `DataLossError` the record may be there. So the session rests on, until the block is made again.

        Args:
            move_id: the name of the move.
            rest: the moment at which it rests; None where the record of the first shard has decided.

        Yields:
            The present holds of the workers that have joined, by index. They stay the present ones.

        Raises:
            StateChangedError: the session is not frozen by this move, or is not at rest.
            SessionNotFoundError, DataLossError: there is no sound state.
        """
        with self._lock:
            self._ledger.check_open()
            ledger = self._ledger
            if rest is not None:
                present = (self._at_rest(rest.move_id), ledger.applied_load, ledger.epoch, self._numbers())
                if present != (rest.step, rest.load, rest.epoch, rest.contributions):
                    raise _not_frozen(rest.move_id)
            former, numbers = ledger.freeze, self._numbers()
            ledger.freeze = lasting = Freeze(move_id, ledger.applied_step, math.inf, self._clock, numbers)
            holds = {index: member.worker.holder for index, member in ledger.members.joined().items()}
        try:
            yield holds
        except DataLossError:
            raise
        except BaseException:
            with self._lock:
                if ledger.freeze is lasting:
                    ledger.freeze = former
            raise
        with self._lock:
            if not ledger.closed:
                self._leave()

    @contextlib.contextmanager
    def importing(self, token: int) -> Iterator[ImportedState]:
        """Bring a state of other sessions into this new one, for a block.

        Args:
            token: that of the holder of the worker.

        Raises:
            FencedError, UnavailableError: as `Worker.holder_of`.
            ResourceExhaustedError: as `StateExchange.incoming`.
        """
        with self._lock:
            holder = self._ledger.worker.holder_of(token)
        with self._exchange.loads.one(), self._exchange.incoming() as incoming:
            yield ImportedState(self._config, self._ledger, self._lock, incoming, holder)

    def complete(self, imported: ImportedState, numbers: ImportedNumbers) -> bytes:
        """Complete a state that has arrived, with the first hold of each worker, and return the key of their tokens.

        Raises:
            StepwireError: as `ImportedState.check`; the session is as unusable as before.
        """
        imported.check()
        captured = Captured(
            numbers.snapshot,
            numbers.sum_bound,
            ready=True,
            last_result=numbers.last_result,
            holder=self._ledger.worker.holder,
            acquisitions=0,
            members=numbers.members,
        )
        self._exchange.restored(imported.incoming, captured)
        with self._lock:
            self._ledger.members.await_followers(numbers.present, numbers.clocks)
        return self._ledger.members.tokens.key

    def _numbers(self) -> dict[int, int]:
        """Return the last contribution of each worker that has joined; nothing for one worker. Under the lock."""
        several = self._contributions is not None
        return {index: member.number for index, member in self._ledger.members.joined().items()} if several else {}

    def _present(self) -> frozenset[int]:
        """Return the workers that are present; none in a session of one worker. Under the lock."""
        return frozenset() if self._contributions is None else self._ledger.members.present(self._clock())

    def _check_workers(self, numbers: Mapping[int, int]) -> None:
        """Refuse numbers of workers that the session cannot have. Under the lock.

        Raises:
            InvalidRequestError: names the first of them.
        """
        most = 0 if self._contributions is None else self._ledger.members.most
        if wrong := [index for index in numbers if index >= most]:
            problem = f"the session has no worker {wrong[0]}" if most else "the session has one worker, without numbers"
            raise InvalidRequestError.of("last_contributions", problem)

    def _at_rest(self, move_id: str) -> int:
        """Return the step that the session rests at. Under the lock."""
        self._ledger.check_sound()
        freeze = self._ledger.freeze
        frozen = freeze is not None and freeze.move_id == move_id and not freeze.is_over
        if freeze is None or not frozen or self._ledger.applied_step != freeze.last_step:
            raise _not_frozen(move_id)
        if self._numbers() != freeze.last_contributions:
            raise _not_frozen(move_id)
        return freeze.last_step

    def _leave(self) -> None:
        """End in this object: whoever has found it just now finds out when it asks again. Under the lock."""
        ledger = self._ledger
        ledger.closed = ledger.parked = True
        ledger.members.end(session_parked(ledger.session_id))
        self.release()


def _largest(*numbers: Mapping[int, int]) -> dict[int, int]:
    """Return the largest number of each worker."""
    return {index: max(each.get(index, 0) for each in numbers) for index in sorted(set().union(*numbers))}


def _not_frozen(move_id: str) -> StateChangedError:
    return StateChangedError(
        f"the session does not rest for the move {move_id[:64]!r}: the freeze is over, was made by another move, or "
        "its server was restarted; the session stays here, begin the move again",
        metadata={"move_id": move_id[:64]},
    )
