"""The handoff: each parcel once, to the right user with its token; and no client can delay others."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from stepwire.errors import AuthenticationError, PermissionDeniedError, StepwireError
from stepwire.v1 import transport_pb2
from stepwire.wire.error_details import error_from_details
from stepwire.wire.handoff_proof import handoff_proof
from stepwire_server.sharing.handoff import HandoffServer, HandoffStatistics
from tests.support.raw_handoff import Handed, fetch, held_by_process

Start = Callable[..., HandoffServer]

NOTHING = HandoffStatistics(0, 0, 0, True)
MOST_WAITING = 64


def ask(server: HandoffServer, token: bytes) -> Handed:
    return fetch(server.path, transport_pb2.HandoffRequest(token=token))


def refusal(fetched: Handed) -> StepwireError:
    """Return the error of a refusal, after which the server has closed the connection and sent nothing else."""
    with fetched:
        assert fetched.descriptors == []
        error = error_from_details(fetched.response.refused)
        assert (
            fetched.refused
            == grpc.StatusCode[
                {AuthenticationError: "UNAUTHENTICATED", PermissionDeniedError: "PERMISSION_DENIED"}[type(error)]
            ].value[0]
        )
        assert fetched.connection.recv(1) == b""
    return error


def silent(server: HandoffServer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(server.path)
    except OSError:
        connection.close()
        raise
    connection.settimeout(30.0)
    return connection


def test_descriptors_and_response_are_sent(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server, offer = hand_over(), parcel(*pipes, handle=b"handle")
    token = server.offer(offer)
    assert (len(token), server.statistics()) == (16, HandoffStatistics(1, 0, 0, True))
    with ask(server, token) as fetched:
        assert (fetched.refused, fetched.response.cuda_ipc_handle) == (0, b"handle")
        theirs, ours = fetched.descriptors, list(pipes)
        assert [os.fstat(end).st_ino for end in theirs] == [os.fstat(end).st_ino for end in ours]
        assert set(theirs).isdisjoint(ours)
        assert server.statistics() == HandoffStatistics(0, 0, 1, True)
        assert not offer.ended.is_set()
    offer.wait_ended()
    assert server.statistics() == NOTHING


def test_a_parcel_may_have_no_descriptors(hand_over: Start, parcel: Any) -> None:
    """Device memory travels as a handle."""
    server = hand_over()
    with ask(server, server.offer(parcel(handle=b"h" * 64))) as fetched:
        assert (fetched.response.cuda_ipc_handle, fetched.descriptors) == (b"h" * 64, [])


def test_a_token_is_good_for_one_fetch(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server = hand_over()
    token = server.offer(parcel(*pipes))
    with ask(server, token):
        assert "unknown, was used" in str(refusal(ask(server, token)))
    assert isinstance(refusal(ask(server, token)), AuthenticationError)


def test_a_stolen_token_is_of_no_use_to_another_identity(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server = hand_over()
    token = server.offer(parcel(*pipes), "sw_ann")
    for proof in (b"", b"x" * 32, handoff_proof("sw_eve", token), handoff_proof("sw_ann", b"x" * 16)):
        stolen = fetch(server.path, transport_pb2.HandoffRequest(token=token, proof=proof))
        assert "attached with another access token" in str(refusal(stolen))
    own = transport_pb2.HandoffRequest(token=token, proof=handoff_proof("sw_ann", token))
    with fetch(server.path, own) as fetched:
        assert len(fetched.descriptors) == 2


def test_without_tokens_a_proof_is_asked_of_nobody(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server = hand_over()
    token = server.offer(parcel(*pipes))
    request = transport_pb2.HandoffRequest(token=token, proof=handoff_proof("sw_ann", token))
    with fetch(server.path, request) as fetched:
        assert len(fetched.descriptors) == 2


@pytest.mark.parametrize("guess", [b"x", b"\0" * 16, b"x" * 4000])
def test_an_unknown_token_is_refused(hand_over: Start, parcel: Any, pipes: tuple[int, int], guess: bytes) -> None:
    server = hand_over()
    token = server.offer(parcel(*pipes))
    assert isinstance(refusal(ask(server, guess)), AuthenticationError)
    with ask(server, token) as fetched:
        assert len(fetched.descriptors) == 2


@pytest.mark.parametrize("request_bytes", [b"\xff", b"x" * 100_000])
def test_what_is_no_request_is_refused(hand_over: Start, request_bytes: bytes) -> None:
    server = hand_over()
    assert isinstance(refusal(fetch(server.path, request_bytes)), AuthenticationError)


def test_a_withdrawn_parcel_is_refused_and_its_client_keeps_it(
    hand_over: Start, parcel: Any, pipes: tuple[int, int]
) -> None:
    server = hand_over()
    fetched, unfetched = parcel(*pipes), parcel(*pipes)
    first, second = server.offer(fetched), server.offer(unfetched)
    with ask(server, first):
        server.withdraw(first)
        server.withdraw(second)
        server.withdraw(second)
        assert isinstance(refusal(ask(server, second)), AuthenticationError)
        assert (server.statistics(), fetched.ended.is_set()) == (HandoffStatistics(0, 0, 1, True), False)
    fetched.wait_ended()
    assert not unfetched.ended.is_set()


def test_a_dropped_parcel_ends_its_connection(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server, offer = hand_over(), parcel(*pipes)
    token = server.offer(offer)
    with ask(server, token) as fetched:
        server.drop(token)
        assert fetched.connection.recv(1) == b""
        offer.wait_ended()
        server.drop(token)
    unfetched = server.offer(offer)
    server.drop(unfetched)
    assert isinstance(refusal(ask(server, unfetched)), AuthenticationError)
    assert server.statistics() == NOTHING


def test_a_second_message_ends_the_connection(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server, offer = hand_over(), parcel(*pipes)
    with ask(server, server.offer(offer)) as fetched:
        fetched.connection.send(b"more")
        offer.wait_ended()
        assert fetched.connection.recv(1) == b""


def test_the_death_of_the_process_is_told(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server, offer = hand_over(), parcel(*pipes)
    token = server.offer(offer)
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.connect(sys.argv[1])\n"
        "s.send(b'\\x0a\\x10' + bytes.fromhex(sys.argv[2]))\n"
        "print(len(socket.recv_fds(s, 4096, 4)[1]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.path, token.hex()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"2\n"
        assert not offer.ended.is_set()
        process.kill()
        offer.wait_ended()


@pytest.mark.parametrize(("uid", "allowed"), [(1000, False), (1001, True), (0, True), (os.geteuid(), True)])
def test_only_known_users_fetch(hand_over: Start, parcel: Any, pipes: tuple[int, int], uid: int, allowed: bool) -> None:
    server = hand_over(uids={os.geteuid(), 0, 1001}, uid_of=lambda connection: uid)
    token = server.offer(parcel(*pipes))
    if allowed:
        with ask(server, token) as fetched:
            assert len(fetched.descriptors) == 2
        return
    error = refusal(ask(server, token))
    assert isinstance(error, PermissionDeniedError)
    assert error.metadata == {"uid": "1000"}
    assert "--handoff-uids" in str(error)
    assert server.statistics() == HandoffStatistics(1, 0, 0, True)  # the parcel still waits for its own client


def test_the_kernel_says_who_connects(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server = hand_over(uids={os.geteuid() + 1})
    error = refusal(ask(server, server.offer(parcel(*pipes))))
    assert error.metadata == {"uid": str(os.geteuid())}


def test_a_silent_connection_ends_at_its_deadline(
    hand_over: Start, parcel: Any, pipes: tuple[int, int], clock: Any
) -> None:
    server = hand_over()
    quiet = silent(server)
    with ask(server, server.offer(parcel(*pipes))):  # served behind the silent one
        assert server.statistics() == HandoffStatistics(0, 1, 1, True)
        clock.now += 4.9
        silent(server).close()
        with ask(server, server.offer(parcel(*pipes))):
            assert server.statistics().waiting == 1
        clock.now += 0.2
        silent(server).close()  # something happens, so that the thread looks at the test's clock
        assert quiet.recv(1) == b""
        assert server.statistics().fetched == 1  # clients that have fetched may be silent for ever
    quiet.close()


def test_a_flood_of_connections_keeps_nobody_waiting(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server, before = hand_over(), held_by_process()[0]
    flood = [silent(server) for _ in range(3 * MOST_WAITING)]
    with ask(server, server.offer(parcel(*pipes))) as fetched:
        assert len(fetched.descriptors) == 2
    assert server.statistics().waiting <= MOST_WAITING
    for connection in flood[: 2 * MOST_WAITING]:  # the oldest made room
        assert connection.recv(1) == b""
    for connection in flood:
        connection.close()
    with ask(server, server.offer(parcel(*pipes))):
        assert server.statistics().waiting <= MOST_WAITING
    server.close()
    assert held_by_process()[0] <= before


def test_without_descriptors_it_pauses_instead_of_spinning(
    hand_over: Start, parcel: Any, pipes: tuple[int, int], clock: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = hand_over()
    accept, failures = socket.socket.accept, []

    def exhausted(listener: socket.socket) -> Any:
        if not failures:
            failures.append(listener)
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", exhausted)
    with silent(server) as late:
        late.send(transport_pb2.HandoffRequest(token=server.offer(parcel(*pipes))).SerializeToString())
        until(lambda: not server.statistics().accepting)
        clock.now += 1.1
        descriptors = socket.recv_fds(late, 4096, 4)[1]
    for descriptor in descriptors:
        os.close(descriptor)
    assert (len(descriptors), len(failures)) == (2, 1)


def test_descriptors_that_a_client_sends_are_not_received(
    hand_over: Start, parcel: Any, pipes: tuple[int, int]
) -> None:
    server, before = hand_over(), held_by_process()[0]
    token = server.offer(parcel(*pipes))
    connection = silent(server)
    socket.send_fds(connection, [transport_pb2.HandoffRequest(token=token).SerializeToString()], [pipes[0]] * 50)
    _, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
    assert len(descriptors) == 2
    assert held_by_process()[0] == before + 2 + 2  # both ends of the connection, and the fetched parcel
    for descriptor in descriptors:
        os.close(descriptor)
    connection.close()


def test_closing_ends_everything_and_twice_is_harmless(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    before = held_by_process()[0]
    server, offer = hand_over(), parcel(*pipes)
    quiet = silent(server)
    with ask(server, server.offer(offer)) as fetched:
        server.close()
        server.close()
        assert (fetched.connection.recv(1), quiet.recv(1)) == (b"", b"")
        offer.wait_ended()
    quiet.close()
    server.drop(server.offer(offer))
    assert (server.statistics(), held_by_process()[0]) == (NOTHING, before)
    with pytest.raises(ConnectionRefusedError):
        silent(server)


def test_two_hundred_fetches_leave_nothing(hand_over: Start, parcel: Any, pipes: tuple[int, int]) -> None:
    server, before = hand_over(), held_by_process()[0]
    for fetched in range(200):
        offer = parcel(*pipes)
        token = server.offer(offer)
        with ask(server, token):
            if fetched % 2:
                server.drop(token)
        offer.wait_ended()
    assert (server.statistics(), held_by_process()[0]) == (NOTHING, before)
