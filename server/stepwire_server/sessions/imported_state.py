"""A state of other sessions on its way into a new one: blocks in any order, and the numbers last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stepwire.errors import InvalidRequestError, StateChangedError
from stepwire.layout import SCALE_SUFFIX
from stepwire_server.durability.manifest import MemberFacts
from stepwire_server.engines.protocol import PARAM, HostArray
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_result import StepResult
from stepwire_server.rules import RowSemantics
from stepwire_server.sessions.incoming_state import IncomingState
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.sessions.row_numbers import row_slots
from stepwire_server.sessions.session_lock import SessionLock
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.coverage import invalid_chunk

__all__ = ["ImportedNumbers", "ImportedState"]


class ImportedNumbers(NamedTuple):
    """The numbers of a state of other sessions.

    Attributes:
        snapshot: the numbers of the arrays.
        sum_bound: no element of the accumulated gradient is larger in magnitude.
        last_result: the result of the last step; None for none.
        members: the facts of several workers, each with its first hold; empty for one.
        present: those workers that follow.
        clocks: the clocks of the workers, by index.
    """

    snapshot: Snapshot
    sum_bound: float
    last_result: StepResult | None
    members: tuple[MemberFacts, ...] = ()
    present: frozenset[int] = frozenset()
    clocks: Mapping[int, int] = {}


class ImportedState:
    """One state on its way in. It has the session's lock for each block, and the session is new until the end.

    Attributes:
        incoming: the arrays on their way.
    """

    def __init__(
        self, config: SessionConfig, ledger: Ledger, lock: SessionLock, incoming: IncomingState, holder: Holder
    ) -> None:
        """Await the blocks of a state, under a hold of the worker."""
        self.incoming = incoming
        self._ledger, self._lock, self._holder = ledger, lock, holder
        self._sizes = dict.fromkeys(config.visible_slots, config.layout.size) | row_slots(config)
        tensors = sum(tensor.count for tensor in config.layout.tensors)
        # The maxima of blocks are those of 8-bit moments alone, and zeros elsewhere.
        self._elementwise = [slot for slot in config.visible_slots if not slot.endswith(SCALE_SUFFIX)]
        self._missing = dict.fromkeys(self._elementwise, tensors) | row_slots(config)
        # A shard that has nothing but tables with one sum a row has no slot for sums of elements.
        sums = [index for index, semantics in config.tables.items() if semantics is RowSemantics.ROW_WISE]
        self._unneeded = sum(config.layout.tensors[index].count for index in sums)

    def add(self, slot: str, start: int, values: HostArray) -> None:
        """Write one block, `(n,) float32`.

        Raises:
            InvalidRequestError: there is no such array, or the block is out of its range.
            StateChangedError: the session is not new any more.
            StepwireError: as `Ledger.check_sound` and `Worker.check`.
        """
        if slot not in self._sizes:
            raise InvalidRequestError.of("slot", f"{slot[:64]!r} is unknown; this session has {', '.join(self._sizes)}")
        if start + len(values) > self._sizes[slot]:
            raise invalid_chunk(start, start + len(values), f"is no part of [0, {self._sizes[slot]})")
        with self._lock:
            self._check_new()
            self.incoming.write(slot, start, values)
        if slot in self._missing:
            self._missing[slot] -= len(values)

    def check(self) -> None:
        """Check that all blocks are there.

        Raises:
            InvalidRequestError: blocks are missing, or came twice.
            StepwireError: as `add`.
        """
        for slot, missing in self._missing.items():
            unneeded = 0 if slot == PARAM or slot not in self._elementwise else self._unneeded
            if not 0 <= missing <= unneeded:
                problem = f"{missing} elements of {slot!r} were not sent" if missing > 0 else f"{slot!r} came twice"
                raise InvalidRequestError.of("chunk", f"{problem}; send each element of a tensor once")
        with self._lock:
            self._check_new()

    def _check_new(self) -> None:
        ledger = self._ledger
        ledger.check_sound()
        ledger.worker.check(self._holder)
        if ledger.applied_step or ledger.applied_load:
            raise StateChangedError(
                f"the session is at step {ledger.applied_step} and load {ledger.applied_load}; a state comes into a "
                "new session alone, so create another one"
            )
