"""The user's surface of a session's state: read, shared as memory, kept in checkpoints, brought back, and forked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Packer
from stepwire.arrays.rows import Rows
from stepwire.arrays.trees import Structure, Tree
from stepwire.connection.errands import by_errands
from stepwire.errors import InvalidRequestError, SessionMovedError, UnsupportedFeatureError
from stepwire.links import checkpoints as calls
from stepwire.links.link import Load, SessionLink, StateOrigin
from stepwire.links.snapshots import snapshot_of
from stepwire.links.table_rows import checked_rows, hashed_tables, read_rows, row_ids, whole_tables
from stepwire.optimizers.durability import Durability, DurabilityLevel
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.results import CheckpointInfo, Snapshot
from stepwire.steps.loss_scale import KnownLossScale
from stepwire.wire.dtypes import FLOAT32, dtype_named
from stepwire.wire.text import checked_text

__all__ = ["Fork", "ForkOptions", "StateCalls"]

_PARAM, _AVERAGE = "param", "param_average"


class ForkOptions(NamedTuple):
    """A fork as it is asked for; see `StateCalls.fork`."""

    origin: StateOrigin
    label: str | None
    durability: Durability | DurabilityLevel | None
    lease_seconds: float | None
    device: str | None
    request_id: str | None
    keep: bool
    error_feedback: bool
    timeout: float | None


Fork = Callable[[str, Structure, ForkOptions], Any]
"""Makes the fork of a session, by its id, with the structure of its parameters."""


@by_errands()
class StateCalls:
    """The part of a `Session` that is about its state as a whole."""

    _known: SessionLink
    _structure: Structure
    _packer: Packer
    _scale: KnownLossScale
    loads_as_one: bool
    """True while all workers make the same loads, in one order: the first one of each counts. Adapters set it."""
    _fork: Fork | None

    @property
    def _link(self) -> SessionLink:
        return self._known

    def pull(
        self,
        *,
        average: bool = False,
        rows: Mapping[str, npt.ArrayLike] | None = None,
        dtype: npt.DTypeLike = np.float32,
        timeout: float | None = None,
    ) -> Tree:
        """Return the current parameters, nested as at creation; or some rows of tables, as a dict of `Rows`.

        For a session that was found by its id that is a flat dict of names; see `Client.session`. A table whose rows
        are named by ids comes as `Rows` of all rows that there are, by rising id.

        Args:
            average: their moving average instead, of a session created with `parameter_average_decay`.
            rows: the indices of rows by the names of tables, in any order: these rows alone come, in that order.
            dtype: the dtype of the returned arrays.
            timeout: seconds.

        Raises:
            InvalidRequestError: the session keeps no average, or the rows are wrong.
            UnsupportedFeatureError: rows of the average.
            StepMismatchError: the shards stayed at different steps.
            StepwireError: the session is gone, not loaded, or was stepping all the time until the timeout.
        """
        wire_dtype = dtype_named(dtype, "dtype")
        layout = self._packer.layout
        if rows is None and not average and hashed_tables(layout) and len(layout.tables) == len(layout.tensors):
            return self._structure.restored(whole_tables(self._link, wire_dtype, self._link.deadline(timeout)))
        if rows is not None:
            if average:
                raise UnsupportedFeatureError(
                    "average: rows come without the average of their parameters; pull the whole average, of tables of "
                    "the meaning 'global'",
                    metadata={"field": "average", "feature": "sparse_rows"},
                )
            return read_rows(self._link, rows, wire_dtype, self._link.deadline(timeout))[0]
        named, targets = self._packer.allocate_named(wire_dtype)
        self._link.pull({_AVERAGE if average else _PARAM: targets}, wire_dtype, self._link.deadline(timeout))
        return self._structure.restored(named)

    def row_ids(self, table: str, *, timeout: float | None = None) -> npt.NDArray[np.uint64]:
        """Return the ids of the rows that a table has now, `(n,) uint64`, rising.

        `pull(rows={table: ids[low:high]})` then has their values, some at a time, for a table that is larger than the
        memory of the client. A row that is evicted meanwhile comes with its first values.

        Args:
            table: the name of the table.
            timeout: seconds.

        Raises:
            InvalidRequestError: it is no table whose rows are named by ids.
            StepwireError: as `pull`.
        """
        if table not in (hashed := hashed_tables(self._packer.layout)):
            raise InvalidRequestError.of("table", f"{table!r} has no ids; tables that have: {sorted(hashed)}")
        return row_ids(self._link, {table: hashed[table]}, self._link.deadline(timeout))[0][table]

    def load_rows(self, rows: Mapping[str, Rows], *, timeout: float | None = None) -> None:
        """Replace the parameters of some rows of tables; all other rows, moments and step counts stay.

        A new id gets a row, with first moments. So a table that is larger than the client is loaded some rows at a
        time. Each call is a load, as that of `load`.

        Args:
            rows: the rows by the names of tables, each row once.
            timeout: seconds.

        Raises:
            InvalidRequestError: a name is no table's, a row comes often, or the rows do not fit; nothing was changed.
            ResourceExhaustedError: a table has no room for new ids; nothing was changed.
            StepwireError: as `load`.
        """
        loaded = checked_rows(rows, self._packer.layout)
        with self._link.lock:
            self._link.load(Load({}, rows=loaded), self._link.deadline(timeout))

    def state(self, *, timeout: float | None = None) -> Snapshot:
        """Return everything: parameters, moments and step counts, all as of one step.

        Raises:
            StepwireError: as `pull`.
        """
        arrays = {slot: self._packer.allocate_named(FLOAT32) for slot in self._known.description.slots}
        targets = {slot: flat for slot, (_, flat) in arrays.items()}
        header = self._link.pull(targets, FLOAT32, self._link.deadline(timeout))
        return snapshot_of(header, {slot: named for slot, (named, _) in arrays.items()}, self._known.description)

    def shared_gradients(self, *, timeout: float | None = None) -> Tree:
        """Return writable arrays in the memory that the server reads gradients from, attaching first if need be.

        `step` sends these arrays as they are, without a copy. The arrays start as zeros, and may be written between
        steps. After a broken connection they are ordinary arrays, which a step copies: ask again for new ones.

        Over `cuda_ipc` they are views of device memory: see `stepwire.transports.cuda.views.DeviceView`.

        Args:
            timeout: seconds.

        Raises:
            UnsupportedFeatureError: the session is not attached over shared memory, or is sharded; the message says
                why.
            StepwireError: as `attach`.
        """
        with self._link.lock:
            return self._structure.restored(self._link.shared(self._link.deadline(timeout)).gradients())

    def shared_parameters(self, *, private: bool = False, timeout: float | None = None) -> Tree:
        """Return read-only arrays that show the parameters in the server's memory, attaching first if need be.

        Each step changes them in place, also while it is under way; given as `out` they make its reply free of copies.
        A load shows in them after the next step that goes over shared memory, at the latest. So does a step with other
        dtypes, `overlap` or `reply="changed"`. After a broken connection they may be stale: use the arrays that `step`
        returns, or ask again.

        Over `cuda_ipc` they are views of device memory, as gradients are.

        Args:
            private: arrays that may be written. Writes are this process's own, and hide the server's values, page by
                page, until `forget_writes`; `load` makes them the server's too.
            timeout: seconds.

        Raises:
            UnsupportedFeatureError: the session is not attached over shared memory, or is sharded; the message says
                why.
            StepwireError: as `attach`.
        """
        with self._link.lock:
            shared = self._link.shared(self._link.deadline(timeout))
            return self._structure.restored(shared.parameters(private=private))

    def forget_writes(self) -> None:
        """Show the server's parameters in all arrays of `shared_parameters`, also in private ones that were written."""
        with self._link.lock:
            self._link.forget_writes()

    def save_checkpoint(self, name: str, *, timeout: float | None = None) -> CheckpointInfo:
        """Have the server keep the present state under a name, for sessions with durability.

        The name stays until `delete_checkpoint`; nothing is ever overwritten. Saving again without a step or a load in
        between returns the same checkpoint.

        Args:
            name: 1 to 64 characters of A-Z, a-z, 0-9, ".", "_", "-", without a dot or "auto-" at the beginning.
            timeout: seconds.

        Raises:
            InvalidRequestError: the name is none, or another checkpoint has it.
            UnsupportedFeatureError: the session is in memory alone.
            DataLossError: the server's disk failed.
            StepwireError: as `pull`.
        """
        with (link := self._link).lock:
            return calls.save(link, checked_text(name, "name"), link.deadline(timeout))

    def checkpoints(self, *, timeout: float | None = None) -> tuple[CheckpointInfo, ...]:
        """Return the checkpoints of the session, ordered by name: those with names, the server's own, damaged ones.

        Of shards, one that is not the same on all of them counts as damaged.

        Raises:
            UnsupportedFeatureError: the session is in memory alone.
            StepwireError: as `info`.
        """
        return calls.list_all(self._link, self._link.deadline(timeout))

    def verify_checkpoint(self, name: str, *, timeout: float | None = None) -> CheckpointInfo:
        """Have the server read all of a checkpoint.

        Raises:
            InvalidRequestError: no checkpoint has the name.
            DataLossError: it is damaged; the message names the first bad array.
            StepwireError: as `checkpoints`.
        """
        return calls.verify(self._link, checked_text(name, "name"), self._link.deadline(timeout))

    def delete_checkpoint(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a checkpoint. The newest state stays under another name: the session comes back from it.

        Raises:
            InvalidRequestError: no checkpoint has the name, or it is the newest one of the server's own.
            StepwireError: as `checkpoints`.
        """
        calls.delete(self._link, checked_text(name, "name"), self._link.deadline(timeout))

    def rollback(self, step: int | None = None, *, checkpoint: str | None = None, timeout: float | None = None) -> Tree:
        """Replace the whole state by an earlier one of this session, and return its parameters.

        It is a load whose values the server has. So step numbers never go back: the next step is
        `applied_step + 1`, from the arrays, update counts and loss scale of the earlier state. Where gradients are
        accumulated, `applied_step` rises to the next number at the same place of an accumulation. A step that failed
        before, and everything carried from step to step, is forgotten.

        Args:
            step: the number of a step, whose state a checkpoint has. With durability "journal" the server makes any
                step again that its log still has. A session of several shards goes back to checkpoints alone.
            checkpoint: the name of a checkpoint, in the place of a step.
            timeout: seconds.

        Returns:
            The parameters, nested as at creation, in float32.

        Raises:
            InvalidRequestError: there is no such state; the message lists what is reachable.
            UnsupportedFeatureError: the session is in memory alone.
            ResourceExhaustedError: no room beside the state, which a load needs too, and a step made again twice.
            DataLossError: the checkpoint is damaged, or the server's disk failed.
            StepwireError: as `Session.load_state`. After a failure on some shards, roll back again.
        """
        origin = _origin(step, checkpoint)
        if origin == StateOrigin(None, None):
            raise InvalidRequestError.of(
                "checkpoint", "name the step or the checkpoint to go back to; see `checkpoints`"
            )
        named, targets = self._packer.allocate_named(FLOAT32)
        with (link := self._link).lock:
            deadline = link.deadline(timeout)
            calls.check_reachable(link, origin, deadline)
            link.load(Load({}, origin=origin), deadline)
            header = link.pull({_PARAM: targets}, FLOAT32, deadline)
            if header.HasField("loss_scale"):
                self._scale.loaded(header.loss_scale.scale, link.last_result)
        return self._structure.restored(named)

    def fork(
        self,
        *,
        checkpoint: str | None = None,
        step: int | None = None,
        label: str | None = None,
        durability: Durability | DurabilityLevel | None = None,
        lease_seconds: float | None = None,
        device: str | None = None,
        keep: bool = False,
        request_id: str | None = None,
        error_feedback: bool = False,
        timeout: float | None = None,
    ) -> Self:
        """Create another session that begins with a state of this one; from then on each goes its own way.

        Tensors, optimizer and the treatment of gradients are the same. A durable fork shares the arrays on the disk.

        Args:
            checkpoint: the name of the checkpoint to begin with; without it and `step`, the present state.
            step: the number of a step, as for `rollback`.
            label: text for listings; default this session's.
            durability: as for `Client.create_session`; default this session's.
            lease_seconds: the life of the fork without use; default this session's.
            device: the device of the fork's state; default as this session asked.
            keep: as for `Client.create_session`.
            request_id: makes the call repeatable by another process, and keeps the fork; default random.
            error_feedback: as for `Client.create_session`; starts with nothing kept.
            timeout: seconds for all of it.

        Raises:
            InvalidRequestError: there is no such state, or an argument is wrong.
            UnsupportedFeatureError: this session is in memory alone, or is one shard of several.
            ResourceExhaustedError: no memory, or too many sessions.
            StepMismatchError: the shards of the fork would begin at different steps.
            SessionMovedError: the fork that this request has made before lives on elsewhere; `Client.session` finds it.
            StepwireError: as `checkpoints`.
        """
        if self._fork is None:
            raise UnsupportedFeatureError(
                "fork: one shard is no session of its own; fork the whole",
                metadata={"field": "fork", "feature": "fork"},
            )
        options = ForkOptions(
            origin=_origin(step, checkpoint),
            label=label,
            durability=durability,
            lease_seconds=lease_seconds,
            device=device,
            request_id=request_id,
            keep=keep,
            error_feedback=error_feedback,
            timeout=timeout,
        )
        with (link := self._link).lock:
            while True:
                if options.origin.checkpoint is not None:
                    calls.check_everywhere(link, options.origin, link.deadline(timeout))
                elif options.origin.step is None:
                    link.make_sure(link.deadline(timeout))
                try:
                    return cast(Self, self._fork(link.description.session_id, self._structure, options))
                except SessionMovedError:
                    former = link.description.session_id
                    link.info(link.deadline(timeout))  # this follows it
                    if link.description.session_id == former:  # the fork that this request made has moved
                        raise


def _origin(step: int | None, checkpoint: str | None) -> StateOrigin:
    """Return the state that the arguments name.

    Raises:
        InvalidRequestError: they name two, or an argument is wrong.
    """
    if step is not None and checkpoint is not None:
        raise InvalidRequestError.of("step", "a step and a checkpoint are two states; name one of them")
    if step is not None and not 0 <= (step := whole_number(step, "step")) < 2**53:
        raise InvalidRequestError.of("step", f"{step} is not in [0, 2^53)")
    return StateOrigin(None if checkpoint is None else checked_text(checkpoint, "checkpoint"), step)
