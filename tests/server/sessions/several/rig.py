"""A session with several workers, each of whose commits runs in a thread, on a clock that a test moves.

A test acts only while every thread is at rest: it has ended, or it waits for the session to change. So whatever the
scheduler does between two acts, it does before the test looks.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.errors import StepwireError
from stepwire.layout import TensorSpec
from stepwire.optimizers import SGD
from stepwire.optimizers.aggregation import Aggregation
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.pool import Device
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import Decision, StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.step import Step
from tests.server.configs import make_config
from tests.server.session_driver import RecordingWriter, everything

__all__ = ["Attached", "Commit", "Rig", "Vector", "config_of"]

Vector = npt.NDArray[np.float32]
PATIENCE_SECONDS = 120.0


def config_of(aggregation: Aggregation, size: int, **fields: Any) -> SessionConfig:
    """Return a config of plain gradient descent with a learning rate of 1, so that NumPy knows every bit."""
    optimizer = SGD(lr=1.0)
    fields = {"treatment": GradientTreatment(non_finite="reject")} | fields
    return make_config(TensorSpec("w", (size,)), optimizer=optimizer, aggregation=aggregation, **fields)


class _Watched(threading.Condition):
    """A condition that counts the threads which are on the move."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self.moving = 0
        self._resting = 0
        self._still = threading.Condition(lock)

    def wait(self, timeout: float | None = None) -> bool:
        """Rest until somebody notifies, for however long: time passes when the test says so."""
        self._resting += 1
        self.rested()
        return super().wait()

    def notify_all(self) -> None:
        """Wake all."""
        self.moving, self._resting = self.moving + self._resting, 0
        super().notify_all()

    def rested(self) -> None:
        """Note that a thread moves no more."""
        self.moving -= 1
        self._still.notify_all()

    def settle(self) -> None:
        """Wait until nothing moves. Under the lock."""
        assert self._still.wait_for(lambda: not self.moving, PATIENCE_SECONDS), "a thread neither ends nor waits"


class Commit:
    """One commit in a thread of its own.

    Attributes:
        outcome: the result, or the error; None while it waits.
        values: the parameters that it was answered with.
    """

    def __init__(self, session: Session, step: Step, watched: _Watched, lock: threading.Lock) -> None:
        self.outcome: StepResult | StepwireError | None = None
        self._writer = RecordingWriter(session.config.layout.size, np.dtype(np.float32))
        self._session, self._step, self._watched, self._lock = session, step, watched, lock
        with lock:
            watched.moving += 1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def values(self) -> Vector:
        return self._writer.values

    def _run(self) -> None:
        try:
            with self._step as step:
                if self._session.config.treatment.two_phase and self._session.check(step) is not None:
                    step.decision = Decision()
                self.outcome = self._session.commit(step, self._writer)
        except StepwireError as error:
            self.outcome = error
        finally:
            with self._lock:
                self._watched.rested()


class Attached:
    """An attached stream of a worker."""

    def __init__(self, session: Session, token: int, worker: int | None) -> None:
        self.stream = ClientStream(lambda: None, 0.0)
        self._exits = contextlib.ExitStack()
        self.holder: Holder = self._exits.enter_context(session.attached(self.stream, token, 0, worker=worker))

    def leave(self) -> None:
        """End the stream."""
        self._exits.close()


class Rig:
    """A session, and everything that may happen to it.

    Attributes:
        session: the session.
        now: the clock.
    """

    def __init__(self, engine: CpuEngine, config: SessionConfig) -> None:
        """Make a session of parameters that are 0."""
        self.now = 0.0
        self.budget = MemoryBudget(1 << 30)
        device = Device(engine, self.budget)
        self.session = Session("ab" * 16, config, device, epoch=1, clock=lambda: self.now)
        contributions = self.session.contributions
        assert contributions is not None
        self._lock = contributions.parts.lock
        self._watched = contributions.changed = _Watched(self._lock)

    def attach(self, worker: int | None, token: int = 0) -> Attached:
        """Attach a stream, and let everybody look."""
        attached = Attached(self.session, token, worker)
        self.settle()
        return attached

    def leave(self, attached: Attached) -> None:
        """End a stream."""
        attached.leave()
        self.settle()

    def request(self, number: int, **fields: Any) -> StepRequest:
        """Make the request of a contribution."""
        config = self.session.config
        return StepRequest(number, 0, config.gradient_dtype, config.reply_dtype, True, 1 << 20, config.groups)._replace(
            **fields
        )

    def staged(self, holder: Holder, gradient: Vector | None, number: int, **fields: Any) -> Step:
        """Begin a contribution and bring its gradient; None brings nothing."""
        step = self.session.begin(self.request(number, **fields), holder, self.now)
        if gradient is not None:
            try:
                step.add(0, len(gradient), gradient.view(np.uint8))
            except BaseException:
                step.close()
                raise
        return step

    def commit(self, step: Step) -> Commit:
        """Commit a contribution, until it is answered or waits."""
        made = Commit(self.session, step, self._watched, self._lock)
        self.settle()
        return made

    def load(self, holder: Holder, values: Vector, **fields: Any) -> None:
        """Load parameters."""
        request = LoadRequest(self.session.ledger.applied_load + 1, ("param",), **fields)
        with self.session.exchange.loading(request, holder) as load:
            assert load is not None
            load.add("param", 0, len(values), values.view(np.uint8))
            load.complete()
            self.session.exchange.commit_load(load)
        self.settle()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and let everybody look."""
        self.now += seconds
        with self._lock:
            self._watched.notify_all()
        self.settle()

    def settle(self) -> None:
        """Wait until every thread has ended or waits."""
        with self._lock:
            self._watched.settle()

    @property
    def parameters(self) -> Vector:
        """The parameters as they are."""
        values: Vector = everything(self.session)[1]["param"]
        return values

    def close(self) -> None:
        """End the session, and with it every wait."""
        self.session.close()
        self.settle()
        assert self.budget.reserved_bytes == 0
