"""The workers of a session: the client that may step it now, and streams that still believe they may.

A hold of a worker is an object, and a step keeps the one that it began under. The session compares it by identity at
the moment of the commit, so nothing commits that began under an older hold, whatever brings it: a stream, a unary call
or a load. Each hold has the next generation: it is Kleppmann's fencing token. It travels as the `attach_token`, which
tells nothing of it (`attach_tokens`).

A client that attaches again after a broken connection gets a new hold too. Its own older streams and calls may still be
on their way, and must not act on the client's next steps. The reply with the new token may be lost as well. So any
token that the client had since it acquired the worker attaches; only the newest one steps and loads in calls. An attach
that was delayed displaces a stream of its own client at worst: the client attaches again, and no step is lost.
An older token in a call is told apart in the same way: of its own client, or of one that is fenced. The first attach
has no token, and may be delayed as well. So it has a number, which the client sends again with each attempt.
"""

from __future__ import annotations

from stepwire.errors import FencedError, Reason, StepwireError, UnavailableError
from stepwire_server.sessions.attach_tokens import AttachTokens
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.steps.step import Hold

__all__ = ["FIRST_GENERATION", "Holder", "Worker"]

FIRST_GENERATION = 1
"""The generation of a worker's first hold."""

_GENERATIONS = 1 << 32
"""More holds than a worker has in one epoch."""


class Holder:
    """One hold of a worker. Compared by identity.

    Attributes:
        worker: the worker's number.
        generation: the number of the hold. It never leaves the server.
        acquired: the generation in which this client took the worker from another one.
        stream: the attached stream; None where calls alone step.
        token: the client's `attach_token`; 0 for a hold of an earlier server, whose token its client knows.
        acquisition: the client's number of the attempts to take the worker; 0 for one without.
    """

    __slots__ = ("acquired", "acquisition", "generation", "stream", "token", "worker")

    def __init__(
        self, worker: int, generation: int, acquired: int, stream: ClientStream | None, token: int = 0
    ) -> None:
        """Describe a hold."""
        self.worker = worker
        self.generation = generation
        self.acquired = acquired
        self.stream = stream
        self.token = token
        self.acquisition = 0

    @property
    def transport(self) -> str:
        """The way that steps under this hold come; see `Committed`."""
        stream = self.stream
        return "unary" if stream is None else stream.transport


class Worker:
    """One worker of a session. The session serialises its calls."""

    def __init__(self, index: int, tokens: AttachTokens) -> None:
        """Start without a holder; the first hold has generation 1."""
        self.index = index
        self._tokens = tokens
        self.holder = Holder(index, 0, 0, None)
        self._waiting: ClientStream | None = None

    @property
    def attached(self) -> bool:
        """A stream is attached."""
        return self.holder.stream is not None

    def acquire(self, stream: ClientStream | None = None, acquisition: int = 0) -> Holder:
        """Give the worker to a new client and fence the one before.

        Args:
            stream: the stream of the client.
            acquisition: the client's number of its attempts. Another attempt of the present holder renews the hold.
        """
        former, generation = self.holder, self.holder.generation + 1
        again = acquisition != 0 and acquisition == former.acquisition
        holder = self._hold(generation, former.acquired if again else generation, stream)
        holder.acquisition = acquisition
        return holder

    def renew(self, token: int, stream: ClientStream) -> Holder:
        """Give the worker to a new stream of the client that holds it.

        Raises:
            FencedError: another client holds the worker.
        """
        self.check_client(token)
        acquisition = self.holder.acquisition
        holder = self._hold(self.holder.generation + 1, self.holder.acquired, stream)
        holder.acquisition = acquisition
        return holder

    def restore(self, acquired: int, epoch: int) -> None:
        """Go on from the hold of an earlier server; its client attaches with any token that it had since then.

        Each epoch has a range of generations of its own: renewals of a hold are not recorded.

        Args:
            acquired: the generation in which the client acquired the worker.
            epoch: the epoch of this server, newer than that of any token.
        """
        self.holder = Holder(self.index, max(epoch * _GENERATIONS, acquired), acquired, None)

    def resume(self, generation: int) -> None:
        """Go on from a hold of this server, whose session was parked."""
        self.holder = Holder(self.index, generation, self.holder.acquired, None)

    def check_client(self, token: int) -> None:
        """Refuse a client that has lost the worker; any token since it acquired the worker will do.

        Raises:
            FencedError: another client holds the worker.
        """
        if not self._is_of_client(self._tokens.generation(self.index, token)):
            raise self._fenced()

    def holder_of(self, token: int) -> Holder:
        """Return the present hold to a call that brings its token.

        Raises:
            FencedError: another client holds the worker, or the token was never given out.
            UnavailableError: the token is an older one of the client that holds the worker.
        """
        if token == self.holder.token and token:
            return self.holder
        generation = self._tokens.generation(self.index, token)
        if generation == self.holder.generation and generation:
            return self.holder
        raise self._displaced() if self._is_of_client(generation) else self._fenced()

    def check(self, holder: Hold) -> None:
        """Refuse everybody but the present holder.

        Raises:
            FencedError: another client holds the worker.
            UnavailableError: a newer stream of the same client does.
        """
        if holder is self.holder:
            return
        if holder.acquired != self.holder.acquired:
            raise self._fenced()
        raise self._displaced()

    def detach(self, stream: ClientStream) -> None:
        """Forget a stream that has ended."""
        if self.holder.stream is stream:
            self.holder.stream = None
        if self._waiting is stream:
            self._waiting = None

    def end(self, error: StepwireError) -> None:
        """End the streams with an error: the session is gone."""
        for stream in (self.holder.stream, self._waiting):
            if stream is not None:
                stream.end(error)

    def _hold(self, generation: int, acquired: int, stream: ClientStream | None) -> Holder:
        """Make a hold; a silent stream of an older one is cancelled by the sweep, and no more than one waits for it."""
        if (former := self.holder.stream) is not None:
            if self._waiting is not None:
                self._waiting.cancel()
            self._waiting = former
            former.orphaned = True
            if stream is not None and stream.surplus:  # the server has no room for both
                former.cancel()
        self.holder = Holder(self.index, generation, acquired, stream, self._tokens.token(self.index, generation))
        return self.holder

    def _is_of_client(self, generation: int) -> bool:
        """Tell whether a hold was given to the client that holds the worker, since it acquired the worker."""
        return 0 < self.holder.acquired <= generation <= self.holder.generation

    def _displaced(self) -> UnavailableError:
        return UnavailableError(
            f"worker {self.index} is held by a newer stream of this client; nothing was applied, attach again to go on",
            reason=Reason.STREAM_DISPLACED,
            metadata={"worker": self.index},
        )

    def _fenced(self) -> FencedError:
        return FencedError(
            f"worker {self.index} is held by another client; attach with `take_over=True` to acquire it again "
            "(on the wire: without an attach token)",
            reason=Reason.FENCED,
            metadata={"worker": self.index},
        )
