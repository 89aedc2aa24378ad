"""Samples: changes that torch does not count, in parameters of every form, and no change where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.torch.samples import Samples
from stepwire.torch.tensors import ParameterTensor
from tests.client.torch.twins import SHAPES, Twins, assert_same_bits, parameters

EPS = torch.finfo(torch.float32).eps
BOUND = {"rtol": 8 * EPS, "atol": 8 * EPS}


def wrapped(*params: Any) -> list[ParameterTensor]:
    return [ParameterTensor(str(place), parameter) for place, parameter in enumerate(params)]


FORMS: dict[str, Callable[[], Any]] = {
    "a number": lambda: Parameter(torch.zeros(())),
    "a vector": lambda: Parameter(torch.zeros(700)),
    "a large matrix": lambda: Parameter(torch.zeros(1200, 1024)),
    "transposed": lambda: Parameter(torch.zeros(300, 20).t()),
    "channels last": lambda: Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)),
    "with gaps": lambda: Parameter(torch.zeros(40, 60)[:, ::2]),
    "bfloat16": lambda: Parameter(torch.zeros(50, dtype=torch.bfloat16)),
    "complex": lambda: Parameter(torch.zeros(9, dtype=torch.complex64)),
    "frozen": lambda: Parameter(torch.zeros(9), requires_grad=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_write_through_data_is_seen_in_the_parameter_that_it_changed(form: str) -> None:
    changed, other = FORMS[form](), Parameter(torch.zeros(2000, 3))
    tensors = wrapped(other, changed)
    samples = Samples(tensors)
    assert samples.changed() == []
    samples.note()
    assert samples.changed() == []
    changed.data.add_(1.0)
    assert samples.changed() == [tensors[1]]
    samples.note()
    assert samples.changed() == []


@pytest.mark.parametrize("column", [0, 511, 1023])
def test_every_column_of_a_matrix_has_samples(column: int) -> None:
    """With a distance that divides the width, some columns would have none."""
    matrix = Parameter(torch.zeros(2048, 1024))
    tensors = wrapped(matrix)
    samples = Samples(tensors)
    samples.note()
    matrix.data[:, column] = 1.0
    assert samples.changed() == tensors


def test_nan_is_no_change() -> None:
    tensors = wrapped(Parameter(torch.full((5,), float("nan"))))
    samples = Samples(tensors)
    samples.note()
    assert samples.changed() == []


def test_a_parameter_that_was_given_other_memory_is_sampled_there() -> None:
    parameter = Parameter(torch.zeros(3000))
    samples = Samples(tensors := wrapped(parameter))
    samples.note()
    parameter.data = torch.ones(3000)
    samples.note()
    parameter.data.mul_(2.0)
    assert samples.changed() == tensors


@torch.no_grad()
def average(params: list[Any]) -> None:
    """Swap averages in and out again, as `torch_ema` does: what is left is what was there."""
    stored = [parameter.data.clone() for parameter in params]
    for parameter in params:
        parameter.data.copy_(torch.zeros_like(parameter))
    for parameter, values in zip(params, stored, strict=True):
        parameter.data.copy_(values)


def clamp(params: list[Any]) -> None:
    """Clip weights as WGAN does."""
    for parameter in params:
        parameter.data.clamp_(-0.3, 0.3)


def look_ahead(params: list[Any]) -> None:
    """Step back half of the way to zero, as Lookahead does to its slow weights."""
    for parameter in params:
        parameter.data.copy_(parameter.data * 0.5)


def prune(params: list[Any]) -> None:
    params[0].data[3] = 0.0


@pytest.mark.parametrize("change", [average, clamp, look_ahead, prune], ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{"transport": "tcp"}, {"shared_views": True}], ids=["tcp", "shared_views"])
def test_changes_through_data_are_followed(
    change: Callable[[list[Any]], None], options: dict[str, Any], target: str
) -> None:
    pair = Twins(
        lambda params, remote_params: (
            torch.optim.Adam(params, lr=0.01),
            stepwire.torch.Adam(remote_params, lr=0.01, server=target, **options),
        )
    )
    with pair.remote:
        for _ in range(3):
            pair.step()
            change(pair.params)
            change(pair.remote_params)
        pair.step(2)
        pair.assert_close(**BOUND)


def test_the_first_change_that_samples_found_is_told(remote: Any, caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = remote("SGD", params, lr=1.0)
    with caplog.at_level(logging.WARNING, "stepwire.torch.parameters"):
        for _ in range(3):
            for parameter in params:
                parameter.grad = torch.ones_like(parameter)
                parameter.data.mul_(0.5)
            optimizer.step()
    assert caplog.text.count("was changed through .data") == 1
    assert "upload_parameters()" in caplog.text


def test_a_sampled_change_costs_one_upload(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    with stepwire.torch.Adam(params, server=client) as optimizer:
        loads: list[Any] = []
        load = optimizer.session.load
        monkeypatch.setattr(optimizer.session, "load", lambda *args, **options: loads.append(load(*args, **options)))
        for step in range(4):
            for parameter in params:
                parameter.grad = torch.ones_like(parameter)
            if step == 1:
                params[0].data.neg_()
            optimizer.step()
        assert len(loads) == 1


def test_views_and_messages_have_the_same_bits_when_single_elements_are_written(target: str) -> None:
    """In shared views the kernel tells of the page, so one element is enough."""
    plain, views = parameters(((300, 301),)), parameters(((300, 301),))
    first = stepwire.torch.Adam(plain, lr=0.01, server=target, transport="tcp")
    second = stepwire.torch.Adam(views, lr=0.01, server=target, shared_views=True)
    with first, second:
        for step in range(4):
            for params, optimizer in ((plain, first), (views, second)):
                params[0].grad = torch.full_like(params[0], 1.0 + step)
                params[0].data[17 * step + 5, 299 - step] += 1.0
                if params is plain:
                    optimizer.upload_parameters()
                optimizer.step()
            assert_same_bits(plain, views)


def test_a_model_whose_pages_are_not_told_is_sampled(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwire.torch.views.has_written_pages", lambda address, nbytes: None)
    plain, views = parameters(SHAPES), parameters(SHAPES)
    first = stepwire.torch.Adam(plain, lr=0.01, server=target, transport="tcp")
    second = stepwire.torch.Adam(views, lr=0.01, server=target, shared_views=True)
    with first, second:
        for step in range(4):
            for params, optimizer in ((plain, first), (views, second)):
                for parameter in params:
                    parameter.grad = torch.full_like(parameter, 1.0 + step)
                if step % 2:
                    average(params)
                    clamp(params)
                optimizer.step()
            assert_same_bits(plain, views)
