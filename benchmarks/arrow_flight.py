"""A peer: an echo by Arrow Flight's DoExchange, the bulk transfer of the Arrow world, which is gRPC in C++.

`python arrow_flight.py` serves until its standard input ends, and prints its port.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import variants
from child import child, python
from contest import Action, Contender, needed

__all__ = ["contenders"]

_BATCH = 1 << 20  # elements of a message: 4 MiB, as everybody's
_COMMAND = b"echo"


def contenders() -> list[Contender]:
    """Return the echo that sends each batch back as it arrives."""
    return [Contender("Arrow Flight duplex", _echo)]


def serve() -> None:
    """Serve until standard input ends."""
    flight = needed("pyarrow.flight")

    class EchoServer(flight.FlightServerBase):  # type: ignore[misc, name-defined]
        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            writer.begin(reader.schema)
            for chunk in reader:
                writer.write_batch(chunk.data)

    server = EchoServer("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    sys.stdin.read()
    server.shutdown()


def _echo(stack: contextlib.ExitStack, size: int) -> Action:
    arrow, flight = needed("pyarrow"), needed("pyarrow.flight")
    process = stack.enter_context(child(python(__file__)))
    client = stack.enter_context(flight.connect(f"grpc://127.0.0.1:{process.read()}"))
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(_COMMAND))
    stack.enter_context(writer)
    gradient = variants.gradient_of(size)
    batches = [
        arrow.record_batch([arrow.array(gradient[start : start + _BATCH])], names=["w"])
        for start in range(0, size, _BATCH)
    ]
    writer.begin(batches[0].schema)
    stack.callback(writer.done_writing)
    if len(batches) == 1:
        return lambda: (writer.write_batch(batches[0]), reader.read_chunk())
    return lambda: _exchange(writer, reader, batches)


def _exchange(writer: Any, reader: Any, batches: list[Any]) -> None:
    def send() -> None:
        for batch in batches:
            writer.write_batch(batch)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in batches:
        reader.read_chunk()
    sender.join()


if __name__ == "__main__":
    serve()
