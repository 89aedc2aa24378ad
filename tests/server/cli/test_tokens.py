"""`stepwire token`: made once, listed without secrets, revoked for good."""

from __future__ import annotations

import json
import pathlib

from typer.testing import CliRunner

from stepwire_server.access.tokens import TokenFile
from stepwire_server.cli.main import app

runner = CliRunner()


def test_a_token_is_shown_once_and_works_until_it_is_revoked(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tokens"
    made = runner.invoke(app, ["token", "create", "ann", "--file", str(path), "--tenant", "lab", "--expires", "90d"])
    assert made.exit_code == 0, made.output
    token = made.stdout.strip()
    file = TokenFile(path)
    identity = file.find(token)
    assert identity is not None
    assert (identity.name, identity.tenant, identity.role) == ("ann", "lab", "trainer")
    assert token not in path.read_text()
    again = runner.invoke(app, ["token", "create", "eve", "--role", "reader", "--file", str(path)])
    listed = runner.invoke(app, ["token", "list", "--json", "--file", str(path)])
    assert [(each["name"], each["role"]) for each in json.loads(listed.stdout)] == [
        ("ann", "trainer"),
        ("eve", "reader"),
    ]
    assert again.stdout.strip() not in listed.stdout
    assert "never" in runner.invoke(app, ["token", "list", "--file", str(path)]).stdout
    assert runner.invoke(app, ["token", "revoke", "ann", "--file", str(path)]).exit_code == 0
    file.look()
    assert file.find(token) is None


def test_names_twice_unknown_names_and_times_that_are_none_are_refused(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "tokens")
    assert runner.invoke(app, ["token", "create", "ann", "--file", path]).exit_code == 0
    for arguments in (
        ["create", "ann"],
        ["create", "bob", "--expires", "soon"],
        ["create", "a b"],
        ["create", "bob", "--tenant", "a/b"],
        ["create", "bob", "--role", "king"],
        ["revoke", "bob"],
    ):
        assert runner.invoke(app, ["token", *arguments, "--file", path]).exit_code != 0, arguments
    listed = runner.invoke(app, ["token", "list", "--json", "--file", path])
    assert [each["name"] for each in json.loads(listed.stdout)] == ["ann"]
