"""A server that tells the use of its engine.

`python fairness_server.py STREAMS` prints its target. For each line of its standard input it prints a JSON object: for
each number of parameters the seconds that sessions of so many have had turns of the engine, all together.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys
from collections.abc import Iterator

from child import Child, child, python
from stepwire_server.config import ServerConfig
from stepwire_server.observability.logs import logging_to_stderr
from stepwire_server.server import Server

__all__ = ["FairnessServer", "fairness_server"]


class FairnessServer:
    """A running server.

    Attributes:
        target: the address for clients.
    """

    def __init__(self, process: Child) -> None:
        """Wait until the server is ready."""
        self._process = process
        self.target = process.read()

    def engine_seconds(self) -> dict[int, float]:
        """Return the seconds of turns so far, by the parameters of a session."""
        return {int(size): seconds for size, seconds in json.loads(self._process.ask("")).items()}


@contextlib.contextmanager
def fairness_server(streams: int) -> Iterator[FairnessServer]:
    """Run a server that takes so many streams for a block."""
    with child(python(__file__, streams)) as process:
        yield FairnessServer(process)


def serve(streams: int) -> None:
    """Serve until standard input ends."""
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", log_level="warning", max_streams=streams)
    with logging_to_stderr("warning"), Server(config) as server:
        print(server.target, flush=True)
        for _ in sys.stdin:
            seconds: dict[int, float] = collections.defaultdict(float)
            for session in server.registry.of(None):
                seconds[session.config.layout.size] += session.engine_seconds
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
