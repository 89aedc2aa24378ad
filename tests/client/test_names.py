"""Names and other texts, of any characters: they arrive as they are, or are refused in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import InvalidRequestError

ONE = np.ones(3, np.float32)
NAMES = {
    "umlaut": "schicht/größe",
    "combining": "e\u0301",
    "a family, joined": "👨\u200d👩\u200d👧",
    "a flag, of tags": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "a word of Persian": "نمی\u200cخواهم",
    "zero width space": "a\u200bb",
    "byte order mark": "\ufeffa",
    "private use": "\ue000",
    "unassigned": "\u0378",
    "last": "\U0010ffff",
    "512 of four bytes": "🔥" * 512,
}
LONE = "a\ud800"
OF_BYTES = os.fsdecode(b"a\xff")


def test_a_name_of_any_characters_steps(client: stepwire.Client) -> None:
    parameters = dict.fromkeys(NAMES.values(), ONE)
    with client.create_session(parameters, label=NAMES["a family, joined"]) as session:
        assert list(session.step(parameters)) == list(NAMES.values())
        assert session.info().label == NAMES["a family, joined"]
        for name in NAMES.values():
            broken = parameters | {name: np.float32([1, np.nan, 1])}
            with pytest.raises(stepwire.NonFiniteGradientError) as refused:
                session.step(broken)
            assert refused.value.metadata["tensor"] == name


@pytest.mark.parametrize("name", ["\u202ex", "\u2066x", "a\u2028b", "a\nb", "\x1b[2J"], ids=ascii)
def test_a_name_that_controls_a_terminal_is_refused(client: stepwire.Client, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"has the character U\+.*; leave it out"):
        client.create_session({name: ONE})


PLACES: dict[str, Callable[[stepwire.Client, Any], Any]] = {
    "parameters": lambda client, text: client.create_session({text: ONE}),
    "label": lambda client, text: client.create_session({"w": ONE}, label=text),
    "device": lambda client, text: client.create_session({"w": ONE}, device=text),
    "request_id": lambda client, text: client.create_session({"w": ONE}, request_id=text),
    "session_id": lambda client, text: client.session(text),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_text_that_utf8_lacks_is_refused_by_its_place(client: stepwire.Client, place: str) -> None:
    for text in (LONE, OF_BYTES):
        with pytest.raises(InvalidRequestError, match=f"^{place}: .* has the surrogate .* at 1, which UTF-8"):
            PLACES[place](client, text)
    with pytest.raises(InvalidRequestError, match=f"{place}: .*7.* is not a string"):
        PLACES[place](client, 7)


def test_an_unknown_name_with_a_surrogate_is_unknown(client: stepwire.Client) -> None:
    """Nothing of these is sent; the errors can be printed."""
    with client.create_session({"w": ONE}) as session:
        for refused in (
            lambda: session.step({LONE: ONE}),
            lambda: session.step({"w": ONE}, reply_first=[LONE]),
            lambda: client.create_session({"w": ONE}, frozen=[LONE]),
            lambda: client.create_session({"w": ONE}, groups=[{"params": [LONE]}]),
            lambda: client.create_session({"w": ONE}, non_finite=LONE),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidRequestError) as error:
                refused()
            str(error.value).encode()
