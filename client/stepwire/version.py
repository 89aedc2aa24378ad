"""The distribution's version and its protocol versions."""

__all__ = ["PROTOCOL_MAX", "PROTOCOL_MIN", "__version__"]

__version__ = "0.1.0"

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
