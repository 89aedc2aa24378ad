"""Addresses for whoever watches a server: metrics for Prometheus."""

from __future__ import annotations

__all__: list[str] = []
