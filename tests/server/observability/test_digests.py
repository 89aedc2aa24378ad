"""Log lines have digests in the place of ids and tokens, whichever way they come."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from stepwire_server.observability.digests import digest_in_logs, without_secrets
from stepwire_server.observability.logs import configure_logging, logging_to_stderr

ID = "0123456789abcdef0123456789abcdef"
DIGEST = "~" + hashlib.sha256(ID.encode()).hexdigest()[:12]
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize("secret", [ID, "sw_" + "a-_Z" * 11, JWT], ids=["id", "token", "jwt"])
@pytest.mark.parametrize("text", ["{}", "session {} has gone", "/data/sessions/{}/checkpoints", "'{}'", "a={},b={}"])
def test_a_text_has_the_digest_in_the_place_of_the_secret(secret: str, text: str) -> None:
    assert without_secrets(text.format(secret, secret)) == text.format(*[digest_in_logs(secret)] * 2)


@pytest.mark.parametrize("text", ["", "sw_", "step 5", "ab" * 32, ID[:31], ID + "0", ID.upper(), "eyJ.x", DIGEST])
def test_other_texts_stay(text: str) -> None:
    assert without_secrets(text) == text


def raise_and_log() -> None:
    try:
        raise ValueError(f"session {ID} is broken")
    except ValueError as error:
        structlog.get_logger().error("unexpected", exc_info=error)


WAYS: dict[str, Callable[[], object]] = {
    "value": lambda: structlog.get_logger().info("attached", session_id=ID),
    "text": lambda: structlog.get_logger().warning("refused", problem=f"session {ID} does not exist here"),
    "trace": raise_and_log,
    "nested": lambda: structlog.get_logger().error("restored", norms={"a": [ID]}),
    "logging": lambda: logging.getLogger("stepwire_server.engines").warning("kernel of %s", ID),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.usefixtures("logging_as_it_was")
def test_no_line_of_the_command_has_an_id(capsys: Any, way: str, as_json: bool) -> None:
    configure_logging("debug", as_json)
    WAYS[way]()
    out, _ = capsys.readouterr()
    assert DIGEST in out and ID not in out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("logging_as_it_was")
def test_no_line_of_a_block_has_an_id(capsys: Any, way: str) -> None:
    structlog.reset_defaults()  # the program has not configured it
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # the program has none of its own
    try:
        with logging_to_stderr("debug"):
            WAYS[way]()
    finally:
        root.handlers = handlers
    _, err = capsys.readouterr()
    assert DIGEST in err and ID not in err
