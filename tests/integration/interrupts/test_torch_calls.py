"""Calls of torch optimizers beside steps that are interrupted, at points of the caller's thread and lines of errands.

After the interrupt the same call has the effect that it would have had, and the steps that follow have the same bits.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure
from tests.support.numpy_server import numpy_server

torch = pytest.importorskip("torch")

# Python itself ignores an exception that arrives in the callback of a weak reference.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    """A model and its optimizer, after two steps."""

    def __init__(self, target: str, **options: Any) -> None:
        from stepwire.torch import Adam

        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(30, 1200), torch.nn.Tanh(), torch.nn.Linear(1200, 3))
        self.more = torch.nn.Linear(3, 500)
        self.optimizer = Adam(self.model.parameters(), lr=0.01, server=target, transport="tcp", **options)
        self.course(1)
        self.saved = copy.deepcopy(self.optimizer.state_dict())
        self.course(2)

    def course(self, *numbers: int) -> bytes:
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=draw)
            self.optimizer.step()
        return self.values()

    def values(self) -> bytes:
        return b"".join(parameter.detach().numpy().tobytes() for parameter in self.model.parameters())


def save(training: Training) -> list[bytes]:
    state = training.optimizer.state_dict()["state"]
    return [entry["exp_avg"].numpy().tobytes() for entry in state.values()]


def load(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.saved))


def add(training: Training) -> None:
    if len(training.optimizer.param_groups) == 1:
        training.optimizer.add_param_group({"params": training.more.parameters(), "lr": 0.5})


def write(training: Training) -> None:
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(0.25)
    training.optimizer.upload_parameters()


def edit(training: Training) -> list[bytes]:
    """Write into the state of a parameter, which the next reads and steps send."""
    parameter = training.optimizer.param_groups[0]["params"][0]
    training.optimizer.state[parameter]["exp_avg"].fill_(0.125)
    return save(training)


def resume(training: Training) -> None:
    training.optimizer.load_state_dict(training.optimizer.handle())


ACTS: dict[str, Callable[[Training], Any]] = {
    "save": save, "load": load, "add": add, "write": write, "edit": edit, "resume": resume,
}  # fmt: skip


def interrupted(call: Callable[[], Any], place: Any) -> bool:
    try:
        with place:
            call()
    except KeyboardInterrupt:
        return True
    return False


@contextlib.contextmanager
def begun(target: str) -> Iterator[Training]:
    training = Training(target)
    with contextlib.closing(training.optimizer):
        yield training


@pytest.mark.parametrize("name", ACTS)
def test_the_same_call_after_an_interrupt_has_the_same_effect(target: str, name: str) -> None:
    act, wrong = ACTS[name], []
    with begun(target) as training:
        expected = act(training), training.course(3)
    for kind in (Arrival, Departure):
        with begun(target) as training:
            counted = kind()
            assert not interrupted(lambda: act(training), counted)
        count = counted.points if isinstance(counted, Arrival) else counted.lines
        for at in chosen(count, name):
            with begun(target) as training:
                interrupted(lambda: act(training), kind(at))
                if (act(training), training.course(3)) != expected:
                    wrong.append((kind.__name__, at))
    assert wrong == []


def test_an_optimizer_whose_making_is_interrupted_can_be_made_again(target: str) -> None:
    counted = Arrival()
    with counted:
        made = Training(target)
    expected = made.values()
    made.optimizer.close()
    for at in chosen(counted.points, "make"):
        interrupted(lambda: Training(target), Arrival(at))
        with begun(target) as training:
            assert training.values() == expected, at


def test_an_optimizer_whose_end_is_interrupted_can_be_ended_again(target: str) -> None:
    with begun(target) as training:
        counted = Arrival()
        with counted:
            training.optimizer.close()
    for at in chosen(counted.points, "close"):
        with begun(target) as training:
            interrupted(training.optimizer.close, Arrival(at))
            training.optimizer.close()
