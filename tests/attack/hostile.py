"""Requests that no honest client sends: of random bytes, mutated, of other tenants, with lies about sizes."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message

from stepwire.v1 import attach_pb2, move_pb2, optimizer_pb2, session_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["ATTACKED", "Attacker"]

_SERVICE: Final = "/stepwire.v1.OptimizerService/"
ATTACKED: Final = (
    "GetServerInfo",
    "CreateSession",
    "GetSession",
    "ListSessions",
    "DeleteSession",
    "Attach",
    "Step",
    "Pull",
    "Load",
    "SaveCheckpoint",
    "ListCheckpoints",
    "VerifyCheckpoint",
    "DeleteCheckpoint",
    "Rollback",
    "ForkSession",
    "FreezeSession",
    "ThawSession",
    "ExportSession",
    "ImportSession",
    "HandOverSession",
    "GetSuccessor",
    "GetStatistics",
    "NoSuchMethod",
)
"""The methods that requests are sent to: all of the service, and one that it has not."""
_OPENED: Final = ("Attach", "Load", "ImportSession")
_STREAMING: Final = (*_OPENED, "Pull", "ExportSession", "GetStatistics")
_NUMBERS: Final = (0, 1, 2, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_NAMES: Final = ("", "w", "../../etc/passwd", "/", "a" * 600, "\x00", "\u202e", "{}", "%s%n", "CON", "w\nlevel=error")
_NEWER_STREAM: Final = "is held by a newer stream of this client"
"""The only answer that may be UNAVAILABLE: to a request with an attach token of before."""
_PATIENCE_SECONDS: Final = 120.0


class Attacker:
    """Sends hostile requests, chosen by a seed.

    Attributes:
        statuses: how often each status came, by its name.
        wrong: the methods and texts of statuses that no request may have.
    """

    def __init__(self, channel: grpc.Channel, seed: int, victim: str, tokens: tuple[str, ...]) -> None:
        """Attack over a channel.

        Args:
            channel: the channel.
            seed: of all choices.
            victim: the id of a session of another tenant.
            tokens: what the attacker calls with: its own token, wrong ones, and an empty text for none.
        """
        self._channel = channel
        self._random = random.Random(seed)
        self._victim = victim
        self._tokens = tokens
        self._own: list[tuple[str, int]] = []
        self._unary: dict[str, Any] = {}
        self.statuses = Counter[str]()
        self.wrong: list[tuple[str, str]] = []

    def attack(self) -> None:
        """Send one request, and note the status."""
        method = self._random.choice(ATTACKED)
        messages = list(self._messages(method))
        try:
            responses = self._responses(method, messages, self._metadata())
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            code = error.code().name
            details = error.details() or ""
            if code in ("UNKNOWN", "INTERNAL") or (code == "UNAVAILABLE" and _NEWER_STREAM not in details):
                self.wrong.append((method, details))
        else:
            code = "OK"
            self._remember(method, responses)
        self.statuses[code] += 1

    def _responses(self, method: str, messages: list[bytes], metadata: list[tuple[str, str]]) -> list[bytes]:
        """Call a method. A call of one message each way costs gRPC's client no thread, and so a fifth of the time."""
        if len(messages) == 1 and method not in _STREAMING:
            unary = self._unary.setdefault(method, self._channel.unary_unary(_SERVICE + method))
            return [unary(messages[0], timeout=_PATIENCE_SECONDS, metadata=metadata)]
        stream = self._channel.stream_stream(_SERVICE + method)
        call = stream(iter(messages), timeout=_PATIENCE_SECONDS, metadata=metadata)
        if method != "GetStatistics":
            return list(call)
        try:  # it has no end
            return list(itertools.islice(call, 1))
        finally:
            call.cancel()

    def leave(self) -> None:
        """Delete every session of its own tenant."""
        metadata = [("authorization", f"Bearer {self._tokens[0]}")]
        listed = self._channel.unary_unary(_SERVICE + "ListSessions")
        delete = self._channel.unary_unary(_SERVICE + "DeleteSession")
        while True:
            request = pb.ListSessionsRequest(page_size=1000).SerializeToString()
            sessions = pb.ListSessionsResponse.FromString(listed(request, metadata=metadata)).sessions
            if not sessions:
                return
            for session in sessions:
                with contextlib.suppress(grpc.RpcError):  # another attacker has deleted it
                    delete(
                        pb.DeleteSessionRequest(session_id=session.session_id).SerializeToString(), metadata=metadata
                    )

    def _metadata(self) -> list[tuple[str, str]]:
        token = self._random.choice(self._tokens)
        metadata = [("authorization", f"Bearer {token}")] if token else []
        if self._random.random() < 0.02:
            metadata *= 2
        if self._random.random() < 0.02:
            metadata.append(("x", "y" * self._random.choice((1, 5000, 15_000))))
        return metadata

    def _remember(self, method: str, responses: list[bytes]) -> None:
        """Keep a session of its own for later requests, and delete the one before."""
        if method != "CreateSession" or not responses:
            return
        created = pb.CreateSessionResponse.FromString(responses[0])
        self._own.append((created.session.session_id, created.attach_token))
        if len(self._own) > 3:
            session_id, _ = self._own.pop(0)
            request = pb.DeleteSessionRequest(session_id=session_id)
            delete = self._channel.unary_unary(_SERVICE + "DeleteSession")
            with contextlib.suppress(grpc.RpcError):  # it is gone
                delete(request.SerializeToString(), metadata=[("authorization", f"Bearer {self._tokens[0]}")])

    def _messages(self, method: str) -> Iterator[bytes]:
        """Yield the messages of a request: one in most cases."""
        count = self._random.choice((0, 1, 1, 1, 1, 1, 2, 5)) if method in _OPENED else 1
        make: Callable[[], Message] = getattr(self, f"_{method.lower()}", pb.GetServerInfoRequest)
        for index in range(count):
            data = (self._opening(method) if index == 0 and count > 1 else make()).SerializeToString()
            yield self._mutated(data)

    def _mutated(self, data: bytes) -> bytes:
        kind = self._random.random()
        if kind < 0.5:
            return data
        if kind < 0.6:
            return self._random.randbytes(self._random.choice((0, 1, 7, 100, 5000)))
        changed = bytearray(data or b"\x00")
        for _ in range(self._random.randint(1, 4)):
            changed[self._random.randrange(len(changed))] = self._random.randrange(256)
        if kind > 0.9:
            return bytes(changed[: self._random.randrange(len(changed) + 1)])
        return bytes(changed)

    def _number(self) -> int:
        return self._random.choice(_NUMBERS)

    def _session(self) -> str:
        own = [session_id for session_id, _ in self._own]
        return self._random.choice([self._victim, "", "0" * 32, self._random.choice(_NAMES), *own * 3])

    def _token(self) -> int:
        return self._random.choice([0, self._number(), *(token for _, token in self._own)])

    # --- requests ----------------------------------------------------------------------------------------

    def _opening(self, method: str) -> Message:
        if method == "Attach":
            opening = attach_pb2.AttachOpen(session_id=self._session(), attach_token=self._token())
            if self._random.random() < 0.3:
                opening.epoch = self._number()
            return pb.AttachRequest(open=opening)
        if method == "ImportSession":
            imported = move_pb2.ImportOpen(session_id=self._session(), attach_token=self._token())
            return pb.ImportSessionRequest(open=imported)
        load = state_pb2.LoadOpen(
            session_id=self._session(), attach_token=self._token(), load=self._number(), slots=["param"]
        )
        return pb.LoadRequest(open=load)

    def _config(self) -> session_pb2.SessionConfig:
        rule = self._random.choice((1, 1, 1, 2, 99))
        config = session_pb2.SessionConfig(optimizer=optimizer_pb2.Optimizer(rule=rule))
        config.initialization = session_pb2.INITIALIZATION_ZEROS
        for _ in range(self._random.choice((0, 1, 1, 1, 2, 50))):
            config.tensors.append(tensor_pb2.TensorSpec(name=self._name(), shape=self._shape()))
        if self._random.random() < 0.2:
            config.label = self._random.choice(_NAMES)
        return config

    def _name(self) -> str:
        return self._random.choice(("w", "b", f"t{self._random.randrange(10**6)}", *_NAMES))

    def _shape(self) -> list[int]:
        dimensions = self._random.choice((0, 1, 1, 1, 2, 17))
        large = [2**62] if self._random.random() < 0.1 else []
        return [self._random.choice((1, 1, 2, 3, 10, 1000, 0, 2**31)) for _ in range(dimensions)] + large

    def _createsession(self) -> Message:
        request_id = self._random.choice((f"r{self._random.randrange(10**9)}", *_NAMES))
        return pb.CreateSessionRequest(request_id=request_id, config=self._config())

    def _begin(self) -> step_pb2.StepBegin:
        begin = step_pb2.StepBegin(step=self._random.choice((1, 1, 2, self._number())))
        if self._random.random() < 0.3:
            begin.missing_tensors.append(self._number() % 2**32)
        if self._random.random() < 0.2:
            begin.epoch = self._number()
        return begin

    def _payload(self) -> bytes:
        values = self._random.choice((b"", bytes(4), b"\x00\x00\xc0\x7f" * 3, bytes(40), bytes(4001)))
        return values

    def _attach(self) -> Message:
        message = pb.AttachRequest(payload=self._payload())
        if self._random.random() < 0.7:
            message.begin.CopyFrom(self._begin())
        if self._random.random() < 0.7:
            message.chunk.CopyFrom(tensor_pb2.Chunk(offset=self._number(), count=self._number()))
        if self._random.random() < 0.5:
            message.commit.SetInParent()
        return message

    def _step(self) -> Message:
        return pb.StepRequest(
            session_id=self._session(), attach_token=self._token(), begin=self._begin(), payload=self._payload()
        )

    def _pull(self) -> Message:
        return pb.PullRequest(
            session_id=self._session(), slots=self._random.sample(("param", "exp_avg", "../x", ""), 2)
        )

    def _load(self) -> Message:
        chunk = tensor_pb2.Chunk(offset=self._number(), count=self._number())
        return pb.LoadRequest(slot=self._random.choice(("param", "")), chunk=chunk, payload=self._payload())

    def _checkpoint(self, kind: Any) -> Message:
        request: Message = kind(session_id=self._session())
        if "name" in request.DESCRIPTOR.fields_by_name:
            request.name = self._random.choice(_NAMES)  # type: ignore[attr-defined]
        return request

    def _move_id(self) -> str:
        return self._random.choice(("move", "move", "other", *_NAMES))

    def _freezesession(self) -> Message:
        request = pb.FreezeSessionRequest(session_id=self._session(), move_id=self._move_id(), last_step=self._number())
        request.lease.seconds = self._random.choice((-1, 0, 1, 1, 600, 10**9))
        return request

    def _thawsession(self) -> Message:
        return pb.ThawSessionRequest(session_id=self._session(), move_id=self._move_id())

    def _exportsession(self) -> Message:
        return pb.ExportSessionRequest(
            session_id=self._session(), move_id=self._move_id(), chunk_bytes=self._random.choice((0, 4, self._number()))
        )

    def _importsession(self) -> Message:
        message = pb.ImportSessionRequest(slot=self._random.choice(("param", "row_numbers.0", "")))
        if self._random.random() < 0.7:
            message.chunk.CopyFrom(tensor_pb2.Chunk(offset=self._number(), count=self._number()))
            message.payload = self._payload()
        else:
            message.numbers.step = self._number()
            message.numbers.tensor_steps.extend([self._number()] * self._random.choice((0, 1, 2, 1000)))
        return message

    def _handoversession(self) -> Message:
        request = pb.HandOverSessionRequest(
            session_id=self._session(), move_id=self._move_id(), decided=self._random.random() < 0.3
        )
        request.step, request.epoch = self._random.choice((0, 1, self._number())), self._number()
        for _ in range(self._random.choice((0, 1, 2, 1000))):
            session_id = self._random.choice(("0" * 32, self._session()))
            target = self._random.choice(("127.0.0.1:1", *_NAMES))
            request.successor.shards.add(session_id=session_id, target=target, attach_token=self._number())
        return request

    def _getsuccessor(self) -> Message:
        return pb.GetSuccessorRequest(session_id=self._session(), attach_token=self._token())

    def _getsession(self) -> Message:
        return pb.GetSessionRequest(session_id=self._session())

    def _listsessions(self) -> Message:
        token = self._random.choice(_NAMES).replace("\x00", "")
        return pb.ListSessionsRequest(page_size=self._number() % 2**31, page_token=token)

    def _deletesession(self) -> Message:
        return pb.DeleteSessionRequest(session_id=self._session(), attach_token=self._token())

    def _getstatistics(self) -> Message:
        seconds = self._random.choice((-1, 0, 1, 10**9))
        return pb.GetStatisticsRequest(interval=duration_pb2.Duration(seconds=seconds))

    def _savecheckpoint(self) -> Message:
        return self._checkpoint(pb.SaveCheckpointRequest)

    def _listcheckpoints(self) -> Message:
        return self._checkpoint(pb.ListCheckpointsRequest)

    def _verifycheckpoint(self) -> Message:
        return self._checkpoint(pb.VerifyCheckpointRequest)

    def _deletecheckpoint(self) -> Message:
        return self._checkpoint(pb.DeleteCheckpointRequest)

    def _rollback(self) -> Message:
        return self._checkpoint(pb.RollbackRequest)

    def _forksession(self) -> Message:
        return self._checkpoint(pb.ForkSessionRequest)
