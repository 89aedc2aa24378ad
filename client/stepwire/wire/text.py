"""The texts of users that travel: names, labels, ids."""

from __future__ import annotations

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["checked_text"]


def checked_text(text: object, field: str, *, reason: Reason = Reason.INVALID_CONFIG) -> str:
    """Return a text that UTF-8 has, as every text of the contract.

    Python's own texts may have surrogates: `os.fsdecode` and the command line make them of bytes that are no UTF-8.

    Raises:
        InvalidRequestError: the value is no text, or has a surrogate.
    """
    if not isinstance(text, str):
        raise InvalidRequestError.of(field, f"{text!r:.80} is not a string", reason=reason)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError.of(
            field,
            f"{text[:80]!r} has the surrogate {text[error.start]!r} at {error.start}, which UTF-8 does not have; use "
            "another text",
            reason=reason,
        ) from None
    return text
