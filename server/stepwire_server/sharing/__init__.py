"""Memory that the server shares with processes on its host, and how they get hold of it. Knows no gRPC."""

__all__: list[str] = []
