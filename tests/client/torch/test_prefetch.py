"""Rows that are fetched before their batch: they have the values of a pull at their use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import stepwire
from stepwire.links.remote import RemoteLink
from stepwire.torch import RemoteEmbedding, RemoteEmbeddingBag
from tests.support.lost_replies import lost_replies

ROWS, WIDTH = 12, 3


class Pulled:
    """The rows of each pull of the session, and a gate that pulls wait at."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> Pulled:
    noted, pull_rows = Pulled(), RemoteLink.pull_rows

    def noting(self: RemoteLink, rows: Any, *args: Any) -> Any:
        noted.rows.append(rows[0].indices.tolist())
        noted.gate.wait()
        return pull_rows(self, rows, *args)

    monkeypatch.setattr(RemoteLink, "pull_rows", noting)
    return noted


@pytest.fixture
def embedding(target: str) -> Iterator[RemoteEmbedding]:
    made = RemoteEmbedding(ROWS, WIDTH, optimizer=stepwire.Adam(lr=0.1), seed=1, server=target, non_finite="skip")
    yield made
    made.close()


def present(embedding: RemoteEmbedding, ids: torch.Tensor) -> torch.Tensor:
    table: Any = embedding.session.pull()
    return torch.from_numpy(table["weight"])[ids]


def step(embedding: RemoteEmbedding, ids: torch.Tensor) -> None:
    embedding(ids).sin().sum().backward()
    embedding.step()


def test_rows_are_fetched_once_and_those_that_a_step_touches_again(embedding: RemoteEmbedding, pulled: Pulled) -> None:
    first, second = torch.tensor([1, 2, 3, 3]), torch.tensor([[3, 4], [5, 1]])
    out = embedding(first)
    embedding.prefetch(second)
    out.sin().sum().backward()
    embedding.step()
    after = embedding(second)
    assert torch.equal(after, present(embedding, second))
    assert sorted(pulled.rows) == [[1, 2, 3], [1, 3], [1, 3, 4, 5]]
    embedding(torch.tensor([5, 9]))  # one of them again, and one more
    assert pulled.rows[3:] == [[9]]
    for _ in range(2):  # nobody has used what was asked for, and a second step forgets it
        step(embedding, torch.tensor([7]))
    assert torch.equal(embedding(second), present(embedding, second)) and pulled.rows[-1] == [1, 3, 4, 5]


@pytest.mark.parametrize("meaning", ["torch_sparse", "row_counter", "skipped", "global"])
def test_random_programs_get_the_values_of_a_pull(target: str, meaning: Any) -> None:
    """Prefetches that are used, replaced or too small, several steps between, skipped steps, loads, empty batches."""
    rng = np.random.default_rng(3)
    options: dict[str, Any] = {"semantics": meaning, "seed": 2, "server": target, "non_finite": "skip"}
    embedding = RemoteEmbeddingBag(ROWS, WIDTH, optimizer=stepwire.Adam(lr=0.1), mode="sum", **options)
    try:
        for _ in range(60):
            ids = torch.from_numpy(rng.integers(0, ROWS, (int(rng.integers(1, 6)), 1)))
            match rng.integers(0, 6):
                case 0:
                    embedding.session.load({"weight": rng.standard_normal((ROWS, WIDTH)).astype(np.float32)})
                case 1:
                    (embedding(ids) * float("nan")).sum().backward()
                    embedding.step()
                case 2 | 3:
                    embedding.prefetch(ids if rng.integers(0, 4) else ids[:0])
                case _:
                    step(embedding, ids)
            assert torch.equal(embedding(ids), present(embedding, ids[:, 0]))
            embedding.zero_grad()
    finally:
        embedding.close()


def test_a_step_does_not_wait_for_the_rows_of_the_next_batch(embedding: RemoteEmbedding, pulled: Pulled) -> None:
    """The pull is held until the step is over; its values of rows that the step touched are replaced all the same."""
    out, ids = embedding(torch.tensor([0, 1])), torch.tensor([1, 2])
    pulled.gate.clear()
    embedding.prefetch(ids)
    out.sum().backward()
    embedding.step()
    pulled.gate.set()
    assert torch.equal(embedding(ids), present(embedding, ids))


def test_after_a_step_that_failed_and_after_other_changes_rows_are_pulled_anew(
    embedding: RemoteEmbedding, pulled: Pulled
) -> None:
    ids = torch.tensor([1, 2])
    out = embedding(ids)
    embedding.prefetch(ids)
    out.sum().backward()
    with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
        embedding.step()
    embedding.step()
    assert torch.equal(embedding(ids), present(embedding, ids)) and pulled.rows.count([1, 2]) == 3
    embedding.prefetch(ids)
    embedding.session.step({"weight": stepwire.Rows([2], np.ones((1, WIDTH), np.float32))})
    assert torch.equal(embedding(ids), present(embedding, ids))


def test_a_pull_that_fails_is_made_again_by_the_pass_that_needs_its_rows(embedding: RemoteEmbedding) -> None:
    embedding.prefetch(torch.tensor([1, ROWS]))
    with pytest.raises(stepwire.InvalidRequestError, match="row 12 is not in"):
        embedding(torch.tensor([1, ROWS]))
    assert embedding(torch.tensor([1])).shape == (1, WIDTH)
    with pytest.raises(stepwire.InvalidRequestError, match="int64 or int32"):
        embedding.prefetch(torch.ones(2))


def test_an_embedding_of_ids_trains_as_one_of_indices_and_prefetch_sees_evictions(target: str) -> None:
    """The ids are far beyond the capacity, of which a part is evicted while its rows were fetched beforehand."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([7, 2**50, 3, 2**62 + 1, 11, 2**33])
    options: dict[str, Any] = {"optimizer": stepwire.SGD(lr=0.5), "server": target}
    remote = RemoteEmbedding(4, WIDTH, hashed=True, max_age_steps=1, uniform_bound=0.5, seed=9, **options)
    try:
        evicted = 0
        for turn in range(12):
            batch = ids[torch.randperm(3, generator=generator)[:2] + 3 * (turn // 3 % 2)]
            following = ids[torch.randperm(6, generator=generator)]
            out = remote(batch)
            remote.prefetch(following)
            out.sin().sum().backward()
            remote.step()
            want: Any = remote.session.pull(rows={"weight": following.numpy()})
            assert torch.equal(remote(following), torch.from_numpy(want["weight"].values))
            remote.zero_grad()
            evicted = remote.session.info().tables[0].evicted_rows
        assert evicted > 0
    finally:
        remote.close()


def test_rows_of_several_servers_are_fetched_beforehand_too(target: str) -> None:
    remote = RemoteEmbedding(40_000, 8, optimizer=stepwire.Adam(lr=0.1), seed=1, server=[target, target])
    try:
        for turn in range(3):
            ids = torch.randint(0, 40_000, (40,), generator=torch.Generator().manual_seed(turn))
            out = remote(ids)
            remote.prefetch(ids.flip(0)[:30])
            out.sin().sum().backward()
            remote.step()
            assert torch.equal(remote(ids), present(remote, ids))
            remote.zero_grad()
        assert len(remote.session.shards) == 2
    finally:
        remote.close()
