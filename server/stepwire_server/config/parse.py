"""How a value of a setting is read: alike from a flag, a variable and a file, and refused in words."""

from __future__ import annotations

import typing
from typing import Any, Final, NamedTuple

import msgspec

from stepwire.errors import InvalidRequestError
from stepwire_server.config.settings import ServerConfig

__all__ = ["ENVIRONMENT_PREFIX", "SETTINGS", "Setting", "format_bytes", "parse_bytes", "parse_value"]

ENVIRONMENT_PREFIX: Final = "STEPWIRE_"

_FACTORS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Setting(NamedTuple):
    """One field of `ServerConfig`.

    Attributes:
        name: the name of the field, and the key in a TOML file.
        type: the annotated type, as msgspec converts to it.
        default: the value without any source.
        description: the help text.
        allowed: the values that are allowed, in words that follow "it must be".
        unit: "bytes", "seconds", "number", "choice", "switch" or "text".
    """

    name: str
    type: Any
    default: Any
    description: str
    allowed: str
    unit: str

    @property
    def flag(self) -> str:
        """The flag, such as "--max-sessions"."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The environment variable, such as "STEPWIRE_MAX_SESSIONS"."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    def text_of(self, value: Any) -> str:
        """Write a value so that every source reads it back, such as "true" and "8MiB"."""
        if isinstance(value, bool):
            return str(value).lower()
        return format_bytes(value) if self.unit == "bytes" else str(value)


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as "8G", "512MiB" or "1048576".

    Raises:
        ValueError: the text is not such a number.
    """
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    if (factor := _FACTORS.get(digits[-1:])) is None:
        return int(digits)
    try:
        return int(float(digits[:-1]) * factor)
    except OverflowError:
        raise ValueError(f"{text!r} is too large") from None


def format_bytes(count_bytes: int) -> str:
    """Write a number of bytes with the largest unit that divides it, such as "8MiB"; `parse_bytes` reads it back."""
    for unit, factor in reversed(_FACTORS.items()):
        if count_bytes and count_bytes % factor == 0:
            return f"{count_bytes // factor}{unit}iB"
    return str(count_bytes)


def parse_value(setting: Setting, value: Any, origin: str) -> Any:
    """Read the value of a setting.

    Args:
        setting: the setting.
        value: the value, as its source has it.
        origin: the source, as the error names it, such as "--threads".

    Raises:
        InvalidRequestError: the type or the range is wrong.
    """
    try:
        read = parse_bytes(value) if setting.unit == "bytes" and isinstance(value, str) else value
        return msgspec.convert(read, setting.type, strict=False)
    except (ValueError, msgspec.ValidationError):
        raise InvalidRequestError(
            f"{origin} is {value!r}; it must be {setting.allowed}", metadata={"field": setting.name}
        ) from None


def _settings() -> dict[str, Setting]:
    """Return every setting by its name, in the order of the record."""
    hints = typing.get_type_hints(ServerConfig, include_extras=True)
    return {field.name: _setting(field, hints[field.name]) for field in msgspec.structs.fields(ServerConfig)}


def _setting(field: msgspec.structs.FieldInfo, hint: Any) -> Setting:
    info = msgspec.inspect.type_info(hint)
    assert isinstance(info, msgspec.inspect.Metadata) and info.extra_json_schema is not None, field.name
    extra = info.extra or {}
    unit, allowed = _kind(info.type, extra.get("unit", "number"))
    if unit == "choice":
        allowed = " or ".join(", ".join(typing.get_args(hint.__origin__)).rsplit(", ", 1))
    description = info.extra_json_schema["description"]
    return Setting(field.name, hint, field.default, description, extra.get("allowed", allowed), unit)


def _kind(type_: msgspec.inspect.Type, unit: str) -> tuple[str, str]:
    """Return the unit of a type, and the values that it allows in words."""
    match type_:
        case msgspec.inspect.IntType(ge=least, le=most) if unit == "bytes":
            assert least is not None
            ends = f"{format_bytes(least)} up" if most is None else f"{format_bytes(least)} to {format_bytes(most)}"
            return unit, f"a number of bytes from {ends}, such as 8M, 8MiB or 8388608"
        case msgspec.inspect.IntType(ge=least, le=most):
            return unit, f"a whole number from {least} " + ("up" if most is None else f"to {most}")
        case msgspec.inspect.FloatType(gt=least, le=most):
            return unit, f"a number of {unit} above {least:g} and not above {most:.0f}"
        case msgspec.inspect.LiteralType():
            return "choice", ""
        case msgspec.inspect.StrType():
            return "text", "text"
    return "switch", "true or false"


SETTINGS: Final = _settings()
