"""Parts that stay the same from range to range are found once, and never used for a range that differs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines.cuda.kernels import CudaKernels
from stepwire_server.engines.protocol import PARAM
from stepwire_server.engines.regions import Region
from stepwire_server.rules import Precision, Recipe
from tests.server.pretended_gpus import PretendedGpu, needs_compiler
from tests.support import cuda_cases as cases

pytestmark = needs_compiler

RECIPE = Recipe(cases.RULES[0])
SIZE = 768


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The kernels that were looked for: precision, gradient, reply."""
    looked_for: list[tuple[Any, ...]] = []
    update = CudaKernels.update

    def noting(self: Any, recipe: Any, gradient: Any, reply: Any) -> Any:
        looked_for.append((recipe.precision, gradient.name, None if reply is None else reply.name))
        return update(self, recipe, gradient, reply)

    monkeypatch.setattr(CudaKernels, "update", noting)
    return looked_for


@contextlib.contextmanager
def session(fake: Callable[..., Any]) -> Iterator[Any]:
    """Lend a state whose second third has moments in bfloat16, with its gradient in one chunk."""
    engine = PretendedGpu(fake(), buffer_bytes=1 << 14)
    thirds = [(0, 256), (256, 512), (512, SIZE)]
    precisions = (Precision.FLOAT32, Precision.BFLOAT16, Precision.FLOAT32)
    regions = [Region(low, high, held) for (low, high), held in zip(thirds, precisions, strict=True)]
    slots = {PARAM: Precision.FLOAT32, **dict.fromkeys(RECIPE.rule.slots, regions)}
    with contextlib.closing(engine.allocate(slots, SIZE)) as state, contextlib.closing(state.receive()) as gradient:
        yield state, gradient.put(0, np.ones(SIZE, np.float32))
        state.settle()
    engine.close()


def test_ranges_of_one_pass_that_are_held_alike_share_a_call(fake, found) -> None:
    step, out = cases.step_of(RECIPE), np.empty(64, np.float32)
    with session(fake) as (state, chunk):
        for low in (0, 64, 128, 512):
            state.update(step, low, chunk, low, low + 64, out).wait()
    assert found == [(Precision.FLOAT32, "float32", "float32")]


def test_another_pass_precision_or_reply_has_a_call_of_its_own(fake, found) -> None:
    step, single, half = cases.step_of(RECIPE), np.empty(64, np.float32), np.empty(64, np.float16)
    asked = [(0, step, single), (256, step, single), (64, step, single), (128, step, half), (192, step, None)]
    with session(fake) as (state, chunk):
        for low, each, out in [*asked, (512, step._replace(seed=2), None)]:
            state.update(each, low, chunk, low, low + 64, out).wait()
    plain, rounded = (Precision.FLOAT32, "float32"), (Precision.BFLOAT16, "float32")
    replies = [(*plain, "float32"), (*rounded, "float32"), (*plain, "float32"), (*plain, "float16")]
    assert found == [*replies, (*plain, None), (*plain, None)]
