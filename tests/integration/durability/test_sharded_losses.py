"""Shards of which one server loses steps, as durability `checkpoint` allows."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

import stepwire
from tests.integration.durability.test_losses import Restarting, bits, gradient, parameters
from tests.support.lost_replies import lost_replies

pytestmark = pytest.mark.many

TWO_PHASES = pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}], ids=["one phase", "two phases"])


class Shards:
    """Two servers, of which the second can lose what it was told since its image."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        """Start both."""
        self._stack = stack
        for name in ("first", "second"):
            (folder / name).mkdir()
        self.first, self.second = (Restarting(folder / name, stack) for name in ("first", "second"))

    def session(self, **options: Any) -> stepwire.Session:
        """Connect, and make a session."""
        window_bytes = options.pop("window_bytes", 0)
        retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
        targets = [self.first.target, self.second.target]
        client = stepwire.connect(targets, timeout=120.0, retry=retry, transport="tcp", window_bytes=window_bytes)
        self._stack.enter_context(client)
        return client.create_session(parameters(), durability="checkpoint", keep=True, **options)


@pytest.fixture
def shards(tmp_path: pathlib.Path) -> Iterator[Shards]:
    with contextlib.ExitStack() as stack:
        yield Shards(tmp_path, stack)


def stepped(session: stepwire.Session, first: int, last: int) -> list[bytes]:
    return [bits(session.step(gradient(number))) for number in range(first, last + 1)]


def undisturbed(folder: pathlib.Path, options: dict[str, Any]) -> list[bytes]:
    """Return the parameters after each of six steps."""
    (folder / "undisturbed").mkdir()
    with contextlib.ExitStack() as stack:
        return stepped(Shards(folder / "undisturbed", stack).session(**options), 1, 6)


@TWO_PHASES
@pytest.mark.parametrize("how", ["attached", "detached", "attached again"])
def test_the_window_of_a_shard_makes_its_loss_good(
    how: str, options: dict[str, Any], shards: Shards, tmp_path: pathlib.Path
) -> None:
    expected = undisturbed(tmp_path, options)
    session = shards.session(window_bytes=16 << 20, **options)
    image = shards.second.image()
    assert stepped(session, 1, 4) == expected[:4]
    if how != "attached":
        session.detach()
    shards.second.crash(image)
    if how == "attached again":
        session.attach()
    assert stepped(session, 5, 6) == expected[4:]


@TWO_PHASES
def test_the_window_of_a_shard_comes_before_a_doubt(
    options: dict[str, Any], shards: Shards, tmp_path: pathlib.Path
) -> None:
    expected = undisturbed(tmp_path, options)
    session = shards.session(window_bytes=16 << 20, **options)
    image = shards.second.image()
    assert stepped(session, 1, 3) == expected[:3]
    with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
        session.step(gradient(4))
    shards.second.crash(image)
    assert stepped(session, 4, 6) == expected[3:]


@pytest.mark.parametrize("detached", [False, True])
def test_the_loss_of_a_shard_is_told_with_its_place(detached: bool, shards: Shards) -> None:
    session = shards.session()
    image = shards.second.image()
    stepped(session, 1, 4)
    ahead = session.state()
    if detached:
        session.detach()
    shards.second.crash(image)
    with pytest.raises(stepwire.StateLossError, match="has lost steps 1 to 4.*shard 1"):
        session.step(gradient(5))
    with pytest.raises(stepwire.StepMismatchError, match="load_state"):
        session.step(gradient(5))
    session.load_state(ahead)
    assert session.step(gradient(5)) and session.applied_step == 5


def test_nothing_is_loaded_into_a_part_of_the_shards_after_a_loss(shards: Shards) -> None:
    session = shards.session()
    image = shards.second.image()
    stepped(session, 1, 4)
    shards.second.crash(image)
    with pytest.raises(stepwire.StateLossError):
        session.load(parameters())
    assert [shard.info().applied_step for shard in session.shards] == [4, 0]
    session.load(parameters())
    assert (bits(session.pull()), session.applied_step) == (bits(parameters()), 4)


def test_a_pull_waits_for_the_window_of_a_shard(shards: Shards) -> None:
    session = shards.session(window_bytes=16 << 20)
    image = shards.second.image()
    after = stepped(session, 1, 4)[-1]
    shards.second.crash(image)
    assert bits(session.pull()) == after
    session.save_checkpoint("now")
    assert session.checkpoints()[-1].step == 4
