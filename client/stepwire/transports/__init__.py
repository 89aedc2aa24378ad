"""The transports between a client and a server, and the search for the best one."""

__all__: list[str] = []
