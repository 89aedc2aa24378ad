"""The tokens of holds: each leads back to its hold, and tells nobody else anything."""

from __future__ import annotations

import collections

from hypothesis import given
from hypothesis import strategies as st

from stepwire_server.sessions.attach_tokens import AttachTokens

GENERATIONS = st.integers(1, 2**64 - 1)


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), GENERATIONS)
def test_a_token_leads_back_to_its_hold(key: bytes, worker: int, generation: int) -> None:
    tokens = AttachTokens()
    tokens.adopt(key)
    token = tokens.token(worker, generation)
    assert 0 < token < 2**64
    assert tokens.generation(worker, token) == generation


@given(GENERATIONS)
def test_every_number_but_0_is_the_token_of_one_hold(token: int) -> None:
    tokens = AttachTokens()
    generation = tokens.generation(3, token)
    assert 0 < generation < 2**64
    assert tokens.token(3, generation) == token


def test_0_is_no_token_and_is_given_to_nobody() -> None:
    """The hold that the permutation maps to 0 gets the token that 0 is mapped to."""
    tokens = AttachTokens()
    assert tokens.generation(0, 0) == 0
    hold = tokens._back(0, 0)
    assert tokens._permuted(0, hold, range(8)) == 0
    token = tokens.token(0, hold)
    assert token == tokens._permuted(0, 0, range(8)) != 0
    assert tokens.generation(0, token) == hold


def test_the_tokens_of_neighbours_workers_and_sessions_have_nothing_in_common() -> None:
    """Of 64 bits, 32 differ between two of them on average; the mean of 2,000 is within 1 of that."""
    one, another = AttachTokens(), AttachTokens()
    pairs = [
        (one.token(worker, number), other)
        for number in range(1, 335)
        for worker in (0, 1)
        for other in (one.token(worker, number + 1), one.token(worker + 1, number), another.token(worker, number))
    ]
    mean = sum((left ^ right).bit_count() for left, right in pairs) / len(pairs)
    assert abs(mean - 32) < 1
    bits = collections.Counter(bit for left, _ in pairs for bit in range(64) if left >> bit & 1)
    assert all(0.35 < bits[bit] / len(pairs) < 0.65 for bit in range(64))


def test_an_adopted_key_gives_the_same_tokens_and_an_empty_one_changes_nothing() -> None:
    one, another = AttachTokens(), AttachTokens()
    before = one.token(0, 1)
    one.adopt(b"")
    assert one.token(0, 1) == before != another.token(0, 1)
    another.adopt(one.key)
    assert another.token(0, 1) == before
