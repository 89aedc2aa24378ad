"""The options of the commands: flags made from the settings, and the options of commands that ask a server."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import typer

from stepwire.connection.config_file import read_config_file
from stepwire_server.config import DEFAULT_TARGET, beside_target, named_bind
from stepwire_server.config.parse import SETTINGS, Setting

__all__ = ["Json", "Target", "Timeout", "takes_settings"]

_Command: TypeAlias = Callable[..., None]


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
    """Return the address of a server where none is named: the one beside, of a container, or the config file's."""
    bind = named_bind()
    return beside_target(bind) if bind else read_config_file().target or DEFAULT_TARGET


Target = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        envvar="STEPWIRE_TARGET",
        help="The address of the server, host:port or unix:/path.",
        default_factory=_target,
        show_default=f"the address in STEPWIRE_BIND, else that of the client's config file, else {DEFAULT_TARGET}",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Timeout = Annotated[float, typer.Option(help="The longest wait for the server, in seconds.")]
