"""A worker slot: who may step a session now, and which streams still think they may.

Every taking of the slot gives out the next token, so a token tells its age: the newest is the holder's, an
older one is fenced (Kleppmann's fencing token). The holder may attach again with its token after a broken
connection. What a displaced stream tries next is refused by its token, with the reason; one that stays silent
is cancelled by the registry's sweep, and a slot keeps no more than one of those waiting.
"""

from __future__ import annotations

from stepwire.errors import FencedError, Reason
from stepwire_server.sessions.client_stream import Attachment

__all__ = ["FIRST_TOKEN", "Worker"]

FIRST_TOKEN = 1
"""What the first taking of a slot gives out."""


class Worker:
    """Worker `index` of a session. The session serialises its calls."""

    def __init__(self, index: int) -> None:
        """Start unheld; the first taking gets token 1."""
        self.index = index
        self.token = 0
        self._stream: Attachment | None = None
        self._displaced: Attachment | None = None

    @property
    def attached(self) -> bool:
        """A stream is attached."""
        return self._stream is not None

    def take(self) -> int:
        """Give the slot to a new holder and fence the one before."""
        self.token += 1
        return self.token

    def check(self, token: int) -> None:
        """Refuse everyone but the holder.

        Raises:
            FencedError: the token is not the newest.
        """
        if token != self.token:
            raise FencedError(
                f"worker {self.index} is held by another client (token {token}, now {self.token}); attach "
                "without a token to acquire it again",
                reason=Reason.FENCED,
                metadata={"worker": self.index, "token": token, "current_token": self.token},
            )

    def attach(self, attachment: Attachment, token: int) -> int:
        """Attach a stream: token 0 takes the slot, another must be the holder's. Returns the holder's token.

        Raises:
            FencedError: the token is not the newest.
        """
        if token:
            self.check(token)
        else:
            self.take()
        attachment.token = self.token
        self._displace()
        self._stream = attachment
        return self.token

    def detach(self, attachment: Attachment) -> None:
        """Forget a stream that has ended."""
        if self._stream is attachment:
            self._stream = None
        if self._displaced is attachment:
            self._displaced = None

    def orphan(self) -> None:
        """Leave the stream to find out that the session is gone."""
        if self._stream is not None:
            self._stream.orphaned = True

    def _displace(self) -> None:
        if self._stream is None:
            return
        if self._displaced is not None:
            self._displaced.cancel()
        self._displaced = self._stream
        self._displaced.orphaned = True
