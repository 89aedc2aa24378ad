"""The interceptors of a server, in their order."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from stepwire.errors import StepwireError
from stepwire_server.access.control import AccessControl
from stepwire_server.observability.tallies import Tallies
from stepwire_server.rpc.access import AccessInterceptor
from stepwire_server.rpc.call_rooms import CallRooms
from stepwire_server.rpc.counting import CountingInterceptor
from stepwire_server.rpc.interceptor import ErrorInterceptor
from stepwire_server.rpc.limits import CallLimits

__all__ = ["interceptors"]


def interceptors(
    access: AccessControl,
    rooms: CallRooms,
    tallies: Tallies | None,
    refused: Callable[[StepwireError], object],
    clock: Callable[[], float],
) -> list[grpc.ServerInterceptor]:
    """Return the interceptors, from the outermost to the one that is nearest to the methods.

    A call is admitted before it takes a place and before its message is read: a stranger holds neither.

    Args:
        access: the admission of calls.
        rooms: the places of calls.
        tallies: count the calls; None where nobody asks for them.
        refused: is told of each error that leaves.
        clock: returns seconds.
    """
    found = [ErrorInterceptor(refused), AccessInterceptor(access), CallLimits(rooms, access)]
    return found if tallies is None else [CountingInterceptor(tallies, clock), *found]
