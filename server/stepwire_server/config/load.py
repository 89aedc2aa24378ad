"""The settings of a server from all their sources.

A flag wins over an environment variable, a variable over the TOML file, and the file over the default.
"""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from stepwire.errors import InvalidRequestError
from stepwire_server.config.environment import CONFIG_VARIABLE, ENVIRONMENT, is_setting, setting_name
from stepwire_server.config.parse import SETTINGS, parse_value
from stepwire_server.config.settings import ServerConfig

__all__ = ["load_config"]


class _Given(NamedTuple):
    """A value that a source gives a setting, and the source as an error names it."""

    value: Any
    origin: str


def load_config(
    flags: Mapping[str, Any], *, environment: Mapping[str, str] = ENVIRONMENT, file: pathlib.Path | None = None
) -> ServerConfig:
    """Merge flags, environment, file and defaults.

    Args:
        flags: the values by the names of the fields; None means that the flag is not given.
        environment: the variables; those of settings are named `STEPWIRE_<FIELD>`.
        file: a TOML file whose keys are the names of the fields; None means the one that `STEPWIRE_CONFIG` names.

    Raises:
        InvalidRequestError: a name is unknown, or a value has the wrong type or is out of range.
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = pathlib.Path(environment[CONFIG_VARIABLE])
    given = {} if file is None else _from_file(file)
    given |= _from_environment(environment)
    given |= _from_flags(flags)
    return ServerConfig(**{name: parse_value(SETTINGS[name], *one) for name, one in given.items()})


def _from_file(path: pathlib.Path) -> dict[str, _Given]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _invalid(f"settings file {str(path)!r}: {error}") from None
    for key in values:
        if key not in SETTINGS:
            raise _invalid(
                f"settings file {str(path)!r}: the key {key!r} is unknown; use one of: {', '.join(SETTINGS)}"
            )
    return {key: _Given(value, f"settings file {str(path)!r}: {key}") for key, value in values.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, _Given]:
    given = {}
    for variable, value in environment.items():
        if not is_setting(variable, value):
            continue
        if (name := setting_name(variable)) not in SETTINGS:
            allowed = ", ".join(setting.variable for setting in SETTINGS.values())
            raise _invalid(f"environment variable {variable} is unknown; use one of: {allowed}")
        given[name] = _Given(value, variable)
    return given


def _from_flags(flags: Mapping[str, Any]) -> dict[str, _Given]:
    for name in flags:
        if name not in SETTINGS:
            raise _invalid(f"the setting {name!r} is unknown; use one of: {', '.join(SETTINGS)}")
    return {name: _Given(value, SETTINGS[name].flag) for name, value in flags.items() if value is not None}


def _invalid(problem: str) -> InvalidRequestError:
    return InvalidRequestError(problem, metadata={"field": "settings"})
