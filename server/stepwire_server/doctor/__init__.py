"""The checks of `stepwire doctor`: the machine, its ports and a target."""

from __future__ import annotations

__all__: list[str] = []
