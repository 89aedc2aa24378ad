"""The bases of the asynchronous classes, beside the generated methods: their threads, and their ends."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Self, TypeVar

from stepwire.aio.worker import Worker
from stepwire.client import Client
from stepwire.session import Session

__all__ = ["ClientBase", "SessionBase"]

_S = TypeVar("_S", bound="SessionBase")


class SessionBase:
    """The asynchronous face of one session.

    Attributes:
        blocking: the synchronous session, for its other methods; its calls block.
    """

    def __init__(self, session: Session) -> None:
        """Give a session a thread of its own."""
        self.blocking = session
        self._worker = Worker("stepwire-aio-session")
        self._home: ClientBase | None = None

    @property
    def session_id(self) -> str:
        """The session's id, the right to use the session. Reading it keeps it: see `keep`."""
        return self.blocking.session_id

    def _adopt(self, session: _S) -> _S:
        return session if self._home is None else self._home._adopt(session)

    async def settled(self) -> int:
        """Wait until no call is under way, and return the last step known to be applied.

        After a step whose await was cancelled, a larger number says that the step was applied.

        Raises:
            StepwireError: the error of that step; repeat it with the same gradients. Otherwise the next step raises the
                error.
        """
        applied = await self._worker.run(lambda: self.blocking.applied_step)
        self._worker.check_seen()
        return applied

    async def close(self) -> None:
        """End the session on the server and free its memory there. Closing twice is harmless.

        Waits for the call under way, if any. A server that cannot be reached ends the session when its lease runs out.
        """
        await self._worker.finish(self.blocking.close)

    async def __aenter__(self) -> Self:
        """Use the session for a block and end it after."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()


class ClientBase:
    """The asynchronous face of one client.

    Attributes:
        blocking: the synchronous client, for its other methods; its calls block.
    """

    def __init__(self, client: Client) -> None:
        """Give a client a thread of its own."""
        self.blocking = client
        self._worker = Worker("stepwire-aio-client")
        self._sessions: weakref.WeakSet[SessionBase] = weakref.WeakSet()
        self._workers: list[Worker] = []  # of sessions, which may be forgotten without being closed

    async def close(self) -> None:
        """Close the connection, and end the sessions made through it, unless they are kept. Twice is harmless.

        Waits for calls under way; the threads of its sessions end too. See `stepwire.Session.keep`.
        """
        await self._worker.finish(self._close)

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
        self.blocking.close()

    def _adopt(self, session: _S) -> _S:
        session._home = self
        self._workers = [worker for worker in self._workers if not worker.closed]
        self._workers.append(session._worker)
        self._sessions.add(session)
        weakref.finalize(session, session._worker.leave).atexit = False
        return session

    async def __aenter__(self) -> Self:
        """Use the client for a block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()
