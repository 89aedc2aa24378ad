"""The end of a call with a status, from another thread than that of its handler.

gRPC's synchronous server has no public way for that. A handler that waits for a message sleeps until its client speaks,
and `cancel` tells the client no reason. The alternative is a second thread for each stream, which reads for the
handler: each step would pay for it with a switch of threads.
"""

from __future__ import annotations

import operator
from typing import Any, Final

from grpc import StatusCode
from grpc._common import STATUS_CODE_TO_CYGRPC_STATUS_CODE, encode
from grpc._server import _CANCELLED, _abort

from stepwire.errors import StepwireError
from stepwire.wire.error_details import status_of

__all__ = ["end_call"]

_PARTS: Final = operator.attrgetter("_state", "_rpc_event.call")
"""The parts of gRPC's context of a call: its state, and the call of the C core."""


def end_call(context: Any, error: StepwireError) -> None:
    """Send the status of an error to the client of a call, and end the handler's wait as if the client were gone.

    A call that is over stays as it is.

    Args:
        context: gRPC's context of the call.
        error: the error.
    """
    status = status_of(error)
    state, call = _PARTS(context)
    with state.condition:  # as gRPC itself does for a handler that raised
        if state.client is _CANCELLED or state.statused:
            return
        state.code, state.details = status.code, encode(status.details)
        state.trailing_metadata = status.trailing_metadata
        _abort(state, call, STATUS_CODE_TO_CYGRPC_STATUS_CODE[StatusCode.UNKNOWN], state.details)
        state.client = _CANCELLED
        state.condition.notify_all()
