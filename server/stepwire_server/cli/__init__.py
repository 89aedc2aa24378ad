"""The command `stepwire`: a module for each subcommand."""

from __future__ import annotations

__all__: list[str] = []
