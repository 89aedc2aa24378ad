"""Plain records of the domain, without behaviour: configs, requests, results and snapshots."""

from __future__ import annotations

__all__: list[str] = []
