"""`stepwire serve`: flags become settings, and a wrong one is one line and exit code 2."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.cli import serve as cli
from stepwire_server.config import ServerConfig
from stepwire_server.config.parse import SETTINGS
from stepwire_server.processes.port_file import write_ports

BAD_SETTINGS = {
    "no address": (("--bind", "nowhere"), "bind: 'nowhere' is not host:port or unix:/path"),
    "no socket": (
        ("--bind", "127.0.0.1:0", "--unix-socket", "/" + "x" * 107),
        "has 108 bytes, and a Unix socket's at most 107",
    ),
    "two sockets": (("--bind", "unix:/x", "--unix-socket", "/y"), "unix_socket: '/y' is a second socket beside bind"),
    "no processes": (("--processes", "0"), "--processes is '0'; it must be a whole number from 1 to 1024"),
    "plaintext": (("--bind", "0.0.0.0:0"), "is not a loopback address"),
    "no device": (
        ("--device", "gpu"),
        "--device is 'gpu'; it must be auto, cpu, cuda, or GPUs by number such as cuda:0 or cuda:0,cuda:2",
    ),
    "no sessions": (("--max-sessions", "0"), "--max-sessions is '0'; it must be a whole number from 1 up"),
    "negative memory": (
        ("--memory-budget=-1",),
        "--memory-budget is '-1'; it must be a number of bytes from 0 up, such as 8M",
    ),
    "no memory": (
        ("--memory-budget", "8X"),
        "--memory-budget is '8X'; it must be a number of bytes from 0 up, such as",
    ),
    "no number": (("--threads", "x"), "--threads is 'x'; it must be a whole number from 0 up"),
    "no level": (("--log-level", "loud"), "--log-level is 'loud'; it must be debug, info, warning or error"),
    "endless drain": (
        ("--drain-seconds", "inf"),
        "--drain-seconds is 'inf'; it must be a number of seconds above 0 and not above 1000000000",
    ),
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
    assert err == "stepwire: STEPWIRE_THREADS is 'many'; it must be a whole number from 0 up\n"
    code, _, err = command("serve", "--threads", "-1")
    assert (code, err) == (2, "stepwire: --threads is '-1'; it must be a whole number from 0 up\n")


def test_a_cache_directory_that_cannot_be_used_is_one_line_and_exit_code_2(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEPWIRE_CACHE_DIR", str(tmp_path / "file"))
    code, out, err = command("serve", "--device", "cpu", "--bind", "127.0.0.1:0")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"stepwire: STEPWIRE_CACHE_DIR: '{tmp_path}/file' cannot be used by user ")


def test_a_data_directory_that_cannot_be_made_is_one_line_and_exit_code_2(command: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = command(
        "serve",
        "--device",
        "cpu",
        "--bind",
        "127.0.0.1:0",
        "--data-dir",
        str(tmp_path / "file"),
        "--log-level",
        "error",
    )
    assert (code, out) == (2, "")
    assert err == f"stepwire: data_dir: '{tmp_path}/file' cannot be made: File exists; name a folder of this user\n"


def test_a_port_that_is_taken_is_one_line_and_exit_code_2(command: Any, server: Any) -> None:
    code, out, err = command("serve", "--bind", server.target, "--device", "cpu", "--log-level", "error")
    assert (code, out) == (2, "")
    assert f"stepwire: bind: cannot listen on '{server.target}'" in err


def test_a_bad_file_is_one_line_with_its_path_and_key(command: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text("thread = 3\n")
    code, out, err = command("serve", "--config", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"stepwire: settings file '{path}': the key 'thread' is unknown; use one of: bind, ")


def test_every_setting_is_a_flag_with_its_help_default_and_variable(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal of 80 columns, and with no name cut."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command("serve", "-h")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for setting in SETTINGS.values():
        known = setting.default not in (None, "")
        default = f"Default: {setting.text_of(setting.default)}. " if known else ""
        switch = f" / --no-{setting.flag[2:]}" if setting.unit == "switch" else f" <{setting.unit}>"
        assert f" {setting.flag}{switch} {setting.description} {default}Variable: {setting.variable}." in text


class LostServer:
    """A server that loses its device as soon as somebody asks to be told."""

    lost = True

    def __init__(self, settings: ServerConfig) -> None:
        self.settings = settings

    def __enter__(self) -> LostServer:
        return self

    def __exit__(self, *_: object) -> None:
        """The end of a process that does not come back is no close."""

    def on_lost(self, tell: Callable[[], None]) -> None:
        tell()

    def drain(self) -> bool:
        return True

    def hasten(self) -> None:
        """Nothing is waited for."""


def test_a_server_that_loses_its_device_ends_with_exit_code_75(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("stepwire_server.server.Server", LostServer)
    monkeypatch.setattr(cli, "_on_signals", lambda stop: None)
    monkeypatch.setattr(cli.gc, "freeze", lambda: None)
    monkeypatch.setattr(cli.heap, "configure", lambda: None)
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    cli._serve(ServerConfig())
    assert codes == [cli.RESTART_EXIT_CODE] == [75]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The settings that `serve` would have run a server with."""
    served: list[ServerConfig] = []

    def serve(config: ServerConfig) -> int:
        served.append(config)
        return 0

    monkeypatch.setattr(cli, "_serve", serve)
    return served


