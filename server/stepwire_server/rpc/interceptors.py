"""The interceptors of a server, in their order."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from stepwire.errors import StepwireError
from stepwire_server.access.control import AccessControl
from stepwire_server.monitoring.monitoring import Monitoring
from stepwire_server.rpc.access import AccessInterceptor
from stepwire_server.rpc.call_rooms import CallRooms
from stepwire_server.rpc.counting import CountingInterceptor
from stepwire_server.rpc.interceptor import ErrorInterceptor
from stepwire_server.rpc.limits import CallLimits
from stepwire_server.rpc.role_interceptor import RoleInterceptor

__all__ = ["interceptors"]


def interceptors(
    access: AccessControl,
    rooms: CallRooms,
    monitoring: Monitoring,
    told: Callable[[StepwireError], StepwireError],
    admit: Callable[[str], object],
    clock: Callable[[], float],
) -> list[grpc.ServerInterceptor]:
    """Return the interceptors, from the outermost to the one that is nearest to the methods.

    A call is admitted before it takes a place and before its message is read: a stranger holds neither.

    Args:
        access: the admission of calls.
        rooms: the places of calls.
        monitoring: counts the calls, and the errors that leave.
        told: returns the error that may be told in the place of another one.
        admit: refuses a method that the server's role does not serve.
        clock: returns seconds.
    """
    errors = ErrorInterceptor(monitoring.refused, told)
    found = [errors, AccessInterceptor(access), CallLimits(rooms, access), RoleInterceptor(admit)]
    return found if monitoring.tallies is None else [CountingInterceptor(monitoring.tallies, clock), *found]
