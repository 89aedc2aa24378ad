"""Results that were asked of an engine, there at once or later."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

__all__ = ["Done", "Pending"]

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)


class Pending(Protocol[Value_co]):
    """A result that was asked of an engine and may not be there yet."""

    def wait(self) -> Value_co:
        """Return the result, once it is there. Further calls return the same.

        Raises:
            Exception: the device failed; CuPy has no common base for its errors.
        """
        ...


class Done(Generic[Value]):
    """A result that was there at once."""

    __slots__ = ("_value",)

    def __init__(self, value: Value) -> None:
        """Hold the result."""
        self._value = value

    def wait(self) -> Value:
        """See `Pending`."""
        return self._value
