"""What is compiled ahead is what sessions ask for."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines import CpuEngine
from stepwire_server.engines.compiled.common_kernels import commonest


@pytest.mark.parametrize("optimizer", [stepwire.Adam(), stepwire.AdamW()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_session_asks_for_nothing_else(
    serve: Any, monkeypatch: pytest.MonkeyPatch, optimizer: stepwire.Optimizer, dtype: str
) -> None:
    asked: list[Any] = []
    prepare = CpuEngine.prepare
    monkeypatch.setattr(CpuEngine, "prepare", lambda self, *what: (asked.append(what), prepare(self, *what))[1])
    with (
        serve(pool=DevicePool.of([CpuEngine(1, use_numba=False)])) as server,
        stepwire.connect(server.target) as client,
    ):
        with client.create_session(
            {"w": np.ones(3, np.float32)}, optimizer=optimizer, gradient_dtype=dtype, reply_dtype=dtype
        ) as session:
            session.step({"w": np.ones(3, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)})
    keys = [(each.recipe.key, each.gradient, each.reply) for each in commonest(shared=True)]
    assert asked
    assert all((recipe.key, gradient, reply) in keys for recipe, gradient, reply in asked)
