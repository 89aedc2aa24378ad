"""The command: what it prints, and its exit codes."""

from __future__ import annotations

import json
import pathlib
import socket
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer

import stepwire
from stepwire_server.cli import main as cli
from stepwire_server.cli.sessions import own_target


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_as_it_was: None
) -> Callable[..., Outcome]:
    """Run the command as the script does: arguments in, exit code and both outputs back."""
    for name in ("STEPWIRE_TARGET", "STEPWIRE_CONFIG", "STEPWIRE_BIND"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["stepwire", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def session(server: Any) -> Any:
    """A session one step old, with a label."""
    with stepwire.connect(server.target) as client:
        parameters = {"w": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
        with client.create_session(parameters, label="nightly [run]") as session:
            session.step(parameters)
            yield session


def test_the_version_is_printed(command: Any) -> None:
    assert command("version") == Outcome(0, f"stepwire {stepwire.__version__}\n", "")
    code, out, _ = command("version", "--json")
    assert (code, json.loads(out)) == (0, {"version": stepwire.__version__})


@pytest.mark.parametrize("arguments", [(), ("sessions",)])
def test_without_a_command_help_is_printed(command: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert code in (0, 2)
    assert "Usage: " in out + err
    assert "sessions" in out + err


@pytest.mark.parametrize(
    "arguments", [("fly",), ("health", "--wings"), ("sessions", "show"), ("serve", "--threads", "x")]
)
def test_a_command_that_is_none_is_refused_with_usage(command: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")


def test_a_healthy_server_is_reported(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("health", "--target", server.target)
    assert (code, err) == (0, "")
    assert out.startswith(f"{server.target}: serving, version {stepwire.__version__}, ")
    assert out.endswith(" sessions on cpu\n")
    code, out, _ = command("health", "-t", server.target, "--json")
    info = json.loads(out)
    assert (code, info["version"], info["draining"], list(info["devices"])) == (
        0,
        stepwire.__version__,
        False,
        ["cpu"],
    )
    assert info["sessions"] >= 1


def test_the_target_may_come_from_the_environment(command: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_TARGET", server.target)
    assert command("health").code == 0


def test_the_server_beside_is_asked_where_no_target_is_named(
    command: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_BIND", f"0.0.0.0:{server.port}")
    assert command("health").out.startswith(f"localhost:{server.port}: serving, ")


@pytest.mark.parametrize(
    ("bind", "target"),
    [
        (None, "localhost:50051"),
        ("", "localhost:50051"),
        ("127.0.0.1:0", "localhost:50051"),
        ("0.0.0.0:7", "localhost:7"),
        ("[::]:7", "localhost:7"),
        ("10.0.0.1:7", "10.0.0.1:7"),
        ("unix:/run/x", "unix:/run/x"),
    ],
)
def test_where_the_server_beside_is(bind: str | None, target: str) -> None:
    assert own_target({} if bind is None else {"STEPWIRE_BIND": bind}) == target


def test_a_draining_server_is_unhealthy(command: Any, serve: Any) -> None:
    with serve() as server:
        server.drain()
        code, out, _ = command("health", "-t", server.target)
        assert (code, f"{server.target}: draining, " in out) == (1, True)
        code, out, _ = command("health", "-t", server.target, "--json")
        assert (code, json.loads(out)["draining"]) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("health",),
        ("sessions", "list"),
        ("sessions", "show", "x"),
        ("sessions", "close", "x"),
        ("health", "--json"),
        ("doctor",),
    ],
)
def test_a_server_that_cannot_be_reached_is_one_line_and_exit_code_2(command: Any, arguments: tuple[str, ...]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = command(*arguments, "--target", target, "--timeout", "0.2")
    assert (code, out) == (2, "")
    assert err.startswith("stepwire: ")
    assert err.count("\n") == 1


def test_sessions_are_listed(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("sessions", "list", "-t", server.target, "--json")
    (entry,) = [entry for entry in json.loads(out) if entry["session_id"] == session.session_id]
    assert (code, err) == (0, "")
    assert (entry["label"], entry["applied_step"], entry["durable_step"]) == ("nightly [run]", 1, 0)
    assert (entry["memory_bytes"], entry["device"], entry["attached"]) == (120, "cpu", True)
    assert entry["create_time"] < entry["expire_time"]


def test_sessions_are_listed_in_a_table(
    command: Any, server: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are text, never markup."""
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = command("sessions", "list", "-t", server.target)
    (row,) = [line for line in out.splitlines() if session.session_id in line]
    assert (code, "nightly [run]" in row) == (0, True)


def test_a_session_is_shown(command: Any, server: Any, session: Any) -> None:
    code, out, err = command("sessions", "show", session.session_id, "-t", server.target, "--json")
    entry = json.loads(out)
    assert (code, err) == (0, "")
    assert (entry["session_id"], entry["tensors"]) == (session.session_id, {"w": [2, 3], "b": [4]})
    assert (entry["applied_step"], entry["ready"]) == (1, True)
    code, out, _ = command("sessions", "show", session.session_id, "-t", server.target)
    assert code == 0
    assert f"    session_id  {session.session_id}\n" in out


def test_a_session_is_closed(command: Any, server: Any, session: Any) -> None:
    code, out, _ = command("sessions", "close", session.session_id, "-t", server.target, "--json")
    assert (code, json.loads(out)) == (0, {"session_id": session.session_id, "applied_step": 1})
    with pytest.raises(stepwire.SessionNotFoundError):
        session.info()
    code, out, err = command("sessions", "close", session.session_id, "-t", server.target)
    assert (code, out) == (2, "")
    assert err.startswith(f"stepwire: session {session.session_id!r} does not exist here")


def test_closing_is_told_in_words(command: Any, server: Any, session: Any) -> None:
    outcome = command("sessions", "close", session.session_id, "-t", server.target)
    assert outcome == Outcome(0, f"closed {session.session_id} at step 1\n", "")


BAD_SETTINGS = {
    "no address": (("--bind", "nowhere"), "bind: 'nowhere' is not host:port or unix:/path"),
    "no socket": (
        ("--bind", "127.0.0.1:0", "--unix-socket", "/" + "x" * 107),
        "has 108 bytes, and a Unix socket's at most 107",
    ),
    "two sockets": (("--bind", "unix:/x", "--unix-socket", "/y"), "unix_socket: '/y' is a second one beside bind"),
    "no processes": (("--processes", "0"), "settings: Expected `int` >= 1"),
    "plaintext": (("--bind", "0.0.0.0:0"), "is not a loopback address"),
    "no device": (("--device", "tpu"), "settings: Expected `str` matching regex"),
    "no sessions": (("--max-sessions", "0"), "settings: Expected `int` >= 1"),
    "negative memory": (("--memory-budget=-1",), "settings: Expected `int` >= 0"),
    "no level": (("--log-level", "loud"), "settings: Invalid enum value 'loud'"),
    "endless drain": (("--drain-seconds", "inf"), "settings: Expected `float` <= "),
    "no file": (("--config", "/nonexistent/server.toml"), "settings file '/nonexistent/server.toml': "),
}


@pytest.mark.parametrize("what", BAD_SETTINGS)
def test_bad_settings_are_one_line_and_exit_code_2(command: Any, what: str) -> None:
    arguments, text = BAD_SETTINGS[what]
    code, out, err = command("serve", "--device", "cpu", "--log-level", "error", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("stepwire: ")
    assert text in err
    assert err.count("\n") == 1


def test_a_bad_variable_is_one_line_and_exit_code_2(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_MAX_SESION", "3")
    code, out, err = command("serve")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("stepwire: environment variable STEPWIRE_MAX_SESION is unknown; use one of: ")


def test_a_bad_value_is_told_with_its_variable(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_THREADS", "many")
    code, out, err = command("serve")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert ": STEPWIRE_THREADS is 'many'; " in err
    code, _, err = command("serve", "--threads", "-1")
    assert (code, ": flag threads is -1; " in err) == (2, True)


def test_a_cache_directory_that_cannot_be_used_is_one_line_and_exit_code_2(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEPWIRE_CACHE_DIR", str(tmp_path / "file"))
    code, out, err = command("serve", "--device", "cpu", "--bind", "127.0.0.1:0")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"stepwire: STEPWIRE_CACHE_DIR: '{tmp_path}/file' cannot be used by user ")


def test_kernels_are_compiled_ahead(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    from stepwire_server.engines import ahead

    monkeypatch.setattr(ahead, "make", lambda directory: ["x86-64-v3"] if directory == tmp_path else [])
    assert command("kernels", str(tmp_path)) == Outcome(0, f"{tmp_path}: kernels for x86-64-v3\n", "")
    code, out, _ = command("kernels", "elsewhere", "--json")
    assert (code, json.loads(out)) == (0, {"levels": []})


def test_a_demo_against_a_running_server_has_that_servers_device(command: Any) -> None:
    code, out, err = command("demo", "--target", "127.0.0.1:1", "--device", "cpu")
    assert (code, out, "--device is of a server that is started" in err) == (2, "", True)


def test_a_port_that_is_taken_is_one_line_and_exit_code_2(command: Any, server: Any) -> None:
    code, out, err = command("serve", "--bind", server.target, "--device", "cpu", "--log-level", "error")
    assert (code, out) == (2, "")
    assert f"stepwire: bind: cannot listen on '{server.target}'" in err


def test_the_doctor_finds_a_machine_fit_to_serve(command: Any) -> None:
    code, out, err = command("doctor", "--device", "cpu", "--bind", "127.0.0.1:0")
    assert (code, err) == (0, "")
    assert "ok      device         no GPU is asked for (--device cpu)\n" in out
    assert "ok      port           127.0.0.1:0 takes a free one\n" in out


def test_the_doctor_exits_with_1_where_something_needed_is_missing(command: Any, server: Any) -> None:
    code, out, err = command("doctor", "--device", "cpu", "--bind", server.target)
    assert (code, err) == (1, "")
    assert f"WRONG   port           {server.target} cannot be listened on: Address already in use\n" in out
    assert "                       -> see who listens with: ss -ltnp 'sport = :" in out


def test_a_gpu_is_needed_only_where_it_is_asked_for(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    auto = command("doctor", "--bind", "127.0.0.1:0")
    assert (auto.code, "note    cupy           CuPy cannot be imported: " in auto.out) == (0, True)
    cuda = command("doctor", "--bind", "127.0.0.1:0", "--device", "cuda")
    assert (cuda.code, "WRONG   cupy           CuPy cannot be imported: " in cuda.out) == (1, True)


def test_the_doctor_answers_programs_and_reads_the_settings_of_serve(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_DEVICE", "cpu")
    monkeypatch.setenv("STEPWIRE_BIND", "nowhere")
    code, out, _ = command("doctor", "--json")
    answer = json.loads(out)
    assert (code, answer["healthy"]) == (1, False)
    (port,) = [finding for finding in answer["findings"] if finding["check"] == "port"]
    assert port == {
        "check": "port",
        "ok": False,
        "detail": "'nowhere' is not host:port",
        "remedy": "--bind 127.0.0.1:50051",
        "optional": False,
    }


def test_the_doctor_tries_the_ways_to_a_server(command: Any, server: Any) -> None:
    code, out, err = command("doctor", "--target", server.target)
    assert (code, err) == (0, "")
    assert "ok      uds            works\nok      tcp            works\n" in out
    code, out, _ = command("doctor", "-t", server.target, "--json")
    answer = json.loads(out)
    assert (code, answer["healthy"]) == (0, True)
    assert [finding["check"] for finding in answer["findings"]][-2:] == ["tcp", "in use"]


def test_the_doctor_refuses_bad_settings_as_serve_does(command: Any) -> None:
    code, out, err = command("doctor", "--device", "tpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("stepwire: settings: Expected `str` matching regex")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("123", 123),
        ("8G", 8 << 30),
        ("512MiB", 512 << 20),
        ("512mb", 512 << 20),
        ("1.5k", 1536),
        (" 2T ", 2 << 40),
        ("7B", 7),
    ],
)
def test_bytes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert cli.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "G", "many", "8X", "1e999", "inf", "nan", "8GG", "0x10"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a number of bytes such as 8G or 512MiB"):
        cli.parse_bytes(text)


def test_the_module_is_the_command(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["stepwire", "version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("stepwire_server", run_name="__main__")
    assert not ended.value.code


def test_every_setting_of_a_flag_is_a_setting() -> None:
    """Flags are handed to the settings by name."""
    import inspect

    from stepwire_server.config import ServerConfig

    flags = set(inspect.signature(cli.serve).parameters) - {"config", "memory_budget"}
    assert flags <= set(ServerConfig.__struct_fields__)
    assert pathlib.Path(cli.__file__).name == "cli.py"