def test_flags_become_settings(command: Any, served: list[ServerConfig]) -> None:
    assert command("serve").code == 0
    arguments = ("--memory-budget", "8G", "--insecure", "--no-cuda-ipc", "--no-log-json", "--sweep-seconds", "2")
    assert command("serve", *arguments, "--parent-pid", "7", "--handoff-uids", "").code == 0
    default, chosen = served
    assert default == ServerConfig()
    assert chosen == ServerConfig(
        memory_budget=8 << 30, insecure=True, cuda_ipc=False, log_json=False, sweep_seconds=2.0, parent_pid=7
    )


def test_variables_of_kubernetes_are_ignored_with_one_line(
    command: Any, served: list[ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_PORT", "tcp://10.0.0.7:50051")
    monkeypatch.setenv("STEPWIRE_SERVICE_HOST", "10.0.0.7")
    code, out, err = command("serve", "--log-json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    line = json.loads(out)
    assert (line["event"], line["variables"]) == (
        "variables of kubernetes are ignored",
        ["STEPWIRE_PORT", "STEPWIRE_SERVICE_HOST"],
    )
    assert served == [ServerConfig(log_json=True)]


_PROGRAM = """
import signal, sys, threading, types
from stepwire_server.cli import serve
from stepwire_server.cli.main import main

class Stop(threading.Event):
    def wait(self, timeout=None):
        waits.set()
        return super().wait(timeout)

def end():
    waits.wait()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

sys.setswitchinterval(60.0)  # so `end` runs when the main thread lets go of the interpreter: as it blocks
waits = threading.Event()
serve.threading = types.SimpleNamespace(Event=Stop, Thread=threading.Thread)
threading.Thread(target=end, daemon=True).start()
sys.argv = ["stepwire", "serve", "--device", "cpu", "--bind", "127.0.0.1:0"]
main()
"""


def test_a_signal_ends_the_server_whichever_thread_gets_it() -> None:
    """The kernel gives a signal to any thread, and the main thread may be blocked."""
    command = [sys.executable, "-c", _PROGRAM]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_a_server_without_an_output_serves_and_ends_as_always(tmp_path: pathlib.Path) -> None:
    """Its descriptors 1 and 2 belong to nothing else, such as a socket."""
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", _PROGRAM, str(tmp_path / "port")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_port_file_that_cannot_be_written_is_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^port_file: '.*/none/port' cannot be written: No such file or .*; "
    ):
        write_ports(tmp_path / "none" / "port", [1])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidRequestError, match="^port_file: '.*/folder' cannot be written: Is a directory; name a"):
        write_ports(tmp_path / "folder", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_signals_within_a_second_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C goes to a server and to its parent, who passes it on."""
    now, stop, hasten, signalled = [100.0], threading.Event(), threading.Event(), list[float]()
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    for seconds, expected in ((0.0, False), (0.0, False), (0.5, False), (0.75, True)):
        now[0] += seconds
        cli._stop_or_hasten(stop, hasten, signalled)
        assert (stop.is_set(), hasten.is_set()) == (True, expected)
