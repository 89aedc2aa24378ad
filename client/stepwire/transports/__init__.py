"""Which way the bytes go between a client and a server, and how that is found out."""

__all__: list[str] = []
