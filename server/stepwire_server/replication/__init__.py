"""Hot standby: a server that follows another one record by record, in memory alone, and is promoted in its place.

The floors above give it a connection; here is what primary and standby do. No gRPC is loaded.
"""

__all__: list[str] = []
