"""The refusal of a parent's objects in a child."""

from __future__ import annotations

import os
import re

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.lifetimes.forks import Birthplace


def test_an_object_is_used_in_its_own_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    birthplace, own = Birthplace(), os.getpid()
    birthplace.check("session", "make one in the child")
    assert birthplace.is_here
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    assert not birthplace.is_here
    refused = f"session: the session is of process {own}, and this is its forked child {own + 1}; make one in the child"
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(refused)}$"):
        birthplace.check("session", "make one in the child")
