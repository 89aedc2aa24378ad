"""Parameters and gradients in shared memory: the bits of messages, and memory that may be written all the same."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch

import stepwire
from stepwire.torch import Adam
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.client.torch.twins import assert_same_bits


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    layers = (torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 2))
    return torch.nn.Sequential(*layers).to(dtype)


def backward(network: Any, step: int) -> None:
    parameter = next(network.parameters())
    inputs = torch.randn((8, 40), generator=torch.Generator().manual_seed(step)).to(parameter.dtype)
    network(inputs).square().mean().backward()


class Pair:
    """One training twice: in messages, and in shared memory."""

    def __init__(self, target: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.plain_model, self.model = model(dtype), model(dtype)
        self.plain = Adam(self.plain_model.parameters(), lr=0.02, server=target, transport="tcp")
        self.shared = Adam(
            self.model.parameters(), lr=0.02, **{"server": target, "transport": "shm", "shared_views": True} | options
        )

    @property
    def both(self) -> list[tuple[Any, Any]]:
        return [(self.plain_model, self.plain), (self.model, self.shared)]

    def step(self, step: int, passes: int = 1) -> None:
        for network, optimizer in self.both:
            optimizer.zero_grad()
            for one in range(passes):
                backward(network, 10 * step + one)
            optimizer.step()

    def compare(self) -> None:
        assert_same_bits(self.plain_model.parameters(), self.model.parameters())

    def close(self) -> None:
        self.plain.close()
        self.shared.close()


def lying(pair: Pair) -> list[int]:
    """Return where the parameters are."""
    return [parameter.data_ptr() for parameter in pair.model.parameters()]


@pytest.fixture
def pair(target: str) -> Any:
    made = Pair(target)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_messages(target: str, dtype: torch.dtype) -> None:
    pair = Pair(target, dtype)
    for step in range(1, 7):
        pair.step(step, passes=1 + step % 2)
        pair.compare()
    assert pair.shared.transport.name == "shm"
    pair.close()


def test_a_step_copies_nothing(pair: Pair) -> None:
    pair.step(1)
    gradients: Any = pair.shared.session.shared_gradients()
    parameters: Any = pair.shared.session.shared_parameters()
    for (name, view), parameter in zip(gradients.items(), pair.model.parameters(), strict=True):
        assert parameter.grad.data_ptr() == view.ctypes.data
        assert parameter.data_ptr() == parameters[name].ctypes.data


def test_gradients_that_were_replaced_or_dropped_are_read_from_their_memory(pair: Pair) -> None:
    pair.step(1)
    for network, optimizer in pair.both:
        optimizer.zero_grad()
        backward(network, 77)
        network[0].weight.grad = torch.full_like(network[0].weight, 0.5)
        network[2].bias.grad = None
        optimizer.step()
    pair.compare()


def test_what_is_written_to_a_parameter_counts_and_harms_nobody(pair: Pair) -> None:
    """The mapping is private: a write copies the page here, and the next step sends it."""
    for step in range(1, 5):
        for network, _ in pair.both:
            with torch.no_grad():
                network[0].weight[3] *= -1.0
        if step == 3:
            for network, _ in pair.both:
                network.load_state_dict({name: value * 2 for name, value in network.state_dict().items()})
        pair.step(step)
        pair.compare()


def test_what_is_written_behind_torchs_back_counts_when_it_is_uploaded(pair: Pair) -> None:
    pair.step(1)
    for network, optimizer in pair.both:
        network[2].weight.data.clamp_(-0.05, 0.05)
        optimizer.upload_parameters()
    pair.step(2)
    pair.step(3)
    pair.compare()


def test_a_parameter_that_is_given_other_memory_comes_home(pair: Pair) -> None:
    """Replies are written into the views; a parameter in other memory would not be trained any more."""
    pair.step(1)
    at = lying(pair)
    for network, _ in pair.both:
        weights = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
        torch.nn.utils.vector_to_parameters(weights * 0.5, network.parameters())  # it assigns to `.data`
        network[0].weight.data = network[0].weight.data.t().contiguous().t()
    assert lying(pair) != at
    for step in range(2, 5):
        pair.step(step)
        pair.compare()
        assert lying(pair) == at
    assert pair.model[0].weight.is_contiguous()


def test_two_optimizers_alternate_with_one_model(pair: Pair, target: str) -> None:
    pair.step(1)
    saved = pair.shared.state_dict()
    with Adam(pair.model.parameters(), lr=0.5, server=target, transport="shm", shared_views=True) as other:
        other.load_state_dict(saved)
    first, pair.shared = pair.shared, Adam(pair.model.parameters(), server=target, shared_views=True)
    pair.shared.load_state_dict(saved)
    first.close()  # it gives the model memory of its own
    for step in range(2, 5):
        pair.step(step)
        pair.compare()


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("lazily", [torch.conj, torch._neg_view], ids=["conjugated", "negated"])
def test_a_gradient_that_is_a_lazy_view_is_stepped_as_what_it_means(target: str, lazily: Any, views: bool) -> None:
    dtype = torch.complex64 if lazily is torch.conj else torch.float32
    parameter, twin = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    optimizer, local = Adam([parameter], lr=0.1, server=target, shared_views=views), torch.optim.Adam([twin], lr=0.1)
    for step in range(3):
        factors = torch.tensor([1.0 + step, 3.0]).to(dtype) * (1 + 2j if dtype.is_complex else 1)
        for each, its in ((parameter, optimizer), (twin, local)):
            its.zero_grad()
            (each * factors).real.sum().backward()
            gradient = lazily(each.grad)
            each.grad = gradient if each is parameter else gradient.resolve_conj().resolve_neg()
            its.step()
    optimizer.close()
    torch.testing.assert_close(parameter.detach(), twin.detach())


def test_a_sparse_gradient_is_refused_in_the_same_words(target: str) -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    with Adam(embedding.named_parameters(), server=target, transport="shm", shared_views=True) as optimizer:
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(stepwire.InvalidRequestError, match="the gradient of 'weight' is sparse"):
            optimizer.step()


def test_a_state_dict_and_more_parameters_go_along(pair: Pair) -> None:
    pair.step(1)
    for network, optimizer in pair.both:
        with torch.no_grad():
            network[0].weight.neg_()  # not sent yet when the session is left for another
        network.append(torch.nn.Linear(2, 3))
        with torch.no_grad():
            for parameter in network[3].parameters():
                parameter.fill_(0.25)
        optimizer.add_param_group({"params": network[3].parameters(), "lr": 0.5})
        assert_same_bits(map(torch.from_numpy, optimizer.session.pull().values()), network.parameters())
    for step in range(2, 5):
        pair.step(step)
        pair.compare()
    states = [optimizer.state_dict()["state"] for _, optimizer in pair.both]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert_same_bits(one.values(), other.values())


def test_a_closed_optimizer_leaves_the_model_memory_of_its_own(target: str) -> None:
    pair = Pair(target)
    pair.step(1)
    before = [parameter.detach().clone() for parameter in pair.model.parameters()]
    pair.close()
    gc.collect()
    assert_same_bits(before, pair.model.parameters())
    backward(pair.model, 5)
    with torch.no_grad():
        pair.model[0].weight.fill_(1.0)


def test_without_shared_memory_there_are_no_views(target: str) -> None:
    with pytest.raises(stepwire.UnsupportedFeatureError, match="shares no memory with its server"):
        Pair(target, transport="tcp")


def test_dtypes_that_are_not_those_of_the_memory_are_refused(target: str) -> None:
    network = model()
    network[2].bfloat16()
    with pytest.raises(stepwire.UnsupportedFeatureError, match="use one dtype in the model"):
        Adam(network.parameters(), server=target, shared_views=True)
    with pytest.raises(stepwire.UnsupportedFeatureError, match="leave gradient_dtype and reply_dtype out"):
        Adam(model().parameters(), server=target, shared_views=True, reply_dtype="bfloat16")


def test_a_broken_stream_moves_everything_to_other_memory(pair: Pair) -> None:
    pair.step(1)
    before = lying(pair)
    pair.shared.session.detach()
    for step in range(2, 6):
        pair.step(step)
        pair.compare()
    parameters: Any = pair.shared.session.shared_parameters()
    assert lying(pair) == [view.ctypes.data for view in parameters.values()]
    assert lying(pair) != before


def test_memory_that_is_lost_for_good_leaves_ordinary_parameters(caplog: Any) -> None:
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=3600.0)
    with Server(config) as server, caplog.at_level(logging.WARNING):
        pair = Pair(server.target)
        pair.step(1)
        pair.shared.session.attach(transport="tcp")
        for step in range(2, 5):
            pair.step(step)
            pair.compare()
        pair.close()
    assert "ordinary memory from now on" in caplog.text


def test_parameters_of_another_dtype_are_refused_later_too_and_nothing_is_moved(pair: Pair) -> None:
    pair.step(1)
    before = pair.shared.session_id
    with pytest.raises(stepwire.UnsupportedFeatureError, match="use one dtype in the model"):
        pair.shared.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]})
    assert (pair.shared.session_id, len(pair.shared.param_groups)) == (before, 1)
    pair.step(2)
    pair.compare()


def test_a_model_over_several_channels_is_refused(target: str) -> None:
    with pytest.raises(
        stepwire.UnsupportedFeatureError, match="shared_views: the model is partitioned over several servers"
    ):
        Adam(model().parameters(), server=target, channels=2, shared_views=True)
