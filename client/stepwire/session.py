"""The user's surface of one session: steps, state, shared memory and the end, over whatever link there is."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy.typing as npt

from stepwire.arrays.packing import Arrays
from stepwire.arrays.trees import Structure, Tree, flattened
from stepwire.connection.config_file import read_config_file
from stepwire.connection.errands import by_errands
from stepwire.errors import InvalidRequestError
from stepwire.links.link import Load, SessionLink
from stepwire.links.observed import MOST_PAST_STEPS, ObservedSteps
from stepwire.links.ownership import Ownership
from stepwire.links.progress import LoadProgress, OnProgress
from stepwire.links.snapshots import load_of
from stepwire.links.stepping import SessionSteps
from stepwire.loggers import Logger
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.results import SessionConfig, SessionInfo, SessionStatistics, Snapshot, TransportChoice
from stepwire.session_state import Fork, StateCalls
from stepwire.step_result import PastStep, StepResult
from stepwire.steps.build import Overrides, Reply, StepBuilder, StepOptions
from stepwire.steps.loss_scale import KnownLossScale
from stepwire.steps.notices import OnReady
from stepwire.transports.available import asked_transport
from stepwire.wire.dtypes import FLOAT32

__all__ = ["Session"]

_PARAM = "param"


@by_errands(but=["history", "keep", "log_to", "step", "apply", "step_async", "statistics"], lasting=["close"])
class Session(StateCalls):
    """One optimizer on the server. Made by `Client.create_session` or `Client.session`.

    Thread-safe; steps are applied one at a time. As a context manager it ends the session on the server; `detach`
    leaves it there for another client, or for later.

    A client of several targets makes sharded sessions, which give the same parameters, bit for bit. A load that fails
    may have been committed on some servers: load again before the next step. A step that fails may have been applied
    on some servers: the same gradients again finish it, and `load_state` replaces it.
    """

    def __init__(
        self,
        link: SessionLink,
        structure: Structure,
        ownership: Ownership | None = None,
        fork: Fork | None = None,
        observed: ObservedSteps | None = None,
    ) -> None:
        """Use a link to a session.

        Args:
            link: the link.
            structure: the structure of parameters that no arrays of the user's define otherwise.
            ownership: the end of the session when nobody closes it; None for a session that stays.
            fork: makes forks; None for a session that has none, such as a shard.
            observed: makes the steps, and shows them to observers; None for no observer.
        """
        self._known, self.loads_as_one = link, False
        self._fork = fork
        self._observed = observed or ObservedSteps(link)
        self._ownership = ownership or Ownership(link, kept=True)
        self._structure = structure
        self._packer = link.description.packer
        self._builder = StepBuilder(link.description, link.carry)
        self._steps = SessionSteps(link, self._builder, self._observed, structure)
        self._scale = KnownLossScale(link.description.message)

    @property
    def session_id(self) -> str:
        """The session's id, the right to use the session; of shards in order, joined by commas. Reading it keeps it."""
        self.keep()
        return self.own_id

    @property
    def own_id(self) -> str:
        """The session's id for records of this process alone: reading it keeps nothing."""
        return self._known.description.session_id

    @property
    def _link(self) -> SessionLink:
        self._builder.check()
        return self._known

    @property
    def applied_step(self) -> int:
        """The last step known to be applied; the next `step` is the one after it."""
        return self._known.applied_step

    @property
    def worker(self) -> int | None:
        """The index of the worker that this client steps as; None before the first step as `"any"`."""
        return self._known.worker

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last step; None before the first."""
        last = self._known.last_result
        return None if last is None else StepResult.from_wire(last)

    @property
    def transport(self) -> TransportChoice | None:
        """The transport in use, the least one of several shards; None before the first stream is attached."""
        return self._known.transport

    @property
    def loss_scale(self) -> float | None:
        """The factor for the next loss, in a session that scales losses by itself; else None."""
        return self._scale.after(self._known.last_result)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {tensor.spec.name: tensor.spec.shape for tensor in self._packer.layout.tensors}

    @property
    def slots(self) -> tuple[str, ...]:
        """The state arrays of each tensor, by the names that `state` has: `"param"`, `"exp_avg"` and so on."""
        return self._known.description.slots

    @property
    def config(self) -> SessionConfig:
        """The config of the session's creation; useful in a client that did not create it."""
        return SessionConfig.from_wire(self._known.description.message.config)

    @property
    def shards(self) -> tuple[Session, ...]:
        """The sessions of the shards, for their own `info`, `transport` and `last_result`; one without sharding."""
        return tuple(Session(shard, Structure(), self._ownership) for shard in self._known.shards)

    def statistics(self) -> SessionStatistics:
        """Return the numbers that this client knows of the session; nothing is sent."""
        return self._ownership.statistics(self._known)

    def history(self, n: int | None = None) -> tuple[PastStep, ...]:
        """Return the last steps that this object made, oldest first: norms, learning rates, times.

        It remembers 1,024 steps; a step costs it two readings of the clock and an addition to a ring.

        Args:
            n: the most steps; None for all that are remembered.

        Raises:
            InvalidRequestError: `n` is no number of steps.
        """
        if n is not None and whole_number(n, "n") < 0:
            raise InvalidRequestError.of("n", f"{n} is negative")
        return self._observed.history(MOST_PAST_STEPS if n is None else n)

    def log_to(self, logger: Logger | None) -> None:
        """Have a function told of each step from now on, None for nobody; see `stepwire.loggers`.

        Raises:
            InvalidRequestError: it is no function.
        """
        self._observed.log_to(logger)

    def step(
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
        if reply == "parameters" and not (
            reply_first
            or overlap
            or lr is not None
            or hyperparameters is not None
            or loss_scale is not None
            or (gradient_dtype is not None and gradient_dtype is not self._steps.gradient_dtype)
            or (reply_dtype is not None and reply_dtype is not self._steps.reply_dtype)
            or on_tensor is not None
            or weight is not None
        ):
            return self._steps.make(gradients, out, None, timeout)
        options = StepOptions(
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
            out=cast(Any, out),  # a tree is flattened before it is built into a call
        )
        return self.apply(gradients, options, timeout)

    def apply(self, gradients: Arrays, options: StepOptions, timeout: float | None = None) -> Tree:
        """Apply a step whose options are a record; see `step`."""
        return self._steps.make(gradients, options.out, options, timeout)

    def step_async(
        self, gradients: Arrays, *, steps_in_flight: int = 2, timeout: float | None = None, **options: Any
    ) -> Future[Tree]:
        """Apply a step in the background, so that the next batch can be prepared meanwhile.

        Steps are applied in the order of the calls. The gradients, and `out`, must not change until the future is done.
        A step that fails cancels those behind it: all that were handed in before its error was read.

        Args:
            gradients: as for `step`.
            steps_in_flight: the most steps under way or waiting; this call waits for a vacancy. Fixed by the first
                call.
            timeout: seconds for the step itself, without the time that it waits for others.
            options: the other arguments of `step`.

        Returns:
            A future of the result, or the error, of `step`.

        Raises:
            InvalidRequestError: `steps_in_flight` is not a positive integer.
            TypeError: an option that `step` does not have.
        """
        self._builder.check()
        chosen = StepOptions(**options)
        background = self._ownership.in_background(steps_in_flight)
        return background.submit(lambda: self.apply(gradients, chosen, timeout), chosen.feed)

    def attach(self, *, transport: str | None = None, take_over: bool = False, timeout: float | None = None) -> None:
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
        asked = None if transport is None else asked_transport(transport, file=read_config_file())
        with self._link.lock:
            self._link.attach(self._link.deadline(timeout), transport=asked, take_over=take_over)

    def keep(self) -> None:
        """Leave the session on the server, where its lease ends it, when nobody closes it.

        Else a session that was created here ends with its object, its client or the process. `detach`, reading the id,
        and `keep` or `request_id` at the creation keep a session too.
        """
        self._ownership.keep()

    def detach(self) -> None:
        """Close the stream and leave the session on the server: see `keep`. Detaching twice is harmless."""
        self._ownership.detach(self._known, self._builder.check)

    def load(self, parameters: Arrays, *, progress: OnProgress | None = None, timeout: float | None = None) -> None:
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
        named = flattened(parameters, "parameters").named
        with self._link.lock:
            load = self._told(Load({_PARAM: self._packer.ordered(named, "parameters")}), progress)
            self._link.load(load, self._link.deadline(timeout))

    def load_state(self, state: Snapshot, *, progress: OnProgress | None = None, timeout: float | None = None) -> None:
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
        load = self._told(load_of(state, self._known.description), progress)
        with self._link.lock:
            self._link.load(load, self._link.deadline(timeout))
            if state.loss_scale is not None:
                self._scale.loaded(state.loss_scale[0], self._known.last_result)

    def _told(self, load: Load, progress: OnProgress | None) -> Load:
        total_bytes = len(load.sources) * self._packer.layout.size * FLOAT32.itemsize
        told = None if progress is None else LoadProgress(progress, total_bytes)
        return load._replace(progress=told, as_one=self.loads_as_one)

    def info(self, *, timeout: float | None = None) -> SessionInfo:
        """Ask the server, or all servers of a sharded session, for the state of the session.

        Raises:
            SessionNotFoundError: the session is gone.
        """
        return self._link.info(self._link.deadline(timeout))

    def close(self) -> None:
        """End the session on the server and free its memory there. Closing twice is harmless.

        A server that cannot be reached ends it when its lease runs out.
        """
        self._ownership.close(self._known, self._builder.check)

    def __enter__(self) -> Session:
        """Use the session for a block and end it after."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()
