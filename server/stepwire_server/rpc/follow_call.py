"""The call of a standby to its primary: opened again and again, until the standby is promoted or ends."""

from __future__ import annotations

import pathlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

import grpc
import structlog

from stepwire.errors import FencedError, InvalidRequestError, Reason, UnavailableError
from stepwire.v1 import replication_service_pb2 as pb
from stepwire.wire.addresses import grpc_target, is_on_this_host
from stepwire.wire.channel_options import BULK_OPTIONS
from stepwire.wire.error_details import error_from_call
from stepwire.wire.frames import read_frame
from stepwire_server.config import ServerConfig
from stepwire_server.replication.follower import Follower, Heard
from stepwire_server.rpc.replication_codec import decode_record

__all__ = ["FollowCall"]

_log = structlog.get_logger()

_METHOD: Final = "/stepwire.v1.ReplicationService/Follow"
_PAUSE_SECONDS: Final = 0.25
_TELLING_SECONDS: Final = 5.0
_OPTIONS: Final = [
    *BULK_OPTIONS,
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a minute by default, whatever the keepalive's is
    ("grpc.use_local_subchannel_pool", 1),
]


class FollowCall:
    """The connection of a standby. Thread-safe."""

    def __init__(
        self,
        config: ServerConfig,
        follower: Follower,
        look: Callable[[float], object],
        clock: Callable[[], float],
        locate: Callable[[], str],
    ) -> None:
        """Follow the primary of some settings.

        Args:
            config: the settings.
            follower: admits the records.
            look: called with the seconds without a primary, now and then while there is none.
            clock: returns seconds.
            locate: returns the address of the primary as of now; empty for none.

        Raises:
            InvalidRequestError: a file of the settings cannot be read, or the token would leave in plaintext.
        """
        self._config, self._follower, self._look, self._clock = config, follower, look, clock
        self._locate, self._address = locate, locate()
        self._metadata = _metadata(config, self._address)
        self._channel = _channel(config, self._address)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)
        follower.heard = Heard(self._digest, self._problem)

    def start(self) -> None:
        """Follow from now on."""
        self._thread.start()

    def close(self) -> None:
        """End, and tell the primary that this standby leaves. Closing twice is harmless."""
        if not self._ended.is_set():
            self._ended.set()
            self._follower.leave()
            self._say(pb.FollowRequest(leave=pb.FollowLeave()))
            self._requests.put(None)
        self._end()

    def promoted(self, epoch: int) -> None:
        """Refuse the primary's records from now on, and tell it so, now or when it can be reached again."""
        self._say(pb.FollowRequest(refusal=pb.FollowRefusal(epoch=epoch)))
        self._requests.put(None)
        threading.Thread(target=self._tell, args=(epoch,), name="depose", daemon=True).start()

    def _end(self) -> None:
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_TELLING_SECONDS)
        if self._call is not None:
            self._call.cancel()
        self._channel.close()

    def _run(self) -> None:
        lost_at, problem, refusal = self._clock(), "", ""
        while not self._ended.is_set() and not self._follower.promoted:
            try:
                self._follow()
                problem = ""
            except Exception as error:  # whatever it was, the next connection tries again
                if str(error) != problem:
                    problem = str(error)
                    _log.warning("the primary is not followed", problem=problem)
            finally:
                if self._follower.connected:
                    lost_at = self._clock()
                self._follower.lost()
            if self._follower.promoted or self._ended.is_set():
                return
            try:
                self._look(self._clock() - lost_at)
                refusal = ""
            except Exception as error:  # the next look tries again
                if str(error) != refusal:
                    refusal = str(error)
                    _log.warning("the standby is not promoted", problem=refusal)
            self._ended.wait(_PAUSE_SECONDS)

    def _follow(self) -> None:
        """Follow over one connection, until it breaks.

        Raises:
            StepwireError: the primary's refusal, or no connection.
        """
        follower = self._follower
        self._turn()
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._requests = requests
        opening = pb.FollowOpen(standby_id=follower.server_id, received=follower.received, shard=self._config.shard)
        if follower.is_member:
            opening.primary_id = follower.primary_id
        requests.put(pb.FollowRequest(open=opening).SerializeToString())
        method: Any = self._channel.stream_stream(_METHOD)
        call = method(iter(requests.get, None), metadata=self._metadata)
        self._call = call
        try:
            for data in call:
                try:
                    self._received(data)
                except UnavailableError:  # it ends: `leave` is on its way, and the primary ends the stream behind it
                    if not self._ended.is_set():
                        raise
        except grpc.RpcError as error:
            raise error_from_call(error) from None
        except FencedError:  # the primary is of the past, and was told so
            return
        finally:
            requests.put(None)
            call.cancel()

    def _turn(self) -> None:
        """Turn to the present primary, wherever it is.

        Raises:
            InvalidRequestError: as `FollowCall`.
        """
        if (address := self._locate()) != self._address:
            channel, self._metadata = _channel(self._config, address), _metadata(self._config, address)
            self._channel.close()
            self._channel, self._address = channel, address
            _log.info("another primary", endpoint=address)

    def _received(self, data: bytes) -> None:
        frame = read_frame(pb.FollowResponse, data)
        kind = frame.message.WhichOneof("message")
        if kind == "opened":
            opened = frame.message.opened
            self._follower.begin(opened.primary_id, opened.epoch, whole=opened.whole)
            _log.info("following", primary=opened.primary_id, epoch=opened.epoch, whole=opened.whole)
        elif kind == "record":
            record = decode_record(frame)
            try:
                self._follower.admit(record)
            except FencedError as refusal:
                epoch = int(refusal.metadata["epoch"])
                self._say(pb.FollowRequest(refusal=pb.FollowRefusal(epoch=epoch)))
                raise
            self._say(pb.FollowRequest(acknowledgement=pb.FollowAcknowledgement(number=record.number)))
            if self._follower.handed_over:
                self._look(0.0)

    def _digest(self, key: bytes, number: int, digest: bytes) -> None:
        self._say(pb.FollowRequest(digest=pb.FollowDigest(session_id=key, number=number, digest=digest)))

    def _problem(self, key: bytes, number: int, problem: str) -> None:
        self._say(pb.FollowRequest(problem=pb.FollowProblem(session_id=key, number=number, problem=problem[:1000])))

    def _say(self, message: pb.FollowRequest) -> None:
        self._requests.put(message.SerializeToString())

    def _tell(self, epoch: int) -> None:
        """Tell the old primary of its successor, however long it cannot be reached."""
        opening = pb.FollowOpen(standby_id=self._follower.server_id, promoted_epoch=epoch, shard=self._config.shard)
        request = pb.FollowRequest(open=opening).SerializeToString()
        while not self._ended.wait(_PAUSE_SECONDS):
            try:
                call: Any = self._channel.stream_stream(_METHOD)
                for _ in call(iter([request]), metadata=self._metadata, timeout=_TELLING_SECONDS):
                    return
            except grpc.RpcError as error:
                if error_from_call(error).reason in (Reason.NOT_PRIMARY, Reason.STALE_EPOCH):
                    _log.info("the old primary knows its successor", epoch=epoch)
                    return
            except ValueError:  # the channel was closed
                return


def _metadata(config: ServerConfig, address: str) -> tuple[tuple[str, str], ...]:
    if not config.standby_token:
        return ()
    if not config.standby_ca and not is_on_this_host(address):
        raise InvalidRequestError.of(
            "standby_token", "the token would travel in the clear to another host; give --standby-ca too"
        )
    return (("authorization", f"Bearer {_read(config.standby_token, 'standby_token').decode().strip()}"),)


def _channel(config: ServerConfig, endpoint: str) -> grpc.Channel:
    address = grpc_target(endpoint)
    if not config.standby_ca:
        return grpc.insecure_channel(address, options=_OPTIONS)
    own = (config.tls_key, config.tls_cert) if config.tls_cert else ()
    credentials = grpc.ssl_channel_credentials(
        _read(config.standby_ca, "standby_ca"), *(_read(path, "tls_cert") for path in own)
    )
    return grpc.secure_channel(address, credentials, options=_OPTIONS)


def _read(path: str, field: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError.of(field, f"{path!r} cannot be read: {error.strerror}") from None
