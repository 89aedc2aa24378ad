"""A whole client in twenty lines of generated code: no stepwire package, only grpcio, protobuf and NumPy.

Make the three modules from the contract with grpcio-tools, anywhere:

    python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. proto/stepwire/v1/*.proto
    PYTHONPATH=. python plain_protobuf.py localhost:50051
"""

import sys

import grpc
import numpy as np

from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

if len(sys.argv) != 2:
    sys.exit(f"usage: {sys.argv[0]} HOST:PORT of a server, such as localhost:50051; start one with: stepwire serve")
stub = OptimizerServiceStub(grpc.insecure_channel(sys.argv[1]))
config = session_pb2.SessionConfig(
    tensors=[tensor_pb2.TensorSpec(name="w", shape=[3, 4])],
    optimizer=optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
    initialization=session_pb2.INITIALIZATION_ZEROS,
)
created = stub.CreateSession(pb.CreateSessionRequest(request_id="example-1", config=config))
name, token, target = created.session.session_id, created.attach_token, np.arange(12, dtype=np.float32) / 100
w = np.zeros(12, np.float32)
for step in range(1, 201):  # minimise |w - target|² / 2, whose gradient is w - target
    begin, gradient = step_pb2.StepBegin(step=step), (w - target).tobytes()
    answer = stub.Step(pb.StepRequest(session_id=name, attach_token=token, begin=begin, payload=gradient))
    w = np.frombuffer(answer.payload, np.float32)
stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))
print(f"step {answer.result.step}: gradient norm {answer.result.telemetry.grad_norm:.2e}, w[11] = {w[11]:.4f}")
