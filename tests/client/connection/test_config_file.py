"""The client's config file: its place, its keys, its checks, and its rank below arguments and variables."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import stepwire
from stepwire.connection.config_file import ConfigFile, asked_target, read_config_file
from stepwire.connection.security import TLS, Security, security_of
from stepwire.transports.available import asked_transport

WHOLE = """
target = "trainer.example.com:50051"
transport = "tcp"
ca = "ca.pem"
cert = "/pki/client.pem"
cert_key = "~/client-key.pem"
token_file = "token"
"""


def written(folder: pathlib.Path, text: str) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def read(path: pathlib.Path) -> ConfigFile:
    return read_config_file({"STEPWIRE_CLIENT_CONFIG": str(path)})


def test_every_key_is_read_and_paths_are_of_the_files_folder(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, WHOLE)
    assert read_config_file({"STEPWIRE_CLIENT_CONFIG": str(path), "HOME": "/users/ann"}) == ConfigFile(
        target="trainer.example.com:50051",
        transport="tcp",
        ca=str(tmp_path / "ca.pem"),
        cert="/pki/client.pem",
        cert_key="/users/ann/client-key.pem",
        token_file=str(tmp_path / "token"),
    )


def test_the_file_is_found_in_the_users_config_folder(tmp_path: pathlib.Path) -> None:
    written(tmp_path / ".config" / "stepwire", 'target = "a:1"')
    written(tmp_path / "xdg" / "stepwire", 'target = "b:1"')
    assert read_config_file({"HOME": str(tmp_path)}).target == "a:1"
    assert read_config_file({"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}).target == "b:1"
    assert read_config_file({"HOME": str(tmp_path), "STEPWIRE_CLIENT_CONFIG": ""}) == ConfigFile()
    assert read_config_file({"HOME": str(tmp_path / "nobody")}) == read_config_file({}) == ConfigFile()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'tokenfile = "x"',
            "the key 'tokenfile' is unknown; use one of: target, transport, ca, cert, ",
        ),
        ('token = "sw_secret"', "the key 'token' is unknown; .* a file of its own: give token_file"),
        ("target = 50051", 'target is 50051; it must be text in quotes, such as "trainer.example.com:50051"'),
        ('transport = ""', "transport is ''; it must be text in quotes, such as \"tcp\""),
        ('ca = "ca.pem"\ncert = "c.pem"', "cert and cert_key go together; give both, or none"),
        ('cert = "c.pem"\ncert_key = "k.pem"', "cert needs ca"),
        ("target =", "it is no TOML: Invalid value"),
        ("x" * (65 << 10), "it has more than 65536 bytes"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_its_key_and_the_remedy(
    tmp_path: pathlib.Path, text: str, words: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(stepwire.InvalidRequestError, match=words) as refused:
        read(path)
    assert str(refused.value).startswith(f"client config {str(path)!r}: ")
    assert "sw_secret" not in str(refused.value)


def test_a_file_that_others_may_write_is_refused_and_a_named_one_that_is_missing_too(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, WHOLE)
    path.chmod(0o620)
    with pytest.raises(stepwire.InvalidRequestError, match="others may write it: `chmod go-w` it"):
        read(path)
    path.chmod(0o644)
    assert read(path).transport == "tcp"
    with pytest.raises(stepwire.InvalidRequestError, match="there is no such file; write it, or unset STEPWIRE_CLIENT"):
        read(tmp_path / "missing.toml")


def test_arguments_win_over_variables_and_variables_over_the_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "token").write_text("sw_file\n")
    file = ConfigFile("f:1", "uds", "ca.pem", "c.pem", "k.pem", str(tmp_path / "token"))
    assert asked_target("a:1", file, {"STEPWIRE_TARGET": "v:1"}) == "a:1"
    assert asked_target(None, file, {"STEPWIRE_TARGET": "v:1"}) == "v:1"
    assert asked_target(None, file, {}) == "f:1"
    assert asked_target(None, ConfigFile(), {}) == "localhost:50051"
    assert asked_transport("tcp", {"STEPWIRE_TRANSPORT": "shm"}, file) == "tcp"
    assert asked_transport("auto", {"STEPWIRE_TRANSPORT": "shm"}, file) == "shm"
    assert asked_transport("auto", {}, file) == "uds"
    variables = {"STEPWIRE_CA": "system", "STEPWIRE_TOKEN": "sw_variable"}
    assert security_of(TLS("own.pem"), "sw_own", variables, file) == Security(TLS("own.pem"), "sw_own")
    assert security_of(None, None, variables, file) == Security(TLS(), "sw_variable")
    assert security_of(None, None, {}, file) == Security(TLS("ca.pem", "c.pem", "k.pem"), "sw_file")
    assert security_of(False, "", {}, file) == Security(None, "")


def test_the_token_of_the_file_goes_to_its_own_target_alone() -> None:
    assert ConfigFile(target="a:1").protects(["a:1", "a:1"])
    assert not ConfigFile(target="a:1").protects(["a:1", "b:1"])
    assert ConfigFile().protects(["localhost:50051"])
    assert not ConfigFile().protects(["b:1"])


def test_a_client_takes_its_target_and_transport_from_the_file(
    target: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, f'target = "{target}"\ntransport = "tcp"\ntoken_file = "token"')
    (tmp_path / "token").write_text("sw_file")
    monkeypatch.setenv("STEPWIRE_CLIENT_CONFIG", str(path))
    monkeypatch.delenv("STEPWIRE_TARGET", raising=False)
    monkeypatch.delenv("STEPWIRE_TRANSPORT", raising=False)
    with stepwire.connect() as client:
        assert client.target == target
        ones = {"w": np.ones(1, np.float32)}
        with client.create_session(ones, optimizer=stepwire.SGD(lr=1.0)) as session:
            assert session.step(ones)["w"] == [0.0]
            assert session.transport.name == "tcp"
    # Another host gets no token of the file: else it would be refused, since it would leave in plaintext.
    stepwire.connect("elsewhere.example.com:1").close()
    with pytest.raises(stepwire.InvalidRequestError, match="the token would travel in the clear"):
        stepwire.connect("elsewhere.example.com:1", token="sw_own")
