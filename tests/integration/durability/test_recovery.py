"""Sessions that outlive their server: what was acknowledged is there, to the last bit, after any image of the disk."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import stepwire
from stepwire.optimizers.gradient_treatment import LossScaling
from stepwire.optimizers.schedules import Schedule
from stepwire_server.server import Server
from tests.integration.training import same_bits
from tests.support.numpy_server import numpy_server

SHAPES = {"a": (70, 300), "b": (5,), "c": (33, 2)}
"""`a` is larger than a message of 64 KiB, and than a chunk that waits for its commit."""

BEFORE, AFTER = 5, 4


class Kind(NamedTuple):
    """A kind of session.

    Attributes:
        creation: the options of its creation.
        step: the options of its steps.
        transport: the transport.
    """

    creation: dict[str, Any] = {}
    step: dict[str, Any] = {}
    transport: str = "tcp"


KINDS = {
    "adam": Kind(),
    "shm": Kind(transport="shm"),
    "uds bfloat16": Kind({"gradient_dtype": "bfloat16", "reply_dtype": "bfloat16"}, transport="uds"),
    "changed": Kind({"reply_dtype": "bfloat16"}, {"reply": "changed"}),
    "int8 moments": Kind({"state_precision": "int8"}),
    "mixed moments": Kind({"state_precision": "bfloat16", "tensor_precision": {"b": "float32", "c": "int8"}}),
    "int8 gradients": Kind({"gradient_dtype": "int8"}),
    "overlap": Kind({"non_finite": "allow"}, {"overlap": True}),
    "accumulation": Kind({"accumulation_steps": 3, "clip_grad_norm": 0.5}),
    "average": Kind({"parameter_average_decay": 0.9, "clip_grad_value": 0.1}),
    "loss scaling": Kind({"loss_scaling": LossScaling(initial_scale=4.0, growth_interval=2)}),
    "schedule": Kind({"schedule": Schedule.cosine(7, warmup_steps=3), "optimizer": stepwire.SGD(lr=0.1, momentum=0.9)}),
    "nadam": Kind({"optimizer": stepwire.NAdam(lr=0.01, weight_decay=0.1)}),
    "lamb": Kind({"optimizer": stepwire.LAMB(lr=0.01, weight_decay=0.1), "clip_grad_norm": 1.0}),
    "adagrad": Kind({"optimizer": stepwire.Adagrad(lr=0.1, initial_accumulator_value=0.3)}),
    "amsgrad": Kind({"optimizer": stepwire.AdamW(lr=0.01, amsgrad=True, weight_decay=0.1), "telemetry": "none"}),
    "own numbers": Kind({}, {"hyperparameters": {"lr": 0.02, "eps": 1e-3}, "loss_scale": 8.0}),
    "missing": Kind({"missing_gradient": "keep"}),
    "frozen": Kind({"frozen": ["b"]}),
}


def gradient(number: int, kind: Kind) -> dict[str, Any]:
    draw = np.random.default_rng((7, number))
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    if kind.creation.get("missing_gradient") and number % 2:
        del arrays["c"]
    if kind.creation.get("frozen"):
        del arrays["b"]
    return arrays


def steps(session: stepwire.Session, kind: Kind, first: int, count: int) -> list[bytes]:
    """Take steps, and return their replies."""
    replies: list[Any] = [session.step(gradient(number, kind), **kind.step) for number in range(first, first + count)]
    return [b"".join(reply[name].tobytes() for name in sorted(reply)) for reply in replies]


def created(client: stepwire.Client, kind: Kind, **options: Any) -> stepwire.Session:
    parameters = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
    return client.create_session(parameters, keep=True, **kind.creation | options)


def server(folder: pathlib.Path, **settings: Any) -> Any:
    return numpy_server(data_dir=str(folder), max_chunk_bytes=64 << 10, **settings)


@pytest.fixture(scope="module")
def memory() -> Iterator[Server]:
    """A server whose sessions are in memory alone."""
    with numpy_server(max_chunk_bytes=64 << 10) as running:
        yield running


CHECKPOINTS = (None, 0, 2)
"""The step before which a checkpoint is saved; None for none."""

EVERY = "STEPWIRE_CRASH_SEEDS" in os.environ
CASES = [
    pytest.param(name, at, id=f"{name}-{at}")
    for index, name in enumerate(KINDS)
    for at in (CHECKPOINTS if EVERY else CHECKPOINTS[index % 3 : index % 3 + 1])
]


@pytest.mark.parametrize(("name", "checkpoint_at"), CASES)
def test_a_journalled_session_goes_on_as_if_nothing_had_happened(
    name: str, checkpoint_at: int | None, memory: Server, tmp_path: pathlib.Path
) -> None:
    kind, image = KINDS[name], tmp_path / "image"
    with stepwire.connect(memory.target, transport=kind.transport) as client:
        session = created(client, kind)
        expected = steps(session, kind, 1, BEFORE + AFTER)
        final, last = session.state(), session.last_result
        session.close()
    with server(tmp_path / "data") as first, stepwire.connect(first.target, transport=kind.transport) as client:
        session = created(client, kind, durability="journal")
        for number in range(BEFORE):
            if number == checkpoint_at:
                directory = first.registry.directory
                assert directory is not None
                directory.checkpointer.checkpoint(first.registry.get(session.session_id))
            assert steps(session, kind, number + 1, 1) == expected[number : number + 1]
            assert session.last_result is not None
            assert session.last_result.durable_step == number + 1
        shutil.copytree(tmp_path / "data", image)
    with server(image) as second, stepwire.connect(second.target, transport=kind.transport) as client:
        again = client.session(session.session_id)
        again.attach(take_over=True)
        assert (again.applied_step, again.info().durable_step, again.info().epoch) == (BEFORE, BEFORE, 2)
        assert steps(again, kind, BEFORE + 1, AFTER) == expected[BEFORE:]
        assert same_bits(again.state(), final)
        assert again.last_result is not None
        assert last is not None
        assert again.last_result.grad_norm == last.grad_norm
        assert again.loss_scale == last.loss_scale
