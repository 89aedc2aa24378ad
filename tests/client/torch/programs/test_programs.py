"""Random programs on torch's optimizers and on the drop-in side by side, compared after each action.

A program is a list of actions with a seed each, and both sides draw the same numbers. A failure prints the seed of its
program: `STEPWIRE_PROGRAM=seed` runs it alone. The number of programs comes from `STEPWIRE_PROGRAMS`, and that of the
first from `STEPWIRE_PROGRAMS_FROM`, so that a long run can be made in parts; `make programs` sets them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepwire
from stepwire_server.testing import serving
from tests.client.torch.programs.actions import ACTIONS, NEEDS_NEW_STATE, Action
from tests.client.torch.programs.world import RULES, WAYS, World

PROGRAMS = int(os.environ.get("STEPWIRE_PROGRAMS", "24"))
ALONE = os.environ.get("STEPWIRE_PROGRAM")
BATCHES = 8
FIRST = 20_261_129 + int(os.environ.get("STEPWIRE_PROGRAMS_FROM", "0"))
LONGEST = 16
BOUND = {"rtol": 2e-4, "atol": 2e-5}

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server of small chunks, whose sessions nobody sweeps."""
    with serving(max_chunk_bytes=64 << 10, sweep_seconds=3600.0, threads=1) as target:
        yield target


class Program:
    """One program, and both sides of it."""

    def __init__(self, seed: int, target: str) -> None:
        rng = random.Random(seed)
        rule, way = rng.choice(list(RULES)), rng.choice(list(WAYS))
        # The states are compared after each action of some programs alone: a read may hide what is wrong without it.
        self._reads = rng.random() < 0.5
        served = [pair for pair in ACTIONS if rule != "Adagrad" or pair[1] not in NEEDS_NEW_STATE]
        length, weights = rng.randint(4, LONGEST), [weight for weight, _ in served]
        chosen = rng.choices([action for _, action in served], weights, k=length)
        self.actions: list[tuple[Action, int]] = [(action, rng.getrandbits(32)) for action in chosen]
        self.words = [f"program {seed}: {rule}, {way}"]
        self.local = World(rule, seed, None)
        # An overflow is an error by default; `allow` is what torch does.
        self.remote = World(rule, seed, {"server": target, "non_finite": "allow", **WAYS[way]})

    def run(self) -> None:
        try:
            for action, seed in self.actions:
                self.words.append(action.__name__)
                self._act(action, seed)
            self.words.append("the end")
            self._compare_states()
        except BaseException as error:
            error.add_note("; ".join(self.words))
            raise
        finally:
            self.remote.close()

    def _act(self, action: Action, seed: int) -> None:
        expected = action(self.local, random.Random(seed))
        found = action(self.remote, random.Random(seed))
        torch.testing.assert_close(found, expected, **BOUND)
        self._compare_models()
        if self._reads:
            self._compare_states()

    def _compare_models(self) -> None:
        assert len(self.local.params) == len(self.remote.params)
        for one, other in zip(self.local.params, self.remote.params, strict=True):
            torch.testing.assert_close(other.detach(), one.detach(), **BOUND)
        groups, theirs = self.local.optimizer.param_groups, self.remote.optimizer.param_groups
        assert [_numbers(group) for group in groups] == [_numbers(group) for group in theirs]
        assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in theirs]

    def _compare_states(self) -> None:
        for one, other in zip(self.local.stepped(), self.remote.stepped(), strict=True):
            mine = {key: value for key, value in self.local.optimizer.state.get(one, {}).items() if value is not None}
            theirs = dict(self.remote.optimizer.state.get(other, {}))
            assert list(theirs) == list(mine)
            for key, value in mine.items():
                torch.testing.assert_close(theirs[key], value, **BOUND)


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {key: float(value) if torch.is_tensor(value) else value for key, value in group.items() if key != "params"}


def seeds(batch: int) -> range:
    if ALONE is not None:
        return range(int(ALONE), int(ALONE) + (batch == 0))
    return range(FIRST + batch, FIRST + PROGRAMS, BATCHES)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_programs_do_what_they_do_in_torch(batch: int, target: str) -> None:
    for seed in seeds(batch):
        Program(seed, target).run()


def test_every_action_is_in_some_program(target: str) -> None:
    used = {action for seed in range(FIRST, FIRST + 400) for action, _ in _actions(seed)}
    assert used == {action for _, action in ACTIONS}


def _actions(seed: int) -> list[tuple[Action, int]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.client.torch.programs.test_programs.World", lambda *arguments: None)
        return Program(seed, "").actions


def test_the_client_of_a_program_is_closed_with_it(target: str) -> None:
    with stepwire.connect(target) as client:
        before = {info.session_id for info in client.sessions()}
        Program(FIRST, target).run()
        assert {info.session_id for info in client.sessions()} == before
