"""Names of torch.optim's: served by this package or by torch, or refused in words."""

from __future__ import annotations

import pytest
import torch

import stepwire.torch
from stepwire.errors import UnsupportedFeatureError
from stepwire.torch.refused import refusal


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LBFGS", "it evaluates the model several times in one step, .* use torch.optim.LBFGS"),
        ("SparseAdam", "sparse rows are not served"),
        ("Muon", "a server has no such rule; use torch.optim.Muon"),
    ],
)
def test_an_optimizer_is_refused_where_it_is_made(name: str, words: str) -> None:
    make = getattr(stepwire.torch, name)
    with pytest.raises(UnsupportedFeatureError, match=f"^{name}: stepwire.torch does not have it: {words}") as error:
        make([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert error.value.metadata["feature"] == name


def test_an_import_by_name_keeps_the_reason() -> None:
    from stepwire.torch import LBFGS

    with pytest.raises(UnsupportedFeatureError, match="LBFGS"):
        LBFGS([])


def test_every_optimizer_of_torch_is_served_or_refused() -> None:
    theirs = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert {"Adam", "LBFGS", "Rprop"} <= theirs
    assert {name for name in theirs if name not in stepwire.torch.__all__ and refusal(name) is None} == set()


def test_schedulers_are_those_of_torch() -> None:
    from stepwire.torch import lr_scheduler

    assert lr_scheduler is torch.optim.lr_scheduler
    assert stepwire.torch.swa_utils is torch.optim.swa_utils
    with pytest.raises(AttributeError, match="module 'stepwire.torch' has no attribute 'Adm'"):
        stepwire.torch.Adm  # noqa: B018
