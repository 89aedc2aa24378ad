"""The client's hold on a session's slot: its stream, mended when it breaks, and the steps taken over it."""

from __future__ import annotations

from stepwire.arrays.packing import Packer
from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream
from stepwire.errors import StepMismatchError
from stepwire.steps.call import StepCall
from stepwire.steps.reply import ReplyReader
from stepwire.steps.shared import SharedArrays
from stepwire.transports.attach import open_stream
from stepwire.transports.route import Route
from stepwire.v1 import attach_pb2, session_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["Attachment"]


class Attachment:
    """Holds the slot. The session serialises its calls.

    Attributes:
        token: proves possession of the slot; 0 before it was taken.
        epoch: the session's epoch.
        applied_step: the last step known to be applied.
        applied_load: the last load known to be applied.
        step_on_server: the last step applied on the server, as it said itself.
        shared: the memory that the stream shares, while it is attached and shares any.
        in_doubt: since then a step has failed that may have been applied; attaching tells.
    """

    def __init__(
        self, route: Route, session: session_pb2.Session, token: int, packer: Packer, chunk_bytes: int
    ) -> None:
        """Be ready to attach to a session as the server described it."""
        self.token = token
        self.epoch = session.epoch
        self.applied_step = session.applied_step
        self.applied_load = session.applied_load
        self._session_id = session.session_id
        self._route = route
        self._packer = packer
        self._chunk_bytes = chunk_bytes
        self._stream: AttachedStream | None = None
        self.shared: SharedArrays | None = None
        self.step_on_server = session.applied_step
        self.in_doubt = False

    @property
    def attached(self) -> bool:
        """There is a stream; that it has broken is only seen when it is used."""
        return self._stream is not None

    def attach(self, deadline: Deadline) -> AttachedStream:
        """Return the stream, attaching if there is none; without a token that takes the slot.

        Raises:
            FencedError: another client took the slot.
            StepwireError: the server refused or cannot be reached.
        """
        if self._stream is None:
            opening = attach_pb2.AttachOpen(session_id=self._session_id, attach_token=self.token, epoch=self.epoch)
            stream, self.shared = open_stream(self._route, opening, self._packer, deadline)
            if self.token == 0:
                self.applied_step, self.applied_load = stream.opened.applied_step, stream.opened.applied_load
            self.token = stream.opened.attach_token
            self.step_on_server, self.in_doubt = stream.opened.applied_step, False
            self._stream = stream
        return self._stream

    def detach(self) -> None:
        """Drop the stream, if any; the slot stays ours until another client takes it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self.shared is not None:
            self.shared.close()
            self.shared = None

    def loaded(self, load: int, applied_step: int) -> None:
        """Note a committed load and the step it left the session at."""
        self.applied_load = load
        self.applied_step = self.step_on_server = applied_step

    def take_step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send a step once and read its answer; whatever fails, the stream is dropped.

        Raises:
            StepMismatchError: the session moved without this client.
            StepwireError: the server's refusal, a broken connection, or the deadline.
        """
        try:
            stream = self.attach(deadline)
            result = self._exchange(stream, call, deadline)
        except BaseException:
            self.detach()
            self.in_doubt = True
            call.begin.reply.ClearField("base")  # a part of the answer may have changed what is held
            raise
        self.applied_step = self.step_on_server = result.step
        return result

    def _exchange(self, stream: AttachedStream, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send the step, or, where it was applied and only its answer was lost, no gradient; read the answer."""
        step, applied = call.begin.step, self.step_on_server
        if applied not in (step - 1, step):
            raise StepMismatchError(
                f"this client is about to take step {step} and the session is at step {applied}: it moved without "
                "this client; pull the parameters and go on from there with a new Session object",
                metadata={"expected_step": applied + 1, "actual_step": step},
            )
        if call.feed is not None:
            call.feed.bind(stream.close)
        shared = self.shared if self.shared is not None and self.shared.carries(call) else None
        arrival = ReplyReader(self._packer, call, shared)
        messages = (
            call.messages(self._packer, self._chunk_bytes, again=applied == step)
            if shared is None
            else iter([shared.message(call, again=applied == step)])
        )
        for frame in stream.exchange(messages, deadline):
            message: pb.AttachResponse = frame.message
            arrival.take(frame)
            if message.HasField("gradient_check"):
                stream.send([call.decided(message.gradient_check)])
            if message.HasField("result"):
                break
        arrival.finish()
        result: step_pb2.StepResult = message.result
        return result
