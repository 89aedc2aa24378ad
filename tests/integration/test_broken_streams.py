"""A stream that breaks inside a step, however it breaks, leaves no trace: no bit of state, no byte, no stream."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest

import stepwire
from stepwire.v1 import attach_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from tests.integration.probes import chunks_staged, steps_over, stream_ends
from tests.integration.proxy import Proxy
from tests.integration.training import same_bits
from tests.support.raw import RawClient, RawStream, Refused, commit, step_message

_SIZE = 20_000  # two chunks each way
GRADIENT = np.random.default_rng(5).standard_normal(_SIZE, np.float32)
HALF, REST = slice(0, 10_000), slice(10_000, _SIZE)

Break = Callable[[RawStream, Proxy], None]


def closes(stream: RawStream, proxy: Proxy) -> None:
    stream.finish()
    refused(stream, "INVALID_FRAME")


def cancels(stream: RawStream, proxy: Proxy) -> None:
    stream.cancel()


def loses_its_connection(stream: RawStream, proxy: Proxy) -> None:
    proxy.sever()
    refused(stream, "UNREACHABLE")


def sends_a_chunk_again(stream: RawStream, proxy: Proxy) -> None:
    stream.send(step_message(2, GRADIENT, slice(9_999, 10_001), begin=False, commit=False))
    refused(stream, "INVALID_TENSOR")


def sends_more_than_it_said(stream: RawStream, proxy: Proxy) -> None:
    message = step_message(2, GRADIENT, slice(10_000, 11_000), begin=False, commit=False)
    message.payload += b"1234"
    stream.send(message)
    refused(stream, "INVALID_TENSOR")


def sends_beyond_the_end(stream: RawStream, proxy: Proxy) -> None:
    message = step_message(2, GRADIENT, slice(0, 1_000), begin=False, commit=False)
    message.chunk.offset = _SIZE - 999
    stream.send(message)
    refused(stream, "INVALID_TENSOR")


def commits_too_early(stream: RawStream, proxy: Proxy) -> None:
    stream.send(commit())
    refused(stream, "INVALID_TENSOR")


def begins_anew(stream: RawStream, proxy: Proxy) -> None:
    stream.send(step_message(2, GRADIENT, HALF, commit=False))
    refused(stream, "INVALID_FRAME")


def opens_anew(stream: RawStream, proxy: Proxy) -> None:
    stream.send(pb.AttachRequest(open=attach_pb2.AttachOpen()))
    refused(stream, "INVALID_FRAME")


def sends_bytes_without_a_place(stream: RawStream, proxy: Proxy) -> None:
    stream.send(pb.AttachRequest(payload=b"1234"))
    refused(stream, "INVALID_FRAME")


def sends_rows(stream: RawStream, proxy: Proxy) -> None:
    stream.send(pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=10_000, count=1, rows=[1]), payload=b"1234"))
    refused(stream, "INVALID_TENSOR")


def commits_with_a_factor_that_it_has_not_been_asked_for(stream: RawStream, proxy: Proxy) -> None:
    stream.send(pb.AttachRequest(commit=step_pb2.StepCommit(clip_coefficient=0.5)))
    refused(stream, "INVALID_CONFIG")


def refused(stream: RawStream, reason: str) -> None:
    """The server ends the stream for this reason."""
    with pytest.raises(Refused) as error:
        stream.receive()
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "breaks",
    [
        closes,
        cancels,
        loses_its_connection,
        sends_a_chunk_again,
        sends_more_than_it_said,
        sends_beyond_the_end,
        commits_too_early,
        begins_anew,
        opens_anew,
        sends_bytes_without_a_place,
        sends_rows,
        commits_with_a_factor_that_it_has_not_been_asked_for,
    ],
)
def test_half_a_step_leaves_no_trace(
    server: Server, proxy: Proxy, raw: RawClient, client: stepwire.Client, breaks: Break
) -> None:
    created = raw.create(_SIZE)
    session, token = created.session.session_id, created.attach_token
    arrived, ended = chunks_staged(server.registry.get(session)), stream_ends(server.registry)
    over = steps_over(server.registry.get(session))
    with RawClient(proxy.target) as behind:
        stream = behind.attach(session, token)
        stream.receive()
        whole = [step_message(1, GRADIENT, HALF, commit=False), step_message(1, GRADIENT, REST, begin=False)]
        assert stream.step(*whole).step == 1
        over.wait()
        before, attached = client.session(session).state(), server.registry.statistics()

        stream.send(step_message(2, GRADIENT, HALF, commit=False))
        arrived.wait(3)
        assert server.registry.statistics().reserved_bytes == attached.reserved_bytes + 4 * _SIZE
        breaks(stream, proxy)
        ended.wait()

        assert server.registry.statistics() == attached._replace(streams=0)
        assert not client.session(session).info().attached
        assert same_bits(client.session(session).state(), before)
        stream = behind.attach(session, stream.token)
        assert stream.receive().opened.applied_step == 1
        assert stream.step(step_message(1, GRADIENT, slice(0, 0))).replayed


def test_a_failed_step_keeps_no_gradient_alive(server: Server, client: stepwire.Client) -> None:
    """A call raises itself in gRPC; its trace would keep every caller's frame until the collector runs."""
    gc.disable()
    try:
        with client.create_session({"w": np.zeros(_SIZE, np.float32)}) as session:
            ended = stream_ends(server.registry)
            session.step({"w": GRADIENT})
            server.registry.streams.cancel()
            ended.wait()
            gradient = GRADIENT.copy()
            there = weakref.ref(gradient)
            session.step({"w": gradient})
            del gradient
            assert there() is None
            assert session.statistics().streams_opened == 2, "the first attempt failed"
    finally:
        gc.enable()
