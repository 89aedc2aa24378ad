"""Errors of connections and workers have a hint for users of an optimizer, and are unchanged for programs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

import stepwire
from stepwire.errors import DeadlineExceededError, FencedError, InvalidRequestError, Reason, UnavailableError
from stepwire.session import Session
from stepwire.torch.error_hints import with_hints
from stepwire.torch.options import RemoteOptions

HERE = RemoteOptions(server="host:1")


@pytest.mark.parametrize("kind", [UnavailableError, DeadlineExceededError])
def test_a_server_that_is_not_there_is_named(kind: type[UnavailableError]) -> None:
    cause = kind("refused", metadata={"worker": 0}, retry_after_seconds=2.0)
    with pytest.raises(kind, match=r"^server='host:1': refused; is it running \(stepwire serve\), and") as raised:
        with with_hints(HERE, None):
            raise cause
    assert (raised.value.reason, raised.value.metadata) == (cause.reason, {"worker": "0"})
    assert raised.value.retry_after_seconds == 2.0
    assert raised.value.__cause__ is cause


def test_a_server_that_went_away_may_come_back() -> None:
    with pytest.raises(UnavailableError, match="refused; try again once the server is there: .* not applied twice"):
        with with_hints(HERE, cast(Session, SimpleNamespace(session_id="abc"))):
            raise UnavailableError("refused")


def test_several_servers_and_a_client_are_named() -> None:
    with pytest.raises(UnavailableError, match=r"^server=\['a:1', 'b:2'\]: "):
        with with_hints(RemoteOptions(server=["a:1", "b:2"]), None):
            raise UnavailableError("refused")
    with stepwire.connect("host:9") as client, pytest.raises(UnavailableError, match=f"^server='{client.target}': "):
        with with_hints(RemoteOptions(server=client), None):
            raise UnavailableError("refused")


def test_an_optimizer_that_lost_its_session_can_attach_again() -> None:
    with pytest.raises(
        FencedError, match=r"attached to the session \(worker 0\).* make this optimizer again with session='abc'"
    ) as raised:
        with with_hints(HERE, cast(Session, SimpleNamespace(session_id="abc"))):
            raise FencedError("worker 0", reason=Reason.STALE_EPOCH)
    assert raised.value.reason == Reason.STALE_EPOCH


def test_other_errors_are_as_they_were() -> None:
    cause = InvalidRequestError("lr is -1")
    with pytest.raises(InvalidRequestError) as raised:
        with with_hints(HERE, None):
            raise cause
    assert raised.value is cause
