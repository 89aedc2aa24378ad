"""The command: its subcommands, and exit codes."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest

import stepwire
from tests.server.cli.outcome import Outcome


def test_the_version_is_printed(command: Any) -> None:
    assert command("version") == Outcome(0, f"stepwire {stepwire.__version__}\n", "")
    assert command("--version") == Outcome(0, f"stepwire {stepwire.__version__}\n", "")
    code, out, _ = command("version", "--json")
    assert (code, json.loads(out)) == (0, {"version": stepwire.__version__})


@pytest.mark.parametrize("arguments", [(), ("sessions",)])
def test_without_a_command_help_is_printed(command: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert code in (0, 2)
    assert "Usage: " in out + err
    assert "sessions" in out + err


@pytest.mark.parametrize("arguments", [(), ("serve",), ("sessions",), ("sessions", "list"), ("checkpoint", "repair")])
def test_help_has_two_names(command: Any, arguments: tuple[str, ...]) -> None:
    short, long = command(*arguments, "-h"), command(*arguments, "--help")
    assert short == long
    assert (short.code, "Usage: " in short.out) == (0, True)


@pytest.mark.parametrize(
    "arguments", [("fly",), ("health", "--wings"), ("sessions", "show"), ("serve", "--wings", "x")]
)
def test_a_command_that_is_none_is_refused_with_usage(command: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("health",),
        ("sessions", "list"),
        ("sessions", "show", "x"),
        ("sessions", "close", "x"),
        ("checkpoint", "list", "x"),
        ("checkpoint", "save", "x", "y"),
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


def test_kernels_are_compiled_ahead(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    from stepwire_server.engines import ahead

    monkeypatch.setattr(ahead, "make", lambda directory: ["x86-64-v3"] if directory == tmp_path else [])
    assert command("kernels", str(tmp_path)) == Outcome(0, f"{tmp_path}: kernels for x86-64-v3\n", "")
    code, out, _ = command("kernels", "elsewhere", "--json")
    assert (code, json.loads(out)) == (0, {"levels": []})


def test_a_demo_against_a_running_server_has_that_servers_device(command: Any) -> None:
    code, out, err = command("demo", "--target", "127.0.0.1:1", "--device", "cpu")
    assert (code, out, "--device is of a server that is started" in err) == (2, "", True)


def test_the_shell_can_complete(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_STEPWIRE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "stepwire se")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = command()
    assert (code, out.split()) == (0, ["serve", "sessions"])


def test_the_module_is_the_command(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["stepwire", "version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("stepwire_server", run_name="__main__")
    assert not ended.value.code


def test_an_interrupt_while_the_command_loads_ends_it_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        """A module in whose import the user presses Ctrl-C."""

        def find_spec(self, name: str, *_: object) -> None:
            if name == "stepwire_server.cli.main":
                raise KeyboardInterrupt

    from stepwire_server.__main__ import main

    monkeypatch.delitem(sys.modules, "stepwire_server.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        ("typer", ("version",), "the command needs the server's packages: pip install 'stepwire[server]'"),
        ("sklearn", ("demo",), "the demo needs scikit-learn; install it: pip install 'stepwire[demo]'"),
    ],
)
def test_a_package_that_is_missing_is_one_line_and_exit_code_2(
    module: str, arguments: tuple[str, ...], told: str, tmp_path: pathlib.Path
) -> None:
    script = f"import sys; sys.modules[{module!r}] = None; from stepwire_server.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"stepwire: {told}\n")
