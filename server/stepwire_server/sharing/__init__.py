"""Memory that the server shares with processes on its host, and the handoff of that memory. Independent of gRPC."""

__all__: list[str] = []
