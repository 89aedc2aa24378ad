"""The seam between a session and its server: a `Session` speaks through a `SessionLink`, and knows no other way.

`RemoteLink` is the link to one server, and `ShardedLink` the link to the servers of a sharded session. A test may bring
a fake. A link works on checked calls and on arrays in layout order; names and trees are the session's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stepwire.arrays.packing import Flat
from stepwire.arrays.rows import PulledRows, RowGradient
from stepwire.connection.retry import Deadline
from stepwire.links.direct import DirectSteps
from stepwire.links.progress import LoadProgress
from stepwire.results import SessionInfo, SessionStatistics, TransportChoice
from stepwire.steps.call import StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, step_pb2, tensor_pb2

__all__ = ["Load", "SessionLink", "StateOrigin"]


class StateOrigin(NamedTuple):
    """An earlier state of a session, on its server: one of both.

    Attributes:
        checkpoint: the name of a checkpoint.
        step: the number of a step.
    """

    checkpoint: str | None
    step: int | None

    def fill(self, request: pb.RollbackRequest | pb.ForkSessionRequest) -> None:
        """Name the state in a request."""
        if self.checkpoint is not None:
            request.checkpoint = self.checkpoint
        elif self.step is not None:
            request.step = self.step


class Load(NamedTuple):
    """The values of one load.

    Attributes:
        sources: by slot, 1-D arrays in layout order; the other slots stay as they are.
        step: the session's new applied step; None keeps the present one.
        tensor_steps: the updates that each tensor has had, in layout order; empty keeps them.
        loss_scale: the loss scale, and the clean steps since its last change; None keeps them.
        tensor_scalars: the scalar of each tensor, in layout order; empty keeps them, or lets the server derive them
            from `tensor_steps`.
        origin: the state on the server that all values are those of, in the place of the other attributes but `step`;
            None for values that are sent.
        whole: it brings all slots, the step and every number, so that nothing of the present state matters.
        progress: is told of the bytes as they are sent; None for nobody.
        rows: the parameters of rows of tables that it replaces, in the place of whole slots, one entry a table; None
            for whole slots.
        number: its number among the loads; 0 for the next one that no other worker's load has.
        as_one: all workers make it, and whichever is the first one of its number counts.
    """

    sources: Mapping[str, Flat]
    step: int | None = None
    tensor_steps: Sequence[int] = ()
    loss_scale: tuple[float, int] | None = None
    tensor_scalars: Sequence[float] = ()
    origin: StateOrigin | None = None
    whole: bool = False
    progress: LoadProgress | None = None
    rows: tuple[RowGradient, ...] | None = None
    number: int = 0
    as_one: bool = False

    def opening(self) -> state_pb2.LoadOpen:
        """Return the first message of the load, without the numbers that its link knows."""
        opening = state_pb2.LoadOpen(
            slots=self.sources, step=self.step, tensor_steps=self.tensor_steps, tensor_scalars=self.tensor_scalars
        )
        if self.rows is not None:
            opening.slots[:], opening.by_rows = ["param"], True
            opening.tables.extend(
                tensor_pb2.TableEntries(tensor=table.tensor, entries=len(table.indices)) for table in self.rows
            )
        if self.loss_scale is not None:
            opening.loss_scale.scale, opening.loss_scale.clean_steps = self.loss_scale
        return opening


class SessionLink(Protocol):
    """The way to one session. Callers of `attach`, `detach`, `step`, `shared` and the loads hold `lock`."""

    @property
    def description(self) -> SessionDescription:
        """The session as its server described it."""

    @property
    def lock(self) -> threading.RLock:
        """The lock that serialises the steps and loads of the session."""

    @property
    def direct(self) -> DirectSteps | None:
        """The steps that the caller's own thread can make; None where there are none."""
        return None

    @property
    def carry(self) -> Carry:
        """The arrays that steps leave on the client for the next."""

    @property
    def shards(self) -> tuple[SessionLink, ...]:
        """The links of the shards, in order; the link itself for a session that is not sharded."""

    @property
    def applied_step(self) -> int:
        """The last step known to be applied.

        Raises:
            StepMismatchError: the shards are at different steps, and not because a step of this client failed.
        """

    @property
    def worker(self) -> int | None:
        """The index of the worker that this client steps as; None before the first attach for whichever is vacant."""
        return self.shards[0].worker

    @property
    def last_result(self) -> step_pb2.StepResult | None:
        """The result of the last step; None before the first."""

    @property
    def transport(self) -> TransportChoice | None:
        """The transport in use; None before the first stream is attached."""

    def deadline(self, timeout: float | None) -> Deadline:
        """Start the deadline of a call; None means the client's default.

        Raises:
            InvalidRequestError: the timeout is not a positive number.
        """

    def attach(self, deadline: Deadline, *, transport: str | None = None, take_over: bool = False) -> None:
        """Attach a stream now, perhaps over another transport.

        Args:
            deadline: the deadline of everything.
            transport: the transport from now on; None keeps the present one.
            take_over: acquire the worker from its holder, and fence the holder.

        Raises:
            FencedError: another client holds the worker, and `take_over` is not set.
            StepwireError: the server refused, or cannot be reached.
        """

    def detach(self) -> None:
        """Close the stream; the worker stays held until another client acquires it."""

    def step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Apply one step exactly once, and read its reply into the arrays of the call.

        A step whose outcome is unknown is settled first: see `stepwire.steps.doubt`.

        Raises:
            StepwireError: as `Session.step`.
        """

    def pull_rows(self, rows: PulledRows, dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """Read rows of the parameters of tables, or ids, all as of one step that has all that this client knows.

        Raises:
            StepwireError: as `pull`.
        """

    def pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """Read slots into arrays in layout order, all as of one step that has all that this client knows.

        Raises:
            StateLossError: the server has lost steps that are not kept.
            StepwireError: as `Session.pull`.
        """

    def load(self, load: Load, deadline: Deadline) -> None:
        """Replace slots, all at once, and settle a step whose outcome is unknown.

        Steps that the server has lost are sent again before it, or told, unless the load brings the whole state.

        Raises:
            StepwireError: as `Session.load_state`.
        """

    def initialize(self, load: Load, deadline: Deadline) -> None:
        """Load parameters into a session that has none yet; do nothing for a session that has.

        Raises:
            StepwireError: as `load`.
        """

    def shared(self, deadline: Deadline) -> SharedArrays:
        """Return the memory that the session shares with its server, attaching first if need be.

        Raises:
            UnsupportedFeatureError: the session shares no memory.
            StepwireError: as `attach`.
        """

    def forget_writes(self) -> None:
        """Show the server's parameters in private views of shared memory again."""

    def ask(self, method: str, request: Any, response: Any, deadline: Deadline) -> list[Any]:
        """Make a unary call about the session, and return the response of each shard, in order.

        Args:
            method: the name of the method.
            request: the request; the id of the session is filled in.
            response: the class of the response.
            deadline: the deadline of everything.

        Raises:
            StepwireError: the refusal of a server, which names the shard.
        """

    def make_sure(self, deadline: Deadline) -> None:
        """Make sure that the server has all that this client knows: send lost steps again, or tell of them.

        Raises:
            StateLossError: the server has lost steps that are not kept.
            StepwireError: as `ask` and `attach`.
        """
        for shard in self.shards:
            shard.make_sure(deadline)

    def info(self, deadline: Deadline) -> SessionInfo:
        """Ask the server for the state of the session.

        Raises:
            SessionNotFoundError: the session is gone.
        """

    def statistics(self) -> SessionStatistics:
        """Return the numbers that this client knows; nothing is sent."""

    def close(self) -> None:
        """End the session on the server. Closing twice is harmless."""

    def leave(self, seconds: float | None) -> None:
        """Close the stream of a session that nobody uses any more, and perhaps end the session.

        The server is asked once, and a failure is silent: the lease of the session ends it too.

        Args:
            seconds: the time to end the session in, unless another client has acquired it; None leaves it there.
        """
        for shard in self.shards:
            shard.leave(seconds)
