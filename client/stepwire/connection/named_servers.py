"""The servers behind one name, such as that of a headless Service of Kubernetes: one address each, in any order.

The order and the number of addresses change with each answer of a name service, so a place among them is no identity.
Each server tells the name of its shard itself, and the epoch of its sessions. Servers of one shard are a primary and
its standby, or an old owner and a newer one: the newest that serves has the shard's sessions.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from stepwire.connection.errands import together
from stepwire.errors import DeadlineExceededError, InvalidRequestError, Reason, StepwireError, UnavailableError
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["Ask", "NamedServers", "addresses_of"]

Ask = Callable[[str, float], pb.GetServerInfoResponse]
"""Asks the server at an endpoint for its properties, within some seconds."""

_ASK_SECONDS: Final = 2.0


class NamedServers:
    """The servers behind a name, as an `EndpointSource`."""

    def __init__(
        self,
        host: str,
        port: int,
        ask: Ask,
        *,
        are_shards: bool = False,
        resolve: Callable[[str, int], Mapping[int, Sequence[str]]] | None = None,
    ) -> None:
        """Know the name alone.

        Args:
            host: the name.
            port: the port of every server.
            ask: asks a server; see `Ask`.
            are_shards: the servers are known to be shards, so that one address is one of them too.
            resolve: returns the endpoints of a name and a port by their families; None for `addresses_of`.
        """
        self._host, self._port, self._ask, self._resolve = host, port, ask, resolve or addresses_of
        self._are_shards = are_shards

    def endpoints(self, seconds: float) -> Mapping[str, str]:
        """See `EndpointSource`; nothing if one address, or all of them, are those of one server without a name.

        Servers that start have addresses before they answer, so all addresses of one family have to answer. Of two
        families one is enough: many servers listen on one of them.

        Raises:
            InvalidRequestError: there are several servers, and one has no name, or two of one name serve.
            UnavailableError: the name has no address, or an address does not answer.
            StepwireError: the refusal of a server.
        """
        families = self._resolve(self._host, self._port)
        if sum(map(len, families.values())) == 1 and not self._are_shards:
            return {}
        told = self._told([each for family in families.values() for each in family], min(seconds, _ASK_SECONDS))
        for endpoints in families.values():
            found = {each: info for each in endpoints if isinstance(info := told[each], pb.GetServerInfoResponse)}
            if len(found) == len(endpoints):
                return self._by_shard(found)
        problems = {each: problem for each, problem in told.items() if isinstance(problem, StepwireError)}
        for problem in problems.values():
            if not isinstance(problem, UnavailableError | DeadlineExceededError):
                raise problem
        silent, problem = next(iter(problems.items()))
        raise UnavailableError(
            f"{self._name} has {len(told)} addresses, and {len(problems)} of them do not answer, such as {silent}: "
            f"{problem}",
            reason=Reason.UNREACHABLE,
        )

    @property
    def _name(self) -> str:
        return repr(f"{self._host}:{self._port}")

    def _told(self, endpoints: Sequence[str], seconds: float) -> dict[str, pb.GetServerInfoResponse | StepwireError]:
        """Ask all servers at once; return the properties of each, or the error."""
        told: dict[str, pb.GetServerInfoResponse | StepwireError] = {}

        def ask(rank: int) -> None:
            try:
                told[endpoints[rank]] = self._ask(endpoints[rank], seconds)
            except StepwireError as problem:
                told[endpoints[rank]] = problem

        together(ask, len(endpoints))
        return told

    def _by_shard(self, told: Mapping[str, pb.GetServerInfoResponse]) -> dict[str, str]:
        """Return the endpoint of each shard, empty where none of its servers serves.

        Raises:
            InvalidRequestError: as `endpoints`.
        """
        servers: dict[str, tuple[str, pb.GetServerInfoResponse]] = {}
        for endpoint, info in told.items():
            servers.setdefault(info.instance_id, (endpoint, info))
        if len(servers) > 1 and (unnamed := [each for each, info in servers.values() if not info.shard]):
            raise InvalidRequestError.of(
                "target",
                f"{self._name} is the name of {len(servers)} servers, and the one at {unnamed[0]} tells no shard; "
                "start each with a --shard of its own, or give their addresses as a list",
            )
        found: dict[str, tuple[int, str]] = {}
        for endpoint, info in servers.values():
            if not info.shard:
                continue
            epoch, other = found.setdefault(info.shard, (0, ""))
            if info.not_serving:
                continue
            if info.epoch == epoch:
                raise InvalidRequestError.of(
                    "target",
                    f"the servers at {other} and {endpoint} both serve the shard {info.shard!r} in epoch {epoch}; give "
                    "each server a --shard of its own",
                )
            found[info.shard] = max((epoch, other), (info.epoch, endpoint))
        self._are_shards |= bool(found)
        return {shard: endpoint for shard, (_, endpoint) in found.items()}


def addresses_of(host: str, port: int) -> dict[int, list[str]]:
    """Return the endpoints of a name by their families, such as `{AF_INET: ["10.0.0.1:50051"]}`.

    Raises:
        UnavailableError: the name has no address just now.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as problem:
        raise UnavailableError(
            f"the name {host!r} has no address: {problem}; see that its servers run, or give another name",
            reason=Reason.UNREACHABLE,
        ) from None
    families: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        literal = ipaddress.ip_address(str(address[0]).partition("%")[0])
        endpoint = f"[{address[0]}]:{port}" if literal.version == 6 else f"{address[0]}:{port}"
        if endpoint not in families.setdefault(int(family), []):
            families[int(family)].append(endpoint)
    return families
