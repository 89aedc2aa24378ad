"""The language model in its short form, and its parts: data by the number of the step, and going on with a session."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stepwire_server.testing import serving

torch: Any = pytest.importorskip("torch", reason="torch is not installed (pip install torch==2.13.0)")

STEPS = 40


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Undo what training sets for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def example(module: Callable[[str], ModuleType]) -> Any:
    return module("language_model")


def config(example: Any, precision: str, steps: int = 6) -> Any:
    size = {"batch": 2, "length": 16, "width": 16, "layers": 1}
    return example.Settings(steps=steps, warm_up=2, lr=2e-3, **size, precision=precision, threads=1)


@pytest.mark.slow
def test_the_server_trains_as_torch_does_and_a_kill_changes_no_bit(run_quickly: Any) -> None:
    summary = run_quickly("language_model.py")
    local, remote, killed, fused = summary["curves"].values()
    facts = summary["facts"]
    assert list(summary["curves"]) == ["local torch", "stepwire", "stepwire, killed", "torch, fused"]
    assert list(local) == ["1", *(str(step) for step in range(4, STEPS + 1, 4))]
    assert local["1"] == pytest.approx(math.log(100), abs=0.2)  # about 100 characters, all as likely at first
    assert facts["held-out loss, local"] < 3.7
    assert remote == pytest.approx(local, abs=2e-3)
    assert fused == pytest.approx(local, abs=2e-3)
    assert {step: loss for step, loss in killed.items() if loss is not None}.items() <= remote.items()
    assert facts["their difference, stepwire and local"] < 1e-4
    assert facts["held-out loss, stepwire, killed"] == facts["held-out loss, stepwire"]
    assert facts["tensors that the kill changed"] == 0
    assert facts["killed after step"] in (STEPS // 2, STEPS // 2 + 1)
    assert facts["transport"] == "packets"
    assert list(summary["checks"].values()) == [True] * 3
    assert (summary["plot"], summary["files"]) == (None, [])


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_each_precision_trains_as_torch_does_and_goes_on_where_it_was(example: Any, precision: str) -> None:
    """float16 goes through GradScaler: unscaled by torch here, by the server there."""
    steps = config(example, precision)
    losses: dict[str, list[float]] = {"local": [], "remote": [], "broken off": []}

    def until_4(step: Any) -> None:
        losses["broken off"].append(step.loss)
        if step.number == 4:
            raise InterruptedError(step.session)

    with serving() as target:
        local = example.train(steps, lambda step: losses["local"].append(step.loss))
        remote = example.train(steps, lambda step: losses["remote"].append(step.loss), target)
        with pytest.raises(InterruptedError) as broken_off:
            example.train(steps, until_4, target)
        session = broken_off.value.args[0]
        resumed = example.train(steps, lambda step: losses["broken off"].append(step.loss), target, session)
    assert (remote.began_after, resumed.began_after) == (0, 4)
    assert losses["remote"] == pytest.approx(losses["local"], abs=1e-3)
    assert losses["broken off"] == losses["remote"]
    assert resumed.held_out_loss == remote.held_out_loss == pytest.approx(local.held_out_loss, abs=1e-4)
    for name, values in remote.parameters.items():
        np.testing.assert_array_equal(resumed.parameters[name].view(np.uint32), values.view(np.uint32), name)


def test_the_learning_rate_rises_and_falls_to_nothing(example: Any) -> None:
    ten = config(example, "float32", steps=10)
    factors = [ten.factor(step) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == 0.0
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_bits_are_compared_not_values(example: Any) -> None:
    zero, nan = np.zeros(2, np.float32), np.full(2, np.nan, np.float32)
    assert not example.same_bits(zero, -zero)
    assert example.same_bits(nan, nan.copy())


def test_a_batch_depends_on_the_number_of_its_step_alone(module: Callable[[str], ModuleType]) -> None:
    text = module("character_transformer").Text.of_python()
    x, y = text.batch(7, size=3, length=5)
    text.batch(8, size=3, length=5)
    again, _ = text.batch(7, size=3, length=5)
    other, _ = text.batch(8, size=3, length=5)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.shape == y.shape == (3, 5)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert '"assert" statement' in "".join(text.alphabet[index] for index in text.training[:40])


def test_the_model_sees_nothing_of_what_it_is_to_predict(module: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(3)
    model = module("character_transformer").CharacterTransformer(11, length=8, width=16, layers=2, heads=4)
    x = torch.arange(8)[None]
    changed = x.clone()
    changed[0, 5] = 10
    one, other = model(x)[0], model(changed)[0]
    assert torch.equal(one[:5], other[:5])
    assert (one[5:] != other[5:]).any(dim=1).all()
