"""A peer: the messages of Flower, a gradient up in a `FitRes` and parameters down in a `FitIns`, with no optimizer.

Both sides convert arrays to records and back with Flower's own functions, as a `NumPyClient` does. They use Flower's
own gRPC service, with its own connection on the client's side. There is no simulation engine and no SuperLink.

Flower's requirements exclude versions that stepwire's server needs, so Flower has an environment of its own.
`STEPWIRE_BENCH_FLOWER_PYTHON` names its Python (`make bench-peers` makes the environment). In that environment,
`python flower_messages.py serve SIZE` prints its port. `python flower_messages.py drive PORT SIZE` makes a round trip
for each line that it reads.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["contenders"]

_PYTHON = "STEPWIRE_BENCH_FLOWER_PYTHON"
_DEFAULT_PYTHON = pathlib.Path(__file__).parents[1] / ".venv-flower" / "bin" / "python"
_EXAMPLES = 64  # the number of examples in a FitRes


def contenders() -> list[Any]:
    """Return the round trip."""
    from contest import Contender  # the environment of Flower has neither stepwire nor the contest's packages

    return [Contender("Flower messages", _round_trip)]


def _round_trip(stack: contextlib.ExitStack, size: int) -> Any:
    from child import child

    interpreter = _interpreter()
    server = stack.enter_context(child([interpreter, __file__, "serve", str(size)]))
    driver = stack.enter_context(child([interpreter, __file__, "drive", server.read(), str(size)]))
    return lambda: driver.ask("again")


def _interpreter() -> str:
    """Return a Python that has Flower."""
    from contest import Absent

    interpreter = os.environ.get(_PYTHON, str(_DEFAULT_PYTHON))
    if not pathlib.Path(interpreter).exists():
        raise Absent(f"there is no {interpreter}; `make bench-peers` makes it, or name one by {_PYTHON}")
    tried = subprocess.run([interpreter, "-c", "import flwr"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise Absent(f"flwr cannot be imported there: {tried.stderr.strip().splitlines()[-1]}")
    return interpreter


# --- with Flower -----------------------------------------------------------------------------------------------


def serve(size: int) -> None:
    """Reply to each gradient with parameters, both decoded and encoded, until standard input ends."""
    import grpc
    import numpy as np
    from flwr.common import serde
    from flwr.compat.common.parameter import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common.typing import FitIns
    from flwr.proto.transport_pb2 import ServerMessage
    from flwr.proto.transport_pb2_grpc import FlowerServiceServicer, add_FlowerServiceServicer_to_server

    def instruction(arrays: list[Any]) -> Any:
        return ServerMessage(fit_ins=serde.fit_ins_to_proto(FitIns(ndarrays_to_parameters(arrays), {})))

    class Servicer(FlowerServiceServicer):  # type: ignore[misc]
        def Join(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
            yield instruction([np.zeros(size, np.float32)])
            for message in messages:
                gradient = parameters_to_ndarrays(serde.fit_res_from_proto(message.fit_res).parameters)
                yield instruction(gradient)

    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(2), options=unlimited)
    add_FlowerServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(None).wait()


def drive(port: str, size: int) -> None:
    """Make a round trip for each line of standard input, and print a line after each."""
    import numpy as np
    from flwr.compat.client.grpc_client.connection import grpc_connection
    from flwr.compat.common import recorddict_compat as records
    from flwr.compat.common.parameter import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common.typing import Code, FitRes, Status

    gradient, done = np.ones(size, np.float32), Status(Code.OK, "")
    with grpc_connection(f"127.0.0.1:{port}", True, None) as (receive, send, *_):
        message = receive()
        for _ in sys.stdin:
            result = FitRes(done, ndarrays_to_parameters([gradient]), _EXAMPLES, {})
            message.content = records.fitres_to_recorddict(result, keep_input=False)
            send(message)
            message = receive()
            parameters = records.recorddict_to_fitins(message.content, keep_input=False).parameters
            assert parameters_to_ndarrays(parameters)[0].shape == (size,)
            print("done", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        drive(sys.argv[2], int(sys.argv[3]))
