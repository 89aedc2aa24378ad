"""An optimizer that is one of several workers on one session: its options, its loads, and its end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final

from stepwire.errors import InvalidRequestError, SessionNotFoundError, StepwireError, UnsupportedFeatureError
from stepwire.optimizers.aggregation import Aggregation
from stepwire.session import Session
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Arrays, Parameters

__all__ = [
    "WorkerLoads",
    "aggregation_of",
    "leave",
    "refuse_among_workers",
    "refuse_options_among_workers",
    "with_job",
]

_LAST_WAITS_SECONDS: Final = (0.01, 0.02, 0.05, 0.1, 0.2)
"""The waits of a worker that ends, for others that end at the same moment."""

_REFUSED: Final = {
    "shared_views": "the server steps that memory for all workers, so a model would change while it computes",
    "send_in_backward": "the few uploads that a server receives at a time would wait for backward passes",
    "light_state_dict": "a worker joins by its job and its index; a handle has neither",
}


def aggregation_of(options: RemoteOptions) -> Aggregation | None:
    """Return the aggregation that the options ask for; None for one worker.

    Raises:
        InvalidRequestError: the options contradict one another, or one is missing.
        UnsupportedFeatureError: an option is not for several workers.
    """
    if options.workers is not None and options.aggregation is not None:
        raise InvalidRequestError.of(
            "workers", "it is beside aggregation=, which has the number; leave one of them out"
        )
    made = options.aggregation if options.workers is None else Aggregation(workers=options.workers)
    if made is None and options.session is None:
        for name in ("worker", "job"):
            if getattr(options, name) is not None:
                raise InvalidRequestError.of(name, "it is for several workers; give workers= too, or leave it out")
    elif made is not None:
        if options.worker is None:
            raise InvalidRequestError.of("worker", 'it is missing; give the index of this process, or "any"')
        if options.session is None and not options.job:
            raise InvalidRequestError.of("job", "it is missing; give all workers of one model the same name")
        refuse_options_among_workers(options)
    return made


def refuse_options_among_workers(options: RemoteOptions) -> None:
    """Refuse options that are not for several workers.

    Raises:
        UnsupportedFeatureError: there is one; the message has the reason.
    """
    for name, reason in _REFUSED.items():
        if getattr(options, name):
            raise _unsupported(name, reason)


def refuse_among_workers(session: Session, what: str, reason: str) -> None:
    """Refuse a use of an optimizer whose session has several workers.

    Raises:
        UnsupportedFeatureError: it has.
    """
    if session.config.aggregation is not None:
        raise _unsupported(what, reason)


def _unsupported(what: str, reason: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{what}: not with several workers: {reason}", metadata={"field": what, "feature": "torch_workers"}
    )


class WorkerLoads:
    """The loads of one worker among several. Of the loads of one number the first counts, whichever worker sends it.

    All workers of a script make the same loads: a checkpoint at the start, or a clamp after each step. So the worker
    counts its own. A load whose number the session has already is another worker's, and its effect is pulled instead.
    """

    def __init__(self, session: Session, parameters: Parameters, timeout: float) -> None:
        """Begin with the load of the session's creation, whatever the session has by now.

        Args:
            session: the session.
            parameters: the model's parameters.
            timeout: the time limit of a call, in seconds.
        """
        self._session = session
        self._parameters = parameters
        self._timeout = timeout
        self._number = 1
        self._has_stepped = False

    @property
    def joins_late(self) -> bool:
        """The job has stepped, and this worker has not."""
        return self._session.applied_step > 0 and not self._has_stepped

    def stepped(self) -> None:
        """Note a step: this worker knows the loads of the others up to it."""
        self._number = self._session.statistics().applied_load
        self._has_stepped = True

    def load(self, send: Callable[[], None], *, state: bool) -> None:
        """Make the next load of this worker, and adopt the parameters that the session has after it.

        Args:
            send: sends the load.
            state: the load has more than the parameters.

        Raises:
            InvalidRequestError: the others have stepped, and this worker has just joined them.
            StepwireError: as `Session.load`, `Session.pull`.
        """
        pulled = self._pulled()
        if self._session.statistics().applied_load <= self._number:
            if self.joins_late:
                self._refuse_newcomer(pulled, state=state)
            else:
                self._send_as_one(send)
                pulled = self._pulled()
        self._parameters.adopt(pulled)
        self._number += 1

    def _send_as_one(self, send: Callable[[], None]) -> None:
        self._session.loads_as_one = True
        try:
            send()
        finally:
            self._session.loads_as_one = False

    def join(self) -> None:
        """Acquire the place of this worker, so that its old self steps no more, and adopt the parameters.

        Raises:
            StepwireError: as `Session.attach`, `Session.pull`.
        """
        self._session.attach(timeout=self._timeout)
        self.adopt()

    def adopt(self) -> None:
        """Write the session's parameters into the model.

        Raises:
            StepwireError: as `Session.pull`.
        """
        self._parameters.adopt(self._pulled())

    def _pulled(self) -> Arrays:
        pulled: Any = self._session.pull(timeout=self._timeout)
        return pulled  # type: ignore[no-any-return]

    def _refuse_newcomer(self, pulled: Arrays, *, state: bool) -> None:
        """Refuse a load by a worker that has just joined a job under way, unless it would change no value."""
        own = self._parameters.fetch()
        same = all(pulled[name].astype(values.dtype).tobytes() == values.tobytes() for name, values in own.items())
        if same and not state:
            return
        self._parameters.adopt(pulled)
        raise InvalidRequestError.of(
            "load",
            f"the job is at step {self._session.applied_step}, and this worker has just joined it: its load would take "
            "all workers back. The model has the job's parameters; load a checkpoint into the model and the optimizer "
            "only where optimizer.applied_step is 0",
        )


def leave(session: Session, *, keep: bool) -> None:
    """Leave a session; the last of its workers ends it, once all of them have been there.

    Args:
        session: the session.
        keep: leave it to its lease in any case.

    Raises:
        StepwireError: as `Session.close`.
    """
    aggregation, worker = session.config.aggregation, session.worker
    if aggregation is None and not keep:
        session.close()
        return
    session.detach()
    if keep or aggregation is None:
        return
    with contextlib.suppress(SessionNotFoundError):
        for seconds in _LAST_WAITS_SECONDS:
            members = session.info().members
            if len(members) < aggregation.workers:
                return
            if not any(member.attached and member.worker != worker for member in members):
                session.close()
                return
            threading.Event().wait(seconds)


def with_job(error: StepwireError, options: RemoteOptions) -> StepwireError:
    """Return the error of a creation in the terms of an optimizer."""
    if error.metadata.get("field") != "request_id":
        return error
    problem = str(error).partition(": ")[2]
    if "another config" in problem:
        problem = (
            f"{options.job!r} is the name of a session with another config; all workers of one model have the same "
            "model, optimizer and options, and each model has a name of its own"
        )
    return InvalidRequestError.of("job", problem)
