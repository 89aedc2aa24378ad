"""Steps of torch optimizers that are interrupted, at every point of the caller's thread and every line of the errand's.

After an interrupt the model is whole: as before the step or as after it. The user then repeats the step, or goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure
from tests.support.numpy_server import numpy_server

torch = pytest.importorskip("torch")


class Kind(NamedTuple):
    """A kind of optimizer.

    Attributes:
        options: the options of the optimizer.
        dtype: the name of the dtype of its model.
        backward: the backward pass is interrupted as well as the step.
        direct: the caller's thread makes the step itself, so there is no errand to leave.
    """

    options: dict[str, Any]
    dtype: str = "float32"
    backward: bool = False
    direct: bool = False


KINDS = {
    "tcp": Kind({"transport": "tcp"}),
    "shm": Kind({"transport": "shm"}),
    "bfloat16": Kind({"transport": "uds"}, dtype="bfloat16"),
    "views": Kind({"transport": "packets", "shared_views": True}, direct=True),
    "packets": Kind({"transport": "packets"}, direct=True),
    "early": Kind({"transport": "tcp", "send_in_backward": True}, backward=True),
}


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with numpy_server(max_chunk_bytes=64 << 10) as server:
        yield server.target


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Training:
    """A model and its optimizer."""

    def __init__(self, target: str, kind: Kind) -> None:
        from stepwire.torch import Adam

        self.kind = kind
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(30, 1200), torch.nn.Tanh(), torch.nn.Linear(1200, 3))
        self.model.to(getattr(torch, kind.dtype))
        self.optimizer = Adam(self.model.parameters(), lr=0.01, server=target, **kind.options)

    def backward(self, number: int) -> None:
        """Make gradients that depend on no parameter."""
        self.optimizer.zero_grad()
        draw = torch.Generator().manual_seed(number)
        loss: Any = 0.0
        for parameter in self.model.parameters():
            loss = loss + (parameter * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)).sum()
        loss.backward()

    def course(self, *numbers: int) -> bytes:
        for number in numbers:
            self.backward(number)
            self.optimizer.step()
        return self.values()

    def values(self) -> bytes:
        return b"".join(parameter.detach().float().numpy().tobytes() for parameter in self.model.parameters())

    def interrupted(self, place: Arrival | Departure) -> bool:
        """Take the second step, and tell whether it was interrupted."""
        if not self.kind.backward:
            self.backward(2)
        try:
            with place:
                if self.kind.backward:
                    self.backward(2)
                self.optimizer.step()
        except KeyboardInterrupt:
            return True
        return False

    def goes_on(self) -> bytes:
        """Repeat the second step, unless it is known to be applied, and take the third."""
        known = self.optimizer.session.statistics()
        done = known.step_in_doubt is None and known.applied_step == 2
        return self.course(3) if done else self.course(2, 3)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@contextlib.contextmanager
def begun(target: str, kind: Kind) -> Iterator[Training]:
    """Yield a training after its first step."""
    training = Training(target, kind)
    with contextlib.closing(training.optimizer):
        training.course(1)
        yield training


def places(target: str, kind: Kind, seed: str) -> Iterator[Arrival | Departure]:
    for place in (Arrival, Departure)[: 1 if kind.backward or kind.direct else 2]:
        with begun(target, kind) as training:
            counted = place()
            assert not training.interrupted(counted)
        count = counted.points if isinstance(counted, Arrival) else counted.lines
        for at in chosen(count, seed):
            yield place(at)


def undisturbed(target: str, kind: Kind, *numbers: int) -> bytes:
    with begun(target, kind) as training:
        return training.course(*numbers)


def test_an_interrupted_step_is_repeated_or_known_to_be_applied(target: str, kind: Kind) -> None:
    expected, wrong = undisturbed(target, kind, 2, 3), []
    for place in places(target, kind, "same"):
        with begun(target, kind) as training:
            assert training.interrupted(place) or not place.arrived, place
            if training.goes_on() != expected or training.optimizer.applied_step != 3:
                wrong.append(str(place))
    assert wrong == []


def test_other_gradients_after_an_interrupt_are_the_next_step(target: str, kind: Kind) -> None:
    expected, wrong = {2: undisturbed(target, kind, 3), 3: undisturbed(target, kind, 2, 3)}, []
    for place in places(target, kind, "another"):
        with begun(target, kind) as training:
            training.interrupted(place)
            if training.course(3) != expected.get(training.optimizer.applied_step):
                wrong.append(str(place))
    assert wrong == []


def test_a_checkpoint_after_an_interrupt_is_of_one_step(target: str, kind: Kind) -> None:
    expected, wrong = {1: undisturbed(target, kind), 2: undisturbed(target, kind, 2)}, []
    for place in places(target, kind, "checkpoint"):
        with begun(target, kind) as training:
            training.interrupted(place)
            saved = training.optimizer.state_dict()
            steps = {float(entry["step"]) for entry in saved["state"].values()}
            if training.values() != expected.get(training.optimizer.applied_step):
                wrong.append(f"{place} values")
            if steps != {float(training.optimizer.applied_step)}:
                wrong.append(f"{place} {steps}")
    assert wrong == []
