"""The attach tokens of a session's holds: numbers that tell nothing, and that nobody can guess.

The server numbers the holds of a worker, and compares those numbers. They never leave it. A token is the number of its
hold in a keyed permutation of 64 bits: a Feistel network with BLAKE2b (Luby and Rackoff, 1988). So the server reads
the hold back from any token that it ever gave out, without a list of them. A number that was guessed reads back as that
of no hold: of 2**64 numbers, the holds of a worker are few.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

__all__ = ["KEY_BYTES", "AttachTokens"]

KEY_BYTES: Final = 16
"""The bytes of a key."""
_ROUNDS: Final = 8
_HALF_BYTES: Final = 4
_HALF_BITS: Final = 8 * _HALF_BYTES
_HALF: Final = (1 << _HALF_BITS) - 1


class AttachTokens:
    """The tokens of one session, by worker and generation.

    Attributes:
        key: the key of the permutation, 16 random bytes. It is on the disk with a durable session.
    """

    def __init__(self) -> None:
        """Choose a key."""
        self.key = secrets.token_bytes(KEY_BYTES)

    def adopt(self, key: bytes) -> None:
        """Go on with the key of an earlier server; an empty one changes nothing, and no earlier token is known then."""
        self.key = key or self.key

    def token(self, worker: int, generation: int) -> int:
        """Return the token of a hold, in [1, 2**64).

        Args:
            worker: the worker's index.
            generation: the number of the hold, in [1, 2**64).
        """
        token = self._permuted(worker, generation, range(_ROUNDS))
        # 0 stands for no token. The permutation is walked on, so that it maps the other numbers to one another.
        return token or self._permuted(worker, 0, range(_ROUNDS))

    def generation(self, worker: int, token: int) -> int:
        """Return the number of the hold that a token would be of; 0 for the token 0."""
        if not token:
            return 0
        number = self._back(worker, token)
        return number or self._back(worker, 0)

    def _back(self, worker: int, token: int) -> int:
        swapped = (token & _HALF) << _HALF_BITS | token >> _HALF_BITS
        number = self._permuted(worker, swapped, range(_ROUNDS)[::-1])
        return (number & _HALF) << _HALF_BITS | number >> _HALF_BITS

    def _permuted(self, worker: int, number: int, rounds: range) -> int:
        left, right = number >> _HALF_BITS, number & _HALF
        for index in rounds:
            left, right = right, left ^ self._round(worker, index, right)
        return left << _HALF_BITS | right

    def _round(self, worker: int, index: int, half: int) -> int:
        salt = worker.to_bytes(_HALF_BYTES, "little") + bytes([index])
        data = half.to_bytes(_HALF_BYTES, "little")
        return int.from_bytes(
            hashlib.blake2b(data, digest_size=_HALF_BYTES, key=self.key, salt=salt).digest(), "little"
        )
