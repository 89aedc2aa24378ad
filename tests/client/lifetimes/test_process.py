"""The label of this process in the listings of servers."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from stepwire.lifetimes.process import process_label


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("scripts/train.py", "train.py"),
        ("", "python"),
        ("-c", "-c"),
        ("scripts/\u00fcber\udcff\n.py", "?ber??.py"),
    ],
)
def test_a_label_has_the_host_the_process_and_the_script(
    monkeypatch: pytest.MonkeyPatch, script: str, shown: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--lr=1"])
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    assert process_label() == f"node7:{os.getpid()} {shown}"


def test_a_label_is_no_longer_than_the_contract_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x" * 500])
    assert len(process_label()) == 128
