"""The stepwire server: stateful, exactly-once optimizer steps over gRPC."""

__all__: list[str] = []
