"""The client's config file: the server of a machine's user, for programs and commands that name none.

An argument wins over an environment variable, and a variable over the file. The certificates and the token of the file
are for its own target, or for `localhost:50051` where it names none. A program that names another server never shows it
that token.
"""

from __future__ import annotations

import os
import pathlib
import stat
import tomllib
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError

__all__ = ["DEFAULT_TARGET", "TARGET_VARIABLE", "VARIABLE", "ConfigFile", "asked_target", "read_config_file"]

VARIABLE: Final = "STEPWIRE_CLIENT_CONFIG"
TARGET_VARIABLE: Final = "STEPWIRE_TARGET"
DEFAULT_TARGET: Final = "localhost:50051"

_MOST_BYTES: Final = 64 << 10
_SYSTEM: Final = "system"


class ConfigFile(NamedTuple):
    """The keys of the file, in their order; empty for those that are not there.

    Attributes:
        target: the server: `host:port`, `unix:/path`, or `directory:/path` for all shards of a directory. Empty for
            `localhost:50051`.
        transport: the way of gradients and parameters, as in `connect`.
        ca: the file of the authorities that the server's certificate is signed by, or "system".
        cert: the file of the client's own certificate.
        cert_key: the file of the private key of `cert`.
        token_file: the file of the token.
    """

    target: str = ""
    transport: str = ""
    ca: str = ""
    cert: str = ""
    cert_key: str = ""
    token_file: str = ""

    def protects(self, targets: Sequence[str]) -> bool:
        """Tell whether the certificates and the token are for these targets: for that of a program which names none."""
        return all(each == (self.target or DEFAULT_TARGET) for each in targets)


_FILES: Final = ("ca", "cert", "cert_key", "token_file")


def read_config_file(environment: Mapping[str, str] = os.environ) -> ConfigFile:
    """Read the file that STEPWIRE_CLIENT_CONFIG names, or else `stepwire/config.toml` in the user's config folder.

    The config folder is XDG_CONFIG_HOME, or `~/.config`. An empty STEPWIRE_CLIENT_CONFIG means no file. Paths in the
    file are relative to its folder, and `~` is the user's home.

    Raises:
        InvalidRequestError: the file is named and missing, or is no such file, or another user may write it.
    """
    named = environment.get(VARIABLE)
    path = _usual_path(environment) if named is None else pathlib.Path(named) if named else None
    if path is None:
        return ConfigFile()
    try:
        text = _text(path)
    except FileNotFoundError:
        if named is None:
            return ConfigFile()
        raise _wrong(path, f"there is no such file; write it, or unset {VARIABLE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, f"it cannot be read: {getattr(error, 'strerror', '') or error}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(path, f"it is no TOML: {error}") from None
    return _checked(path, values, environment)


def asked_target(target: str | None, file: ConfigFile, environment: Mapping[str, str] = os.environ) -> str:
    """Return the target that is asked for: the argument, STEPWIRE_TARGET, the file's, or localhost:50051."""
    return target or environment.get(TARGET_VARIABLE) or file.target or DEFAULT_TARGET


def _usual_path(environment: Mapping[str, str]) -> pathlib.Path | None:
    """Return the usual path; None for a user without a home."""
    folder, home = environment.get("XDG_CONFIG_HOME"), environment.get("HOME")
    if folder:
        return pathlib.Path(folder) / "stepwire" / "config.toml"
    return pathlib.Path(home) / ".config" / "stepwire" / "config.toml" if home else None


def _text(path: pathlib.Path) -> str:
    """Read the file, if nobody else could have written it: it decides which server gets gradients and a token."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid not in (0, os.geteuid()):
            raise _wrong(path, f"it belongs to the user {status.st_uid}; use a file of your own")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _wrong(path, "others may write it: `chmod go-w` it")
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise _wrong(path, f"it has more than {_MOST_BYTES} bytes")
    return data.decode("utf-8")


def _checked(path: pathlib.Path, values: Mapping[str, object], environment: Mapping[str, str]) -> ConfigFile:
    for key, value in values.items():
        if key not in ConfigFile._fields:
            token = " A token itself stands in a file of its own: give token_file." if key == "token" else ""
            raise _wrong(path, f"the key {key!r} is unknown; use one of: {', '.join(ConfigFile._fields)}.{token}")
        if not isinstance(value, str) or not value:
            shown = "the value of a secret" if "token" in key else f"{value!r:.80}"
            raise _wrong(path, f"{key} is {shown}; it must be text in quotes, such as {_EXAMPLES[key]}")
    texts = {key: str(value) for key, value in values.items()}
    if ("cert" in texts) != ("cert_key" in texts):
        raise _wrong(path, "cert and cert_key go together; give both, or none")
    if "cert" in texts and "ca" not in texts:
        raise _wrong(path, "cert needs ca; give the authority's file, or ca = \"system\" for Mozilla's")
    for key in _FILES:
        if key in texts and (key, texts[key]) != ("ca", _SYSTEM):
            texts[key] = _absolute(path, texts[key], environment)
    return ConfigFile(**texts)


_EXAMPLES: Final = {
    "target": '"trainer.example.com:50051"',
    "transport": '"tcp"',
    "ca": '"ca.pem", or "system"',
    "cert": '"client.pem"',
    "cert_key": '"client-key.pem"',
    "token_file": '"~/.config/stepwire/token"',
}


def _absolute(path: pathlib.Path, name: str, environment: Mapping[str, str]) -> str:
    home = environment.get("HOME")
    if name.startswith("~/") and home:
        return str(pathlib.Path(home) / name[2:])
    return str(path.parent / name)


def _wrong(path: pathlib.Path, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"client config {str(path)!r}: {problem}", metadata={"field": "config"})
