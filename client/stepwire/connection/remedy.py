"""The next action after no connection was made, beside gRPC's own account of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from stepwire.errors import Reason, StepwireError, UnavailableError
from stepwire.wire.addresses import is_on_this_host

__all__ = ["PROXIES", "with_remedy"]

PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""The variables that name a proxy to gRPC, in gRPC's order."""

_NO_CONNECTION: Final = ("failed to connect", "errors resolving", "DNS resolution failed")


def with_remedy(error: StepwireError, target: str, environment: Mapping[str, str] = os.environ) -> StepwireError:
    """Return an error that names the target and the next action, if gRPC made no connection; else the error itself.

    Args:
        error: the error of a call.
        target: the target of its channel.
        environment: the variables, which may name a proxy.
    """
    if error.reason is not Reason.UNREACHABLE or not str(error).startswith(_NO_CONNECTION):
        return error
    remedy = "start a server there with `stepwire serve`, or give the address of one that runs"
    proxy = next((name for name in PROXIES if environment.get(name)), None)
    if proxy is not None and not is_on_this_host(target):
        remedy += f". The environment names a proxy in {proxy}: a host in no_proxy is reached without it"
    return UnavailableError(f"no server answers at {target!r}: {remedy}. {error}", metadata=error.metadata)
