"""Steps of tables that are interrupted, at points of the caller's thread and lines of the errand's: applied once.

The user goes on with the next batch, as a training loop does, without a repetition or a word to the optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

import stepwire
from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure
from tests.support.numpy_server import numpy_server

torch = pytest.importorskip("torch")

ROWS, WIDTH = 6, 3
BATCHES = ([1, 4, 4], [2, 4], [0, 1])


@pytest.fixture(scope="module")
def client() -> Iterator[stepwire.Client]:
    with numpy_server(max_chunk_bytes=64 << 10) as server, stepwire.connect(server.target, transport="tcp") as client:
        yield client


class Local:
    """A table in the model."""

    def __init__(self, client: stepwire.Client) -> None:
        from stepwire.torch import SparseAdam

        start = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
        self.table = torch.nn.Embedding(ROWS, WIDTH, sparse=True, _weight=start)
        self.optimizer = SparseAdam(self.table.parameters(), lr=0.5, server=client)
        self.session = self.optimizer.session

    def backward(self, rows: list[int]) -> None:
        self.optimizer.zero_grad()
        (self.table(torch.tensor(rows)) * torch.arange(1.0, len(rows) + 1)[:, None]).sum().backward()

    def step(self) -> None:
        self.optimizer.step()

    def values(self) -> list[Any]:
        model: list[Any] = self.table.weight.tolist()
        assert model == self.session.pull()["0"].tolist()
        return model


class Remote:
    """A table on the server alone. Its rule adds gradients up, so it makes no difference which steps they are in."""

    def __init__(self, client: stepwire.Client) -> None:
        from stepwire.torch import RemoteEmbedding

        self.table = RemoteEmbedding(ROWS, WIDTH, optimizer=stepwire.SGD(lr=0.5), uniform_bound=0.0, server=client)
        self.session = self.table.session

    def backward(self, rows: list[int]) -> None:
        (self.table(torch.tensor(rows)) * torch.arange(1.0, len(rows) + 1)[:, None]).sum().backward()

    def step(self) -> None:
        self.table.step()

    def values(self) -> list[Any]:
        pulled: list[Any] = self.session.pull()["weight"].tolist()
        return pulled


def trained(training: Any, *batches: list[int]) -> list[Any]:
    for rows in batches:
        training.backward(rows)
        training.step()
    values: list[Any] = training.values()
    return values


@contextlib.contextmanager
def begun(kind: Any, client: stepwire.Client) -> Iterator[Any]:
    """Yield a training before its second step."""
    training = kind(client)
    with training.session:
        trained(training, BATCHES[0])
        training.backward(BATCHES[1])
        yield training


def interrupted(training: Any, place: Any) -> bool:
    try:
        with place:
            training.step()
    except KeyboardInterrupt:
        return True
    return False


def outcomes(kind: Any, client: stepwire.Client) -> list[list[Any]]:
    """Return the values that are right: of all steps, and for a model, whose gradients are zeroed, without the second.

    The last step is the third then, or the second.
    """
    with begun(kind, client) as training:
        training.step()
        found = [trained(training, BATCHES[2])]
    if kind is Local:
        with begun(kind, client) as training:
            found.append(trained(training, BATCHES[2]))
    return found


@pytest.mark.parametrize("kind", [Local, Remote])
def test_an_interrupted_step_is_applied_once_or_not_at_all_and_the_next_one_once(
    client: stepwire.Client, kind: Any
) -> None:
    right, wrong = outcomes(kind, client), []
    for way in (Arrival, Departure):
        with begun(kind, client) as training:
            counted = way()
            assert not interrupted(training, counted)
        count = counted.points if isinstance(counted, Arrival) else counted.lines
        for at in chosen(count, f"{kind.__name__} {way.__name__}"):
            with begun(kind, client) as training:
                interrupted(training, place := way(at))
                values = trained(training, BATCHES[2])
                if values != right[3 - training.session.applied_step if kind is Local else 0]:
                    wrong.append(str(place))
    assert wrong == []
