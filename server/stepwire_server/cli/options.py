"""The options of the commands: flags made from the settings, and the options of commands that ask a server."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeAlias

import typer

from stepwire.wire.addresses import unix_path
from stepwire_server.config import named_bind
from stepwire_server.config.parse import SETTINGS, Setting

__all__ = ["Json", "Target", "Timeout", "beside_target", "takes_settings"]

_DEFAULT_TARGET: Final = "localhost:50051"
_EVERY_ADDRESS: Final = ("0.0.0.0", "[::]")

_Command: TypeAlias = Callable[..., None]


def beside_target(bind: str) -> str:
    """Return the address of a server for clients on its own machine.

    So the health check of a container asks the server beside it, whatever STEPWIRE_BIND says.

    Args:
        bind: the setting `bind` of the server; empty for the default.
    """
    if unix_path(bind) is not None:
        return bind
    host, _, port = bind.rpartition(":")
    if not host or port == "0":
        return _DEFAULT_TARGET
    return f"localhost:{port}" if host in _EVERY_ADDRESS else bind


def takes_settings(*names: str) -> Callable[[_Command], _Command]:
    """Return a decorator that gives a command the flags of settings besides its own options.

    The command gets every flag as a keyword argument: the text as it stands on the command line, a bool of a switch,
    or None where the flag is not given. So `load_config` reads flags as it reads every other source.

    Args:
        names: the settings; none means all.
    """
    made = [_parameter(SETTINGS[name]) for name in names or SETTINGS]

    def decorate(command: _Command) -> _Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        options = [option for option in own if option.kind is not inspect.Parameter.VAR_KEYWORD]
        vars(command)["__signature__"] = inspect.Signature([*made, *options])
        return command

    return decorate


def _parameter(setting: Setting) -> inspect.Parameter:
    option: Any
    if setting.unit == "switch":
        flags = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
        option = Annotated[bool | None, typer.Option(flags, help=_help(setting), show_default=False)]
    else:
        metavar = f"<{setting.unit}>"
        option = Annotated[
            str | None, typer.Option(setting.flag, metavar=metavar, help=_help(setting), show_default=False)
        ]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


def _help(setting: Setting) -> str:
    known = setting.default is not None and setting.default != ""
    default = f"Default: {setting.text_of(setting.default)}. " if known else ""
    return f"{setting.description} {default}Variable: {setting.variable}."


def _target() -> str:
    return beside_target(named_bind())


Target = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        envvar="STEPWIRE_TARGET",
        help="The address of the server, host:port or unix:/path.",
        default_factory=_target,
        show_default=f"the address in STEPWIRE_BIND, else {_DEFAULT_TARGET}",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Timeout = Annotated[float, typer.Option(help="The longest wait for the server, in seconds.")]
