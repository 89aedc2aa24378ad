"""Clients of other languages, with gRPC's own settings: no message is larger than they receive."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

import stepwire_server.testing
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

RECEIVED_BYTES = 4 << 20


def config(elements: int, groups: int = 1) -> session_pb2.SessionConfig:
    """Describe a session whose parameters start as zeros, cut into groups."""
    return session_pb2.SessionConfig(
        tensors=[
            tensor_pb2.TensorSpec(name=f"w{group}", shape=[elements // groups], group=group) for group in range(groups)
        ],
        groups=[optimizer_pb2.ParameterGroup() for _ in range(groups)],
        optimizer=optimizer_pb2.Optimizer(
            rule=optimizer_pb2.RULE_SGD, hyperparameters=optimizer_pb2.Hyperparameters(lr=1.0)
        ),
        initialization=session_pb2.INITIALIZATION_ZEROS,
    )


def test_replies_and_pulls_fit_the_receive_limit_of_a_client_that_sets_none() -> None:
    elements = 2_500_000
    gradient = np.ones(elements, np.float32).tobytes()
    with (
        stepwire_server.testing.serving(threads=1) as target,
        grpc.insecure_channel(target) as channel,
    ):
        stub = OptimizerServiceStub(channel)
        made = stub.CreateSession(pb.CreateSessionRequest(request_id="a", config=config(elements)))
        session = made.session.session_id

        def messages() -> list[pb.AttachRequest]:
            sent = [pb.AttachRequest(open={"session_id": session, "attach_token": made.attach_token})]
            for offset in range(0, elements, 500_000):
                chunk = tensor_pb2.Chunk(offset=offset, count=500_000)
                payload = gradient[offset * 4 : (offset + 500_000) * 4]
                sent.append(pb.AttachRequest(chunk=chunk, payload=payload))
            sent[1].begin.CopyFrom(step_pb2.StepBegin(step=1))
            sent[-1].commit.SetInParent()
            return sent

        replies = list(stub.Attach(iter(messages()), timeout=60.0))
        pulled = list(stub.Pull(pb.PullRequest(session_id=session), timeout=60.0))
    assert replies[-1].result.step == 1
    for received in (replies, pulled):
        assert max(message.ByteSize() for message in received) <= RECEIVED_BYTES
        values = np.frombuffer(b"".join(message.payload for message in received), np.float32)
        assert values.tobytes() == (-np.ones(elements, np.float32)).tobytes()


@pytest.mark.parametrize("groups", [1, 256])
def test_the_largest_unary_step_fits_it_too(groups: int) -> None:
    with (
        stepwire_server.testing.serving(threads=1) as target,
        grpc.insecure_channel(target) as channel,
    ):
        stub = OptimizerServiceStub(channel)
        most = stub.GetServerInfo(pb.GetServerInfoRequest()).limits.max_unary_bytes // 4
        made = stub.CreateSession(
            pb.CreateSessionRequest(request_id="a", config=config(most // 256 // groups * 256 * groups, groups))
        )
        request = pb.StepRequest(
            session_id=made.session.session_id,
            attach_token=made.attach_token,
            begin=step_pb2.StepBegin(step=1),
            payload=np.ones(made.session.layout.size, np.float32).tobytes(),
        )
        reply = stub.Step(request, timeout=60.0)
    assert (reply.result.step, len(reply.result.telemetry.groups)) == (1, groups)
    assert reply.ByteSize() <= RECEIVED_BYTES
