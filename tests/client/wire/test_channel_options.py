"""How large messages are."""

from __future__ import annotations

import pytest

from stepwire.wire.channel_options import chunk_bytes_for

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("total_bytes", "expected"),
    [
        (0, 512 * KIB),
        (4 * KIB, 512 * KIB),
        (4 * MIB, 512 * KIB),
        (4 * MIB + 8, 1 * MIB),
        (16 * MIB, 2 * MIB),
        (17 * MIB, 4 * MIB),
        (128 * MIB, 4 * MIB),
        (1 << 40, 4 * MIB),
    ],
)
def test_a_model_is_sent_in_about_eight_messages_of_a_bounded_size(total_bytes: int, expected: int) -> None:
    assert chunk_bytes_for(total_bytes, 64 * MIB) == expected


@pytest.mark.parametrize("total_bytes", [0, 4 * MIB, 1 << 30])
def test_no_message_is_larger_than_the_servers_limit(total_bytes: int) -> None:
    assert chunk_bytes_for(total_bytes, 64 * KIB) == 64 * KIB
