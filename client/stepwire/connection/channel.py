"""Calls over one channel: deadlines set, errors translated, and repeated if the contract permits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import grpc

from stepwire.connection.handshake import refused_handshake
from stepwire.connection.line import Line
from stepwire.connection.remedy import with_remedy
from stepwire.connection.retry import Deadline, Retry
from stepwire.connection.security import PLAIN, Security
from stepwire.errors import InvalidRequestError, Reason, StepwireError, UnavailableError
from stepwire.lifetimes.forks import forks
from stepwire.optimizers.hyperparameters import number
from stepwire.wire.addresses import grpc_target, is_on_this_host
from stepwire.wire.channel_options import BULK_OPTIONS
from stepwire.wire.error_details import error_from_call

__all__ = ["Calls"]

_T = TypeVar("_T")
# Three years, and infinity too: neither gRPC nor the waits of Python's threads take much more.
_LONGEST_SECONDS: Final = 1e8
_OF_MOVES: Final = frozenset(
    {Reason.UNREACHABLE, Reason.SHUTTING_DOWN, Reason.NOT_PRIMARY, Reason.NO_STANDBY, Reason.STALE_EPOCH}
)
_LOOK_SECONDS: Final = 5.0
_SERVICE: Final = "/stepwire.v1.OptimizerService/"
_OPTIONS: Final = [
    *BULK_OPTIONS,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Steps are repeated by number (see `stepwire.connection.retry`), never by gRPC.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Two clients of one process are two connections.
    ("grpc.use_local_subchannel_pool", 1),
]
# Load balancers cut connections that are idle for about four minutes.
_KEEPALIVE: Final = [("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000)]
# A machine that has vanished says nothing, and the shard may be served by another one already.
_KEEPALIVE_OF_MOVING: Final = [
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.keepalive_timeout_ms", 8_000),
    ("grpc.http2.ping_timeout_ms", 8_000),  # a minute by default, whatever the keepalive's is
]


class Calls:
    """A channel to one server.

    Attributes:
        timeout_seconds: the default deadline of a call.
        retry: the repetition of calls.
        target: the target as the user wrote it.
        security: the protection of the connection.
        metadata: the metadata of every call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float,
        retry: Retry,
        security: Security = PLAIN,
        locate: Callable[[float], str] | None = None,
    ) -> None:
        """Open the channel; it connects with the first call.

        Args:
            target: the target as the user wrote it.
            timeout_seconds: the default deadline of a call.
            retry: the repetition of calls.
            security: the protection of the connection.
            locate: returns the present address of a server that moves, within some seconds; None for one that stays at
                its target.

        Raises:
            InvalidRequestError: the timeout is not positive, the target is no address of a server, or a token would
                leave in plaintext.
            UnavailableError: nobody knows where the server is.
        """
        self.timeout_seconds = checked_timeout(timeout_seconds)
        self.retry = retry
        self.target = target
        self.security = security
        self.metadata = security.metadata
        self._locate = locate
        self._known = target if locate is None else locate(self.timeout_seconds)
        self._address = self._known  # of the channel, where another one may be known by now
        self._line = Line(self._opened)

    @property
    def channel(self) -> grpc.Channel:
        """The channel.

        Raises:
            InvalidRequestError: this is a forked child of the process that made the calls' client.
            ValueError: the channel is closed.
        """
        return self._line.channel

    def _opened(self) -> grpc.Channel:
        """Open a channel to the address that is known: all lines of the process wait meanwhile, and no file is read."""
        self._address = where = self._known
        # A proxy in the environment connects to its own loopback addresses, or refuses to.
        direct = [("grpc.enable_http_proxy", 0)] if is_on_this_host(where) else []
        address = grpc_target(where)
        self.security.check(where)
        keepalive = _KEEPALIVE if self._locate is None else _KEEPALIVE_OF_MOVING
        return self.security.channel(where, address, [*_OPTIONS, *keepalive, *direct])

    def followed(self, error: StepwireError, deadline: Deadline) -> StepwireError:
        """Go where the server is now, after an error that may mean that it has moved.

        Args:
            error: the error of a call.
            deadline: that of the call; the look ends with it.

        Returns:
            The error to raise. A server that was overtaken is not reached any more, so that its call is repeated; one
            that stays at its target is the caller's to choose. A session that is in another epoch at the same address
            has come back there.
        """
        if self._locate is None or error.reason not in _OF_MOVES:
            return error
        with contextlib.suppress(UnavailableError):
            self._known = self._locate(min(deadline.remaining(), _LOOK_SECONDS))
            if self._known != self._address:
                self._line.rest()
        is_old = error.reason is Reason.NOT_PRIMARY
        if not is_old and not (error.reason is Reason.STALE_EPOCH and self._known != self._address):
            return error
        return UnavailableError(f"{error}; the newer one is looked for", reason=Reason.UNREACHABLE)

    def seconds(self, timeout_seconds: float | None) -> float:
        """Return the seconds of a deadline; None means the client's default."""
        return self.timeout_seconds if timeout_seconds is None else checked_timeout(timeout_seconds)

    def deadline(self, timeout_seconds: float | None) -> Deadline:
        """Start a deadline; None means the client's default."""
        return self.retry.deadline(self.seconds(timeout_seconds))

    def once(self, method: str, request: Any, response: Any, seconds: float) -> Any:
        """Call a unary method once, and again only if a fork cut the call; return its decoded response.

        Raises:
            StepwireError: the server's refusal, or no connection.
            ValueError: the channel is closed.
        """
        while True:
            count = forks.count
            try:
                with self.translated():
                    call: Any = self.channel.unary_unary(
                        _SERVICE + method, request_serializer=None, response_deserializer=response.FromString
                    )
                    return call(request.SerializeToString(), timeout=seconds, metadata=self.metadata)
            except UnavailableError:
                if count == forks.count:
                    raise

    def unary(self, method: str, request: Any, response: Any, timeout: float | Deadline | None = None) -> Any:
        """Call a unary method, again if need be, and return its decoded response.

        Args:
            method: the name of the method.
            request: the request.
            response: the class of the response.
            timeout: seconds; or a deadline of more than this call, whose end ends the call; None for the default.

        Raises:
            StepwireError: the server's refusal, or no connection within the deadline.
        """
        data = request.SerializeToString()

        def attempt(deadline: Deadline) -> Any:
            call: Any = self.channel.unary_unary(
                _SERVICE + method, request_serializer=None, response_deserializer=response.FromString
            )
            return _result(call.future(data, timeout=deadline.remaining(), metadata=self.metadata), deadline)

        return self._repeat(attempt, timeout if isinstance(timeout, Deadline) else self.deadline(timeout))

    def download(self, method: str, request: Any, read: Callable[[Iterator[bytes]], _T], deadline: Deadline) -> _T:
        """Call a server-streaming method once and hand its messages, undecoded, to `read`."""
        with self.translated():
            call: Any = self.channel.unary_stream(
                _SERVICE + method, request_serializer=None, response_deserializer=None
            )
            stream = call(request.SerializeToString(), timeout=deadline.remaining(), metadata=self.metadata)
            try:
                with deadline.within(stream.cancel):
                    return read(stream)
            finally:
                stream.cancel()

    def stream(self, method: str, request: bytes) -> Any:
        """Begin a server-streaming method, and return the iterator of its messages, undecoded; it has `cancel`."""
        call: Any = self.channel.unary_stream(_SERVICE + method, request_serializer=None, response_deserializer=None)
        return call(request, metadata=self.metadata)

    def upload(self, method: str, frames: Iterable[bytes], response: Any, deadline: Deadline) -> Any:
        """Call a client-streaming method once and return its decoded response."""
        with self.translated():
            call: Any = self.channel.stream_unary(
                _SERVICE + method, request_serializer=None, response_deserializer=response.FromString
            )
            future = call.future(iter(frames), timeout=deadline.remaining(), metadata=self.metadata)
            return _result(future, deadline)

    def close(self) -> None:
        """Close the channel. Closing twice is harmless."""
        self._line.close()

    def _repeat(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        def translated(deadline: Deadline) -> _T:
            try:
                with self.translated():
                    return attempt(deadline)
            except StepwireError as error:
                raise self.followed(error, deadline) from None

        return self.retry.call(translated, deadline)

    def _refused_handshake(self) -> str | None:
        return refused_handshake(self._address, self.security.tls)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn errors of gRPC within a block into ours.

        Raises:
            StepwireError: the error of the call.
            ValueError: the channel is closed.
        """
        try:
            yield
        except grpc.RpcError as error:
            raise with_remedy(error_from_call(error), self._address, look=self._refused_handshake) from None
        except grpc.FutureCancelledError:
            raise UnavailableError("the call was given up by its caller") from None
        except ValueError as error:  # of a channel that was closed
            raise self._line.broken(error) from None


def _result(future: Any, deadline: Deadline) -> Any:
    """Wait for a call that ends with its deadline, or before, when its caller leaves."""
    with deadline.within(future.cancel):
        return future.result()


def checked_timeout(seconds: float) -> float:
    """Return a timeout in seconds; a longer one than any program runs is the longest.

    Raises:
        InvalidRequestError: the timeout is not a positive number.
    """
    if isinstance(seconds, int) and seconds > _LONGEST_SECONDS:  # perhaps beyond every float
        return _LONGEST_SECONDS
    try:
        plain = number(seconds, "timeout")
    except InvalidRequestError:
        plain = math.nan
    if not plain > 0:
        raise InvalidRequestError.of("timeout", f"{seconds!r} is not a positive number of seconds")
    return min(plain, _LONGEST_SECONDS)
