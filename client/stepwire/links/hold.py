"""The client's hold of a session's worker: its stream, opened again after a break, and the steps sent over it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Final

from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream, Carrier
from stepwire.errors import FencedError, Reason, StateLossError
from stepwire.links.mismatches import loaded_elsewhere, stepped_elsewhere
from stepwire.links.replies import replies
from stepwire.steps.call import StepCall, fits_in_packets
from stepwire.steps.description import SessionDescription
from stepwire.steps.doubt import unfinished
from stepwire.steps.reply import ReplyReader
from stepwire.steps.shared import can_carry, shared_message
from stepwire.transports.attach import open_stream
from stepwire.transports.packets import PacketLane
from stepwire.transports.route import Route
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import attach_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import wire_bytes
from stepwire.wire.packets import REQUEST_BYTES

__all__ = ["Hold"]

_ACQUISITIONS: Final = (1 << 64) - 1
"""The numbers of acquisitions, from 1."""
_WAITS_FROM_BYTES: Final = 1 << 20
"""A gradient of more bytes waits on the client while those of other workers are received: HTTP/2 has no room for it."""


class Hold:
    """The hold of one worker. The session serialises its calls.

    Attributes:
        token: the proof of the hold; 0 before the worker was acquired.
        acquisitions: how often the worker was acquired from whoever held it. Another client may have stepped the
            session before each.
        epoch: the session's epoch; 0 once the server has named another one, until the next attach.
        worker: the index of the worker; None before the first attach for whichever is vacant.
        applied_step: the last step known to be applied. With aggregation it is the number of the worker's own last
            contribution, in the worker's own series, and so are the other numbers of steps.
        base_step: with aggregation, the step whose parameters this client has.
        begins_anew: with aggregation, a load has come behind the last contribution: any later number is the next one.
        applied_load: the last load known to be committed.
        load_in_doubt: the number of a load that failed and may have been committed; 0 for none. The next attach tells.
        durable_step: the largest durable step that the server has told.
        step_on_server: the last applied step, as the server said itself.
        answered_step: the last step of whose reply a part may have been written; 0 for none.
        unfinished_step: the step that is half applied, as the server said at the last attach; 0 for none.
        in_doubt: True after a step or an attach failed. Perhaps the server applied the step, or has given out another
            token; the next attach tells.
        shared: the memory that the stream shares; None without a stream, or without shared memory.
        lane: the packet lane of the stream; None without a stream, or without a lane.
        streams_opened: the number of streams opened so far.
        has_rounds: a contribution is answered when its round is over.
    """

    def __init__(self, route: Route, description: SessionDescription, token: int, worker: int | None = 0) -> None:
        """Be ready to attach to a session; token 0 acquires its worker at the first attach.

        Args:
            route: the way to its server.
            description: the session.
            token: the proof of the hold.
            worker: the index of the worker; None for whichever is vacant.
        """
        message = description.message
        self.worker = worker
        self._is_aggregated = description.is_aggregated
        self.has_rounds = description.has_rounds
        self.token = token
        self.acquisitions = 0
        self.epoch = message.epoch
        own = {member.worker: member.contribution for member in message.members}.get(worker or 0, 0)
        self._session_step = self.base_step = self._session_step_on_server = message.applied_step
        self.applied_step = self.step_on_server = own if self._is_aggregated else message.applied_step
        self.applied_load = self._load_on_server = message.applied_load
        self.load_in_doubt = 0
        self.begins_anew = False
        self.durable_step = message.durable_step
        self.answered_step = 0
        self.unfinished_step = 0
        self.in_doubt = False
        self._acquisition = 0  # the number of the attempts to take the worker, until one is answered
        self.shared: SharedArrays | None = None
        self.lane: PacketLane | None = None
        self.streams_opened = 0
        self._session_id = message.session_id
        self._route = route
        self._packer = description.packer
        self._chunk_bytes = description.chunk_bytes
        self._stream: AttachedStream | None = None

    @property
    def is_certain(self) -> bool:
        """Tell whether the numbers are those of the holder of the worker, as far as it can know."""
        return not (self.token == 0 or self.in_doubt or self.load_in_doubt)

    @property
    def session_step(self) -> int:
        """The last step of the session that this client knows; without aggregation it is `applied_step`."""
        return self._session_step if self._is_aggregated else self.applied_step

    @property
    def acknowledged(self) -> tuple[int, int]:
        """The step and the load that the server has to have, if nobody else holds the worker; (0, 0) for none."""
        return (0, 0) if self.token == 0 else (self.session_step, self.applied_load)

    @property
    def attached(self) -> bool:
        """Tell whether there is a stream; a broken one shows itself at its next use alone."""
        return self._stream is not None

    @property
    def free_lane(self) -> PacketLane | None:
        """The packet lane, if the next step needs nothing else: no stream, and no look at numbers in doubt."""
        if self._stream is None or self._stream.is_cut or self.in_doubt or self.load_in_doubt or self._is_aggregated:
            return None
        is_next = self.applied_step == self.step_on_server and self.applied_load == self._load_on_server
        return self.lane if is_next and not self.unfinished_step else None

    @property
    def has_lost(self) -> bool:
        """Tell whether the server had less than this client knows, when it was last heard."""
        server = self._session_step_on_server if self._is_aggregated else self.step_on_server
        return server < self.session_step or self._load_on_server < self.applied_load

    def attach(self, deadline: Deadline) -> AttachedStream:
        """Return the stream, attaching if there is none; without a token that acquires the worker.

        Raises:
            FencedError: another client holds the worker, or the epoch is stale.
            StepwireError: the server refused or cannot be reached.
        """
        if self._stream is not None and self._stream.is_cut:
            self.detach()
        if self._stream is None:
            if self.token == 0 and self._acquisition == 0:
                self._acquisition = 1 + secrets.randbelow(_ACQUISITIONS)
            opening = attach_pb2.AttachOpen(
                session_id=self._session_id,
                attach_token=self.token,
                acquisition=self._acquisition,
                epoch=self.epoch,
                durable_step=self.durable_step,
                worker=self.worker or 0,
                any_worker=self.worker is None,
            )
            self.in_doubt = True
            stream, self.shared, self.lane = open_stream(self._route, opening, self._packer, deadline)
            self._learn(stream.opened)
            self._stream = stream
        return self._stream

    def detach(self) -> None:
        """Drop the stream, if any; the worker stays held until another client acquires it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        for part in (self.shared, self.lane):
            if part is not None:
                part.close()
        self.shared = self.lane = None

    def displaced(self) -> None:
        """Note that a newer stream of this client holds the worker, and drop this one: the next attach goes on."""
        self.detach()
        self.in_doubt = True

    def take_over(self, deadline: Deadline) -> AttachedStream:
        """Attach anew, and acquire the worker if another client holds it.

        The own token comes first. Where it holds, nobody stepped the session in between.

        Raises:
            StepwireError: as `attach`.
        """
        self.detach()
        try:
            return self.attach(deadline)
        except FencedError as error:
            if error.reason != Reason.FENCED:
                raise
        self.token = 0
        return self.attach(deadline)

    def forget_epoch(self) -> None:
        """Drop the stream and the epoch: the next attach learns the epoch that the session is in now."""
        self.detach()
        self.epoch = 0

    def load_failed(self, load: int) -> None:
        """Note a load that failed and may have been committed, and drop the stream: the next attach tells."""
        self.detach()
        self.in_doubt = True
        self.load_in_doubt = load

    @property
    def load_on_server(self) -> int:
        """The last load that this client has heard of: its own, or that of another worker."""
        return max(self.applied_load, self._load_on_server)

    def other_load(self, load: int) -> None:
        """Note the load of another worker, which this client has not the parameters of."""
        self._load_on_server, self.begins_anew = max(load, self._load_on_server), True

    def loaded(self, load: int, applied_step: int) -> None:
        """Note a committed load, and the step that the session is at after it."""
        self.applied_load = self._load_on_server = load
        self._session_step = self.base_step = self._session_step_on_server = applied_step
        if not self._is_aggregated:
            self.applied_step = self.step_on_server = applied_step
        self.unfinished_step, self.begins_anew = 0, self._is_aggregated

    def succeed(self, former: Sequence[Hold]) -> None:
        """Know what the holds at the former places of the session knew: its parameters' step and load, and a doubt."""
        self.base_step = min(each.base_step for each in (self, *former))
        self.applied_load = min(each.applied_load for each in former)
        newest = max(max(each.applied_load, each.load_in_doubt) for each in former)
        self.load_in_doubt = newest if newest > self.applied_load else 0

    def acknowledge(self, step: int) -> None:
        """Know a step as applied although a restarted server lacks it: the next call finds the loss."""
        self.applied_step = max(self.applied_step, step)

    def pulled(self, step: int, load: int) -> None:
        """Note that this client has the parameters of a step and a load: other workers may have made them."""
        if self._is_aggregated and step >= self.base_step:
            self.begins_anew = self.begins_anew or load > self._load_on_server
            self.base_step, self.applied_load = step, max(load, self.applied_load)
            self._session_step_on_server = max(step, self._session_step_on_server)
            self._load_on_server = max(load, self._load_on_server)

    def check_kept(self, *, steps: bool = True) -> None:
        """Refuse to go on from the server's state while it has less than this client knows.

        Args:
            steps: mind lost steps too; without them a lost load alone is refused.

        Raises:
            StateLossError: a restarted server has lost steps or loads; the next call goes on from what it has.
        """
        if self.has_lost and (steps or self._load_on_server < self.applied_load):
            raise self._state_lost()

    def check(self, step: int, *, sent: bool) -> None:
        """Refuse a step that neither follows on the server's state nor repeats its last step.

        Args:
            step: the number of the step.
            sent: the step was sent before, so that it may be the server's last step.

        Raises:
            StateLossError: a restarted server has lost steps or loads; the next step goes on from what it has.
            StepMismatchError: the session was stepped or loaded without this client.
            SessionNotReadyError: a step that this one does not repeat is half applied.
        """
        plain = not (self.unfinished_step or self._is_aggregated) and self._load_on_server == self.applied_load
        if plain and self.applied_step == self.step_on_server == step - 1:  # as almost always
            return
        if self.unfinished_step and not sent:
            raise unfinished(self.unfinished_step)
        self.check_kept()
        applied = self.step_on_server
        if applied != step - 1 and not (sent and applied == step) and not (self.begins_anew and applied < step):
            raise stepped_elsewhere(step, applied)
        if self._load_on_server != self.applied_load:
            raise loaded_elsewhere(self.applied_load, self._load_on_server, together=self._is_aggregated)

    def _state_lost(self) -> StateLossError:
        """Go on from the numbers of the server, and return the error that tells of the loss."""
        applied, load = self.session_step, self.applied_load
        server = self._session_step_on_server if self._is_aggregated else self.step_on_server
        self.applied_step, self.applied_load = self.step_on_server, self._load_on_server
        self._session_step = self.base_step = server
        lost = f"steps {server + 1} to {applied}" if server < applied else f"load {load}"
        return StateLossError(
            f"the server was restarted and has lost {lost}; pull the parameters and go on from step {server}. A "
            "client that connects with `window_bytes` sends lost steps again",
            metadata={"durable_step": server, "applied_step": applied, "lost_load": self._load_on_server < load},
        )

    def step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send a step once and read its reply; any failure drops the stream.

        Raises:
            StepMismatchError: the session moved without this client.
            StepwireError: the server's refusal, a broken connection, or the deadline.
        """
        try:
            if call.feed is not None:  # one that was given up is not repeated
                call.feed.check()
            result = self._exchange(self.attach(deadline), call, deadline)
        except BaseException:
            self.detach()
            self.in_doubt = True
            if call.patched is not None:  # a part of the reply may have changed the patched parameters
                call.begin.reply.ClearField("base")
            raise
        self.stepped(result)
        return result

    def stepped(self, result: step_pb2.StepResult) -> None:
        """Note an applied step, by its result."""
        self._session_step = self.base_step = self._session_step_on_server = result.step
        self.applied_step = self.step_on_server = result.round.contribution if self._is_aggregated else result.step
        self.unfinished_step, self.begins_anew = 0, False
        if result.durable_step > self.durable_step:
            self.durable_step = result.durable_step

    def _learn(self, opened: attach_pb2.AttachOpened) -> None:
        """Adopt the numbers of the server, which the next step and the next load follow on."""
        own = opened.contribution if self._is_aggregated else opened.applied_step
        is_shared = self.load_in_doubt == 1 or not opened.HasField("worker_load")  # all workers make the first load
        last_load = opened.applied_load if is_shared else opened.worker_load
        if self.token == 0:
            self.acquisitions += 1
            self.applied_step, self.applied_load = own, opened.applied_load
            self._session_step = opened.applied_step
        elif self.load_in_doubt and last_load == self.load_in_doubt:  # this client's own: the token held
            self.applied_step, self.applied_load = own, self.load_in_doubt
            self._session_step = self.base_step = opened.applied_step
        elif self._is_aggregated and own < self.applied_step and opened.applied_step >= self.session_step:
            self.applied_step = own  # it forgot contributions that it had dropped: nothing is lost
        self._acquisition = 0
        self.load_in_doubt = 0  # a load that did not arrive before is of an older hold, and commits nothing
        self.token = opened.attach_token
        self.epoch = opened.epoch
        self.durable_step = max(self.durable_step, opened.durable_step)
        self.worker, self.step_on_server, self._session_step_on_server = opened.worker, own, opened.applied_step
        self._load_on_server = opened.applied_load
        self.unfinished_step, self.begins_anew = opened.unfinished_step, opened.begins_anew
        self.in_doubt = False
        self.streams_opened += 1

    def _exchange(self, stream: AttachedStream, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send the step, without its gradient if only its reply was lost, and read the reply."""
        begin = call.begin
        if call.lane is not self.lane and call.lane is not None:  # it was sent over a stream before
            call.lane, call.sent = None, True
        self.check(begin.step, sent=call.sent)
        begin.epoch, begin.load = self.epoch, self.applied_load
        if self._is_aggregated:
            begin.base_step = self.base_step
        again = self.step_on_server == begin.step
        if call.feed is not None:
            call.feed.bind(stream.close)
        shared = self.shared if self.shared is not None and can_carry(self.shared, call) else None
        reader = ReplyReader(self._packer, call, shared)
        carrier, messages = self._carried(stream, call, shared, again=again)
        for frame in replies(carrier, call, messages, deadline):
            message: pb.AttachResponse = frame.message
            if message.HasField("chunk") or shared is not None and message.HasField("result"):
                self.answered_step = begin.step
            reader.read(frame)
            if message.HasField("admitted"):
                carrier.send(call.messages(self._packer, self._chunk_bytes, again=not message.admitted.gradient))
            if message.HasField("gradient_check"):
                carrier.send([call.decided(message.gradient_check)])
            if message.HasField("result"):
                break
        reader.finish()
        result: step_pb2.StepResult = message.result
        return result

    def _carried(
        self, stream: AttachedStream, call: StepCall, shared: SharedArrays | None, *, again: bool
    ) -> tuple[Carrier, Iterable[bytes]]:
        """Return the way of a step, and its messages: over the lane if there is one, and the step fits there."""
        messages: Iterable[bytes]
        if call.lane is not None:
            return call.lane, ()
        if shared is not None:
            messages = [shared_message(shared, call, again=again)]
        else:
            messages = self._messages(call, again=again)
        if self.lane is None:
            return stream, messages
        if shared is not None or fits_in_packets(call, self._packer.layout.size):
            messages = list(messages)
            if len(messages) == 1 and len(messages[0]) <= REQUEST_BYTES:
                return self.lane, messages
        self.lane.announce()
        return stream, messages

    def _messages(self, call: StepCall, *, again: bool) -> Iterable[bytes]:
        """Return the messages of a step; its opening alone where a large gradient may have to wait for others."""
        gradient_bytes = wire_bytes(call.gradient_dtype, self._packer.layout.size)
        waits = self._is_aggregated and not again and gradient_bytes > _WAITS_FROM_BYTES
        call.begun = call.begin.await_admission = waits
        if waits:
            return [pb.AttachRequest(begin=call.begin).SerializeToString()]
        return call.messages(self._packer, self._chunk_bytes, again=again)
