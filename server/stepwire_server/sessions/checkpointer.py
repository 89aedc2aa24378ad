"""The thread that takes the checkpoints of all sessions, removes old ones, and lets go of the log behind them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import structlog

from stepwire_server.config import ServerConfig
from stepwire_server.observability.histograms import Histogram
from stepwire_server.sessions.checkpointing import Saved
from stepwire_server.sessions.session import Session

__all__ = ["Checkpointer"]

_log = structlog.get_logger()


class _Kept(NamedTuple):
    """The last checkpoint of a session; the clock reading and the bytes of the log when it was saved."""

    saved: Saved
    at: float
    log_bytes: int


class Checkpointer:
    """Takes checkpoints when they are due. Thread-safe.

    Attributes:
        save_seconds: the times of the checkpoints, those that failed too.
    """

    def __init__(
        self,
        config: ServerConfig,
        clock: Callable[[], float],
        save: Callable[[Session], Saved],
        release: Callable[[int], object],
    ) -> None:
        """Take checkpoints of the sessions that are added.

        Args:
            config: the settings.
            clock: returns seconds.
            save: takes a checkpoint, and removes those that are too many.
            release: lets go of the log's records before a number.
        """
        self._config = config
        self._clock = clock
        self._save = save
        self._release = release
        self.save_seconds = Histogram()
        self._kept: dict[Session, _Kept] = {}
        self._lock = threading.Lock()  # of the dictionary
        self._turn = threading.Lock()  # of one checkpoint at a time
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def start(self) -> None:
        """Look for due checkpoints from now on."""
        self._thread.start()

    def add(self, session: Session, saved: Saved) -> None:
        """Look after a session whose last checkpoint is known."""
        with self._lock:
            self._kept[session] = _Kept(saved, self._clock(), session.progress.log_bytes)

    def remove(self, session: Session) -> None:
        """Look after a session no more."""
        with self._turn, self._lock:
            self._kept.pop(session, None)

    def wake(self) -> None:
        """Look at once: a session has taken the steps between two checkpoints."""
        self._wake.set()

    def look(self) -> None:
        """Take the checkpoints that are due, and let go of the log behind them."""
        for session in self._due():
            try:
                self.checkpoint(session)
            except Exception as error:  # the next look tries again, whatever it was, and the thread goes on
                _log.warning("checkpoint failed", session_id=session.session_id, problem=str(error))
        try:
            self._let_go()
        except Exception as error:
            _log.warning("log not shortened", problem=str(error))

    def checkpoint(self, session: Session) -> Saved:
        """Take a checkpoint of a session now, unless the last one has its present state.

        Raises:
            StepwireError, OSError: as `checkpointing.save`.
        """
        with self._turn:
            kept = self.last(session)
            if kept is not None and self._is_present(session, kept):
                return kept
            log_bytes, began = session.progress.log_bytes, self._clock()
            try:
                saved = self._save(session)
            finally:
                self.save_seconds.observe(self._clock() - began)
            with self._lock:
                if session in self._kept:
                    self._kept[session] = _Kept(saved, self._clock(), log_bytes)
            return saved

    def of(self, session_id: str) -> Session | None:
        """Return the session of an id, if it is looked after."""
        with self._lock:
            return next((session for session in self._kept if session.session_id == session_id), None)

    def last(self, session: Session) -> Saved | None:
        """Return the last checkpoint of a session; None for one that is not looked after."""
        with self._lock:
            kept = self._kept.get(session)
        return None if kept is None else kept.saved

    def _is_present(self, session: Session, saved: Saved) -> bool:
        """Tell whether a checkpoint has the session's present moment, its hold included."""
        ledger = session.ledger
        moment = (ledger.applied_step, ledger.applied_load)
        return (saved.step, saved.load) == moment and session.progress.last.number <= saved.position

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Keep every other checkpoint waiting for a block: one is taken or deleted at a time."""
        with self._turn:
            yield

    def close(self) -> None:
        """End the thread, after the checkpoint that it is taking. Closing twice is harmless."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(self._config.sweep_seconds)
            self._wake.clear()
            if not self._ended:
                self.look()

    def _due(self) -> Iterable[Session]:
        now = self._clock()
        with self._lock:
            kept = list(self._kept.items())
        return [session for session, last in kept if self._is_due(session, last, now)]

    def _is_due(self, session: Session, kept: _Kept, now: float) -> bool:
        ledger, durability = session.ledger, session.config.durability
        steps = ledger.applied_step - kept.saved.step
        loaded = ledger.applied_load != kept.saved.load
        if kept.saved.position < 0:
            return True  # the log of older epochs waits for it
        if session.progress.last.number > kept.saved.position and self._is_long(session, kept):
            return True  # a hold alone would keep the log
        if not (steps or loaded):
            return False
        if loaded and durability.level == "checkpoint":  # only a checkpoint has it
            return True
        if durability.every_steps is not None and steps >= durability.every_steps:
            return True
        return now - kept.at >= (durability.every_seconds or self._config.checkpoint_seconds)

    def _is_long(self, session: Session, kept: _Kept) -> bool:
        """Tell whether the log behind a session's checkpoint is longer than it may be."""
        return session.progress.log_bytes - kept.log_bytes > self._config.journal_bytes

    def _let_go(self) -> None:
        with self._lock:
            kept = list(self._kept.items())
        if not kept:
            return
        first = kept[0][0].progress.position + 1  # of the whole log: whatever begins from here on lies behind
        for session, last in kept:
            if session.progress.last.number > last.saved.position:
                first = min(first, last.saved.position + 1)
            first = min(first, session.needed_record or first)
        self._release(first)
