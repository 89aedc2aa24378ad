"""Sessions for the tests of links."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import stepwire
from tests.client.links.made_sessions import START, Create


@pytest.fixture
def create(client: stepwire.Client) -> Iterator[Create]:
    """Make sessions of SGD with rate 1: the parameters are minus the sum of the gradients."""
    made = []

    def created(**options: Any) -> stepwire.Session:
        made.append(client.create_session(START, **{"optimizer": stepwire.SGD(lr=1.0)} | options))
        return made[-1]

    yield created
    for session in made:
        session.close()
