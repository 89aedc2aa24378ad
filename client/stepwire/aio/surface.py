"""The asynchronous client: generated from the synchronous one by `make aio`; do not edit.

See `stepwire.aio`. Every method awaits the one of the same name of `Client` or `Session`, in a thread.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.aio.base import ClientBase, SessionBase
from stepwire.arrays.packing import Arrays
from stepwire.arrays.rows import Rows
from stepwire.arrays.trees import Tree
from stepwire.client import RowSemantics, StatePrecision, Telemetry, Worker
from stepwire.connecting import connect as connect_client
from stepwire.connection.retry import Retry
from stepwire.connection.security import TLS
from stepwire.links.progress import OnProgress
from stepwire.loggers import Logger
from stepwire.optimizers import Optimizer
from stepwire.optimizers.aggregation import Aggregation
from stepwire.optimizers.durability import Durability, DurabilityLevel
from stepwire.optimizers.gradient_treatment import ClipFormula, LossScaling, MissingGradient, NonFinite
from stepwire.optimizers.schedules import Schedule
from stepwire.results import (
    CheckpointInfo,
    ServerInfo,
    SessionConfig,
    SessionInfo,
    SessionStatistics,
    Snapshot,
    TransportChoice,
)
from stepwire.statistics import Statistics
from stepwire.step_result import PastStep, StepResult
from stepwire.steps.build import Overrides, Reply
from stepwire.steps.notices import OnReady

__all__ = ["AsyncClient", "AsyncSession", "connect"]


class AsyncSession(SessionBase):
    """One optimizer on the server, for asyncio; see `stepwire.Session`. Made by `AsyncClient`.

    Calls are taken one after another in the order in which they are made, in a thread that is the session's own. A call
    whose await is cancelled before its turn is never made; one that is under way goes on, see `settled`. As an
    asynchronous context manager it ends the session on the server.
    """

    @property
    def session_id(self) -> str:
        """The session's id, the right to use the session; of shards in order, joined by commas. Reading it keeps it."""
        return self.blocking.session_id

    @property
    def own_id(self) -> str:
        """The session's id for records of this process alone: reading it keeps nothing."""
        return self.blocking.own_id

    @property
    def applied_step(self) -> int:
        """The last step known to be applied; the next `step` is the one after it."""
        return self.blocking.applied_step

    @property
    def worker(self) -> int | None:
        """The index of the worker that this client steps as; None before the first step as `"any"`."""
        return self.blocking.worker

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last step; None before the first."""
        return self.blocking.last_result

    @property
    def transport(self) -> TransportChoice | None:
        """The transport in use, the least one of several shards; None before the first stream is attached."""
        return self.blocking.transport

    @property
    def loss_scale(self) -> float | None:
        """The factor for the next loss, in a session that scales losses by itself; else None."""
        return self.blocking.loss_scale

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return self.blocking.shapes

    @property
    def slots(self) -> tuple[str, ...]:
        """The state arrays of each tensor, by the names that `state` has: `"param"`, `"exp_avg"` and so on."""
        return self.blocking.slots

    @property
    def config(self) -> SessionConfig:
        """The config of the session's creation; useful in a client that did not create it."""
        return self.blocking.config

    async def statistics(self) -> SessionStatistics:
        """Return the numbers that this client knows of the session; nothing is sent."""
        return await self._worker.run(functools.partial(self.blocking.statistics))

    async def history(self, n: int | None = None) -> tuple[PastStep, ...]:
        """Return the last steps that this object made, oldest first: norms, learning rates, times.

        It remembers 1,024 steps; a step costs it two readings of the clock and an addition to a ring.

        Args:
            n: the most steps; None for all that are remembered.

        Raises:
            InvalidRequestError: `n` is no number of steps.
        """
        return await self._worker.run(functools.partial(self.blocking.history, n))

    async def log_to(self, logger: Logger | None) -> None:
        """Have a function told of each step from now on, None for nobody; see `stepwire.loggers`.

        Raises:
            InvalidRequestError: it is no function.
        """
        await self._worker.run(functools.partial(self.blocking.log_to, logger))

    async def step(
        self,
        gradients: Arrays,
        *,
        lr: float | None = None,
        hyperparameters: Overrides | None = None,
        loss_scale: float | None = None,
        gradient_dtype: npt.DTypeLike | None = None,
        reply_dtype: npt.DTypeLike | None = None,
        reply: Reply = "parameters",
        reply_first: Sequence[str] = (),
        on_tensor: OnReady | None = None,
        overlap: bool = False,
        weight: float | None = None,
        out: Tree | None = None,
        timeout: float | None = None,
    ) -> Tree:
        """Apply one optimizer step, exactly once, and return the new parameters.

        The client mends lost connections, and repeats the step by its number until `timeout`. The server applies it
        once however often it arrives. After an error, the same gradients with the same options are the same step: call
        again, and the step is applied, or its first reply returned. Other gradients are the next step, once the client
        has learnt whether the failed one was applied.

        Args:
            gradients: one array a tensor, in the shapes of creation: float32, bfloat16 or float16; a dict, a list, or a
                tree of them. Frozen tensors need none. With missing_gradient "keep" any may be left out or None, and
                stays as it is. None in the place of a branch leaves out all its tensors.
            lr: the learning rate of this step, for all groups; overrides a schedule.
            hyperparameters: other values for this step: one mapping, or one a group.
            loss_scale: the factor of the gradients; the server divides by it first.
            gradient_dtype: the encoding of the gradients on the wire, "int8" included; default as created.
            reply_dtype: the encoding of the parameters on the wire, and the dtype of the reply; default as created.
            reply: `"parameters"`; `"none"`: no parameters, `pull` them when needed; `"changed"`, for bfloat16 replies:
                the same parameters, but only the changed ones travel, if that is less.
            reply_first: names of tensors, or of branches, whose parameters come back first, in this order.
            on_tensor: a function of the name and the new values of each tensor, called on arrival in another thread
                than the caller's, and again if the reply is repeated. A call of the session from within is refused.
            overlap: the server applies each chunk of the gradient as it arrives instead of all at the end, so that
                receiving and replying overlap. For sessions without clipping by norm and with `non_finite="allow"`. A
                step that fails may then be half applied: repeat it with the same gradients until it succeeds. Nothing
                else is possible before.
            weight: the weight of these gradients in a weighted mean over several workers; default 1.
            out: arrays to write the parameters into instead of new ones, and not over the gradients. Their content is
                undefined after an error. Those of `shared_parameters` stand for that memory as it is after the step.
            timeout: seconds for the step with all its repetitions; default the client's.

        Returns:
            The parameters, nested like `gradients`, or as at creation if tensors are left out; or `out`, if given. With
            reply "none" an empty dict, list or tuple. `last_result` has the telemetry.

        Raises:
            InvalidRequestError: names, shapes, dtypes or values are wrong; nothing was sent or applied.
            NonFiniteGradientError: NaN or Inf under the policy `reject`; nothing was applied.
            FencedError: another client acquired the session's worker.
            SessionNotFoundError: the session is gone; `metadata["last_known_step"]`.
            SessionNotReadyError: a step with `overlap` was broken off half applied, and this is not that step.
            StepMismatchError: the session moved without this client, or took a step that failed; see `attach`, `pull`.
            DataLossError: the server has lost a durable step, or its state.
            NotEnoughWorkersError: too few other workers stepped in time; nothing was applied.
            UnavailableError: no connection within the timeout; call `step` again with the same gradients.
        """
        return await self._worker.step(
            functools.partial(
                self.blocking.step,
                gradients,
                lr=lr,
                hyperparameters=hyperparameters,
                loss_scale=loss_scale,
                gradient_dtype=gradient_dtype,
                reply_dtype=reply_dtype,
                reply=reply,
                reply_first=reply_first,
                on_tensor=on_tensor,
                overlap=overlap,
                weight=weight,
                out=out,
                timeout=timeout,
            )
        )

    async def attach(
        self, *, transport: str | None = None, take_over: bool = False, timeout: float | None = None
    ) -> None:
        """Attach a stream now instead of at the first step. `applied_step` then tells the outcome of one that failed.

        Args:
            transport: a transport of `stepwire.connect`, for this session from now on; None leaves it as it is.
            take_over: acquire the worker from another client that holds it, and fence that client. If it stepped since
                a step of this client failed, `step` refuses those gradients until a pull, a load or another step.
            timeout: seconds.

        Raises:
            FencedError: another client holds the worker, and `take_over` is not set.
            UnsupportedFeatureError: the transport cannot be had.
            StepwireError: as `step`.
        """
        await self._worker.run(
            functools.partial(self.blocking.attach, transport=transport, take_over=take_over, timeout=timeout)
        )

    async def keep(self) -> None:
        """Leave the session on the server, where its lease ends it, when nobody closes it.

        Else a session that was created here ends with its object, its client or the process. `detach`, reading the id,
        and `keep` or `request_id` at the creation keep a session too.
        """
        await self._worker.run(functools.partial(self.blocking.keep))

    async def detach(self) -> None:
        """Close the stream and leave the session on the server: see `keep`. Detaching twice is harmless."""
        await self._worker.run(functools.partial(self.blocking.detach))

    async def load(
        self, parameters: Arrays, *, progress: OnProgress | None = None, timeout: float | None = None
    ) -> None:
        """Replace the parameters; moments and step counts stay.

        A step that failed before is settled first. If only some shards applied it, all of them go on from its number.

        Args:
            parameters: as at creation.
            progress: a function of the bytes that are sent and of all bytes, called in another thread; a repetition
                begins again.
            timeout: seconds.

        Raises:
            InvalidRequestError: names, shapes or dtypes are wrong; nothing was changed.
            StepwireError: as `step`.
        """
        await self._worker.run(functools.partial(self.blocking.load, parameters, progress=progress, timeout=timeout))

    async def load_state(
        self, state: Snapshot, *, progress: OnProgress | None = None, timeout: float | None = None
    ) -> None:
        """Replace everything by a snapshot, of this session or of another one with the same tensors.

        The next step is `state.step + 1`. Step numbers never go back, so to return to an earlier state, load it
        into a new session, or use `rollback`.

        Args:
            state: the snapshot.
            progress: as for `load`.
            timeout: seconds.

        Raises:
            InvalidRequestError: slots, names, shapes or dtypes do not fit; nothing was changed.
            StepMismatchError: the session is beyond `state.step`.
            StepwireError: as `step`.
        """
        await self._worker.run(functools.partial(self.blocking.load_state, state, progress=progress, timeout=timeout))

    async def info(self, *, timeout: float | None = None) -> SessionInfo:
        """Ask the server, or all servers of a sharded session, for the state of the session.

        Raises:
            SessionNotFoundError: the session is gone.
        """
        return await self._worker.run(functools.partial(self.blocking.info, timeout=timeout))

    async def pull(
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
        return await self._worker.run(
            functools.partial(self.blocking.pull, average=average, rows=rows, dtype=dtype, timeout=timeout)
        )

    async def row_ids(self, table: str, *, timeout: float | None = None) -> npt.NDArray[np.uint64]:
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
        return await self._worker.run(functools.partial(self.blocking.row_ids, table, timeout=timeout))

    async def load_rows(self, rows: Mapping[str, Rows], *, timeout: float | None = None) -> None:
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
        await self._worker.run(functools.partial(self.blocking.load_rows, rows, timeout=timeout))

    async def state(self, *, timeout: float | None = None) -> Snapshot:
        """Return everything: parameters, moments and step counts, all as of one step.

        Raises:
            StepwireError: as `pull`.
        """
        return await self._worker.run(functools.partial(self.blocking.state, timeout=timeout))

    async def shared_gradients(self, *, timeout: float | None = None) -> Tree:
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
        return await self._worker.run(functools.partial(self.blocking.shared_gradients, timeout=timeout))

    async def shared_parameters(self, *, private: bool = False, timeout: float | None = None) -> Tree:
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
        return await self._worker.run(
            functools.partial(self.blocking.shared_parameters, private=private, timeout=timeout)
        )

    async def forget_writes(self) -> None:
        """Show the server's parameters in all arrays of `shared_parameters`, also in private ones that were written."""
        await self._worker.run(functools.partial(self.blocking.forget_writes))

    async def save_checkpoint(self, name: str, *, timeout: float | None = None) -> CheckpointInfo:
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
        return await self._worker.run(functools.partial(self.blocking.save_checkpoint, name, timeout=timeout))

    async def checkpoints(self, *, timeout: float | None = None) -> tuple[CheckpointInfo, ...]:
        """Return the checkpoints of the session, ordered by name: those with names, the server's own, damaged ones.

        Of shards, one that is not the same on all of them counts as damaged.

        Raises:
            UnsupportedFeatureError: the session is in memory alone.
            StepwireError: as `info`.
        """
        return await self._worker.run(functools.partial(self.blocking.checkpoints, timeout=timeout))

    async def verify_checkpoint(self, name: str, *, timeout: float | None = None) -> CheckpointInfo:
        """Have the server read all of a checkpoint.

        Raises:
            InvalidRequestError: no checkpoint has the name.
            DataLossError: it is damaged; the message names the first bad array.
            StepwireError: as `checkpoints`.
        """
        return await self._worker.run(functools.partial(self.blocking.verify_checkpoint, name, timeout=timeout))

    async def delete_checkpoint(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a checkpoint. The newest state stays under another name: the session comes back from it.

        Raises:
            InvalidRequestError: no checkpoint has the name, or it is the newest one of the server's own.
            StepwireError: as `checkpoints`.
        """
        await self._worker.run(functools.partial(self.blocking.delete_checkpoint, name, timeout=timeout))

    async def rollback(
        self, step: int | None = None, *, checkpoint: str | None = None, timeout: float | None = None
    ) -> Tree:
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
        return await self._worker.run(
            functools.partial(self.blocking.rollback, step, checkpoint=checkpoint, timeout=timeout)
        )

    async def fork(
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
    ) -> AsyncSession:
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
        return self._adopt(
            AsyncSession(
                await self._worker.create(
                    functools.partial(
                        self.blocking.fork,
                        checkpoint=checkpoint,
                        step=step,
                        label=label,
                        durability=durability,
                        lease_seconds=lease_seconds,
                        device=device,
                        keep=keep,
                        request_id=request_id,
                        error_feedback=error_feedback,
                        timeout=timeout,
                    ),
                    kept=request_id is not None,
                )
            )
        )


class AsyncClient(ClientBase):
    """A connection to one server, or several, for asyncio; see `stepwire.Client`. Made by `stepwire.aio.connect`.

    Its calls are taken one after another in a thread of its own; those of its sessions have theirs. An asynchronous
    context manager; closes twice without complaint.
    """

    @property
    def target(self) -> str:
        """The target of the connection; several targets are joined by commas."""
        return self.blocking.target

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of all connections, in order; sessions are sharded over several."""
        return self.blocking.targets

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Ask the server, or all servers, for their properties.

        Of several servers, the features are those that all serve, and limits are the least. Devices are those of all,
        as `"host:port cuda:0"`.

        Raises:
            UnavailableError: a server cannot be reached.
        """
        return await self._worker.run(functools.partial(self.blocking.info, timeout=timeout))

    async def create_session(
        self,
        parameters: Arrays,
        *,
        optimizer: Optimizer | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        schedule: Schedule | None = None,
        frozen: Sequence[str] = (),
        tables: Mapping[str, RowSemantics] | None = None,
        gradient_dtype: npt.DTypeLike = np.float32,
        error_feedback: bool = False,
        reply_dtype: npt.DTypeLike = np.float32,
        state_precision: StatePrecision = "float32",
        tensor_precision: Mapping[str, StatePrecision] | None = None,
        non_finite: NonFinite | None = None,
        clip_grad_norm: float | None = None,
        clip_formula: ClipFormula | None = None,
        clip_grad_value: float | None = None,
        accumulation_steps: int = 1,
        loss_scaling: LossScaling | None = None,
        missing_gradient: MissingGradient = "reject",
        parameter_average_decay: float | None = None,
        telemetry: Telemetry = "full",
        durability: Durability | DurabilityLevel = "memory",
        aggregation: Aggregation | None = None,
        worker: Worker = 0,
        lease_seconds: float | None = None,
        device: str = "",
        label: str = "",
        keep: bool = False,
        request_id: str | None = None,
        logger: Logger | None = None,
        timeout: float | None = None,
    ) -> AsyncSession:
        """Create an optimizer on the server and load the parameters into it.

        Args:
            parameters: float32, bfloat16 or float16 arrays; masters are float32 on the server. They come in a dict, in
                a list with the names "0", "1", …, or in a tree of dicts, lists and tuples. The names in a tree are
                paths such as "encoder/0/w". `stepwire.Table` in the places of all arrays leaves them to the server.
            optimizer: default `Adam()`.
            groups: mappings, as torch has them. `"params"` names the group's tensors, or branches of them. The other
                keys are the group's own hyper-parameters, its `"schedule"`, its `"clip_grad_norm"` and its
                `"state_precision"`. Tensors in no group form one more, first, with the optimizer's values.
            schedule: of the learning rate, evaluated on the server, for all groups that have none of their own.
            frozen: names of tensors, or of branches, that the server keeps and never steps.
            tables: the meaning of a step for rows, by the names of tensors whose gradients are `Rows`:
                `"torch_sparse"`, `"row_counter"`, `"skipped"`, `"global"`, or with Adagrad `"row_wise"`. See
                `docs/embeddings.md`.
            gradient_dtype: the encoding of gradients on the wire: `"float32"`, `"bfloat16"`, `"float16"`, or `"int8"`:
                blocks of 256 with a common factor, a quarter of the bytes.
            error_feedback: with `"int8"`, keep the encoding error of a gradient on the client, and add it to the next;
                eight bytes a parameter.
            reply_dtype: the encoding of parameters on the wire, and their dtype.
            state_precision: the precision of the optimizer's moments on the server; parameters are always float32. With
                `"bfloat16"` equal moments round alike, and AMSGrad takes steps that are up to a few percent too small.
                With `"int8"`, 256 neighbours share a maximum: beside a second moment a million times larger, one has no
                digits left, and its updates become too small. Keep embeddings, tensors with outliers and tensors whose
                gradients are mostly zero in `"float32"` or `"bfloat16"`, by their group or by `tensor_precision`.
            tensor_precision: the precision of the moments of some tensors, by the names of tensors or of branches, in
                place of their group's or the session's.
            non_finite: the policy for NaN and Inf in a gradient. `"reject"`, the default, refuses the step. `"skip"`,
                the default with loss scaling, uses up its number without an update. `"allow"` applies it.
            clip_grad_norm: bound of the gradient's global norm.
            clip_formula: the formula of clipping by norm: `"torch"` (the default), `"optax"` or `"keras"`.
            clip_grad_value: bound of each gradient element's magnitude.
            accumulation_steps: gradients summed into one update. A sum with NaN or Inf is refused, skipped or applied
                as `non_finite` says of one gradient.
            loss_scaling: dynamic loss scaling by the server; see `Session.loss_scale`.
            missing_gradient: `"keep"`: a step may leave tensors out, which stay as they are; `"reject"`: no step may.
            parameter_average_decay: decay of an exponential moving average of the parameters; see `Session.pull`. In
                float32 the average stays within 6e-8 / (1 − decay) of a parameter, and hardly moves from 0.99999 on.
            telemetry: the measurements in each result: `"full"`, the `"gradient"`'s norms only, or `"none"`. With
                `"none"` norms are 0, and the pass that computes them is left out. Clipping by norm and any `non_finite`
                but "allow" need that pass all the same.
            durability: the steps that survive a loss of the server: `"memory"`, `"checkpoint"` or `"journal"`, or a
                `Durability` with the times of its checkpoints. All but the first need a server with `--data-dir`.
            aggregation: the way that the gradients of several workers meet; None for one worker.
            worker: with aggregation, the index of the worker that this client steps as, or `"any"`. Every worker may
                create the session, with the same `request_id`: the first creates it, the others find it.
            lease_seconds: the life of the session without use; default the server's longest.
            device: the device of the state, by a name of `ServerInfo.devices` such as `"cuda:0"`; empty: the server's
                choice, the device with the most free budget.
            label: text for listings; default the host, the process id and the script, without a `request_id`.
            keep: the session stays on the server, until its lease runs out, when this process ends normally or drops
                its object without closing it. By default the session ends then, unless it has several workers; see
                `Session.keep`.
            request_id: makes a creation repeatable by another process, and keeps the session; default random.
            logger: a function of the step and its scalars, called after each step; see `stepwire.loggers`.
            timeout: seconds for all of it.

        Raises:
            InvalidRequestError: an argument is wrong; the message names it.
            UnsupportedFeatureError: the server does not serve an option, or does not have the device.
            ResourceExhaustedError: no memory, or too many sessions.
            UnavailableError: the server cannot be reached.
        """
        return self._adopt(
            AsyncSession(
                await self._worker.create(
                    functools.partial(
                        self.blocking.create_session,
                        parameters,
                        optimizer=optimizer,
                        groups=groups,
                        schedule=schedule,
                        frozen=frozen,
                        tables=tables,
                        gradient_dtype=gradient_dtype,
                        error_feedback=error_feedback,
                        reply_dtype=reply_dtype,
                        state_precision=state_precision,
                        tensor_precision=tensor_precision,
                        non_finite=non_finite,
                        clip_grad_norm=clip_grad_norm,
                        clip_formula=clip_formula,
                        clip_grad_value=clip_grad_value,
                        accumulation_steps=accumulation_steps,
                        loss_scaling=loss_scaling,
                        missing_gradient=missing_gradient,
                        parameter_average_decay=parameter_average_decay,
                        telemetry=telemetry,
                        durability=durability,
                        aggregation=aggregation,
                        worker=worker,
                        lease_seconds=lease_seconds,
                        device=device,
                        label=label,
                        keep=keep,
                        request_id=request_id,
                        logger=logger,
                        timeout=timeout,
                    ),
                    kept=request_id is not None,
                )
            )
        )

    async def session(
        self,
        session_id: str | Sequence[str],
        *,
        like: Arrays | None = None,
        worker: Worker = 0,
        error_feedback: bool = False,
        logger: Logger | None = None,
        timeout: float | None = None,
    ) -> AsyncSession:
        """Return a session that exists; its first step or load acquires the worker and fences the former holder.

        Args:
            session_id: the session's id; with shards `Session.session_id`, or the ids in it. The servers of a sharded
                session must be those of its creation, in the same order.
            like: parameters, or anything else that nests as they do: the structure for `Session.pull` and for the
                shared arrays. Without it they are a flat dict of names: a server knows names, and no structure.
            worker: as for `create_session`.
            error_feedback: as for `create_session`; starts with nothing kept.
            logger: as for `create_session`.
            timeout: seconds.

        Raises:
            InvalidRequestError: `like` is no container of arrays, or these are not the shards of one model.
            SessionNotFoundError: there is no such session.
            UnavailableError: the server cannot be reached.
        """
        return self._adopt(
            AsyncSession(
                await self._worker.run(
                    functools.partial(
                        self.blocking.session,
                        session_id,
                        like=like,
                        worker=worker,
                        error_feedback=error_feedback,
                        logger=logger,
                        timeout=timeout,
                    )
                )
            )
        )

    async def sessions(self, *, timeout: float | None = None) -> AsyncIterator[SessionInfo]:
        """Yield the server's sessions, ordered by id; several servers one after another, shards singly.

        Raises:
            UnavailableError: the server cannot be reached.
        """
        async for each in self._worker.iterate(functools.partial(self.blocking.sessions, timeout=timeout)):
            yield each

    async def statistics(self, *, interval: float = 1.0, timeout: float | None = None) -> AsyncIterator[Statistics]:
        """Yield a snapshot of the server and of its sessions in memory at once, and one per interval, for ever.

        Args:
            interval: the time between two snapshots in seconds, in [0.1, 3600].
            timeout: the longest wait for a snapshot beyond the interval, in seconds.

        Raises:
            InvalidRequestError: the interval is out of range.
            ResourceExhaustedError: as many callers watch the server as may.
            UnavailableError: the server cannot be reached, or has ended.
        """
        async for each in self._worker.iterate(
            functools.partial(self.blocking.statistics, interval=interval, timeout=timeout)
        ):
            yield each


def connect(
    target: str | Sequence[str] | None = None,
    *,
    transport: str = "auto",
    channels: int = 1,
    timeout: float = 60.0,
    window_bytes: int = 0,
    tls: bool | TLS | None = None,
    token: str | None = None,
    trace_one_in: int = 0,
    retry: Retry | None = None,
) -> AsyncClient:
    """Open a client; it connects with its first call.

    The config file is the one that STEPWIRE_CLIENT_CONFIG names, or `~/.config/stepwire/config.toml`. Its certificates
    and its token are for the target in it alone.

    Args:
        target: `host:port`, or `unix:/path`; or several of them: then each session is sharded over all these servers,
            which step it together. A model that is too small to be cut lies on the first ones. Three kinds of target
            stand for shards, which the client follows wherever they move: `directory:/path`, a folder in which servers
            announce themselves (`stepwire serve --directory`); `dns:///name:port`, a name with several addresses, whose
            servers tell their shards (`stepwire serve --shard`); and `ray://auto`, or `ray://host:10001`, a Ray cluster
            (`stepwire cluster up`, extra `ray`). The names of shards give their order. `?shards=N` at the end waits
            until there are so many, and `/SHARD` is one of them. None: that of STEPWIRE_TARGET, else of the config
            file, else `localhost:50051`.
        transport: the way of gradients and parameters: `"auto"`, the best that works (see `Session.transport`), or one
            alone: `"tcp"`, `"uds"` (a Unix socket), `"shm"` (memory shared on one host), `"packets"` (that memory, and
            messages without gRPC), `"cuda_ipc"` (memory shared on one GPU). The environment variable
            STEPWIRE_TRANSPORT, or else the config file, replaces "auto".
        channels: connections to each target; with more than one, sessions are sharded over them as over several
            servers.
        timeout: default seconds of a call with all its repetitions.
        window_bytes: the most bytes of steps that a session with durability `"checkpoint"` keeps, on each server, to
            send them again by their numbers after a crash: about the bytes of the gradients since the last checkpoint.
            Where a lost step is not kept, `step` raises `StateLossError`.
        tls: encrypt the connection: True with the authorities that everybody trusts, or `TLS` with files. None: as the
            environment variables STEPWIRE_CA (a file, or "system"), STEPWIRE_CERT and STEPWIRE_CERT_KEY say, or else
            the config file.
        token: the token to show the server. None: that of STEPWIRE_TOKEN, or in the file that STEPWIRE_TOKEN_FILE
            names, or else the config file. A token never leaves in plaintext, but to this host.
        trace_one_in: trace one step in so many of each session, and steps that are slower than 99 % of those before,
            by OpenTelemetry (the extra `otel`); 0 for no traces. The variables OTEL_… choose the exporter.
        retry: the pauses between repetitions; tests pass their own clock.

    Raises:
        InvalidRequestError: the timeout or `channels` is not positive, `window_bytes` is negative, or there is no such
            target or transport, or the token would leave in plaintext, or the config file is wrong.
        UnavailableError: the directory names no shard yet; or a name, or a Ray cluster, tells no shards within the
            timeout.
        UnsupportedFeatureError: traces are asked for, and OpenTelemetry is not installed; or Ray is not.
    """
    return AsyncClient(
        connect_client(
            target,
            transport=transport,
            channels=channels,
            timeout=timeout,
            window_bytes=window_bytes,
            tls=tls,
            token=token,
            trace_one_in=trace_one_in,
            retry=retry,
        )
    )
