"""Going on with a session: in another client, by its id or by a handle; and every way in which it is another one's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch
from stepwire.errors import FencedError, InvalidRequestError, SessionNotFoundError
from tests.client.torch.twins import assert_same_bits, gradients, parameters

SHAPES = ((33, 17), (129,), ())


def advance(optimizer: Any, params: list[Any], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(
            params, gradients([p.shape for p in params], step, params[0].dtype), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()


@pytest.fixture
def straight(remote: Any) -> list[Parameter]:
    """The parameters after eight steps without an interruption."""
    params = parameters()
    advance(remote("AdamW", params, lr=0.01, amsgrad=True), params, range(1, 9))
    return params


# --- the same one ---------------------------------------------------------------------------------------


def test_another_process_goes_on_by_the_id(target: str, straight: list[Any]) -> None:
    """Each optimizer has a client of its own; the model of the second is made anew, and its parameters are pulled."""
    params = parameters()
    with contextlib.closing(stepwire.torch.AdamW(params, lr=0.01, amsgrad=True, server=target)) as first:
        advance(first, params, range(1, 5))
        first.detach()
    fresh = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    with stepwire.torch.AdamW(fresh, lr=0.01, amsgrad=True, server=target, session=first.session_id) as second:
        assert_same_bits(fresh, params)
        assert (second.session_id, second.applied_step) == (first.session_id, 4)
        advance(second, fresh, range(second.applied_step + 1, 9))
    assert_same_bits(fresh, straight)


def test_another_process_goes_on_by_a_handle(target: str, client: stepwire.Client, straight: list[Any]) -> None:
    params = parameters()
    first = stepwire.torch.AdamW(params, lr=0.01, amsgrad=True, server=target)
    advance(first, params, range(1, 5))
    handle = first.handle()
    first.detach()
    fresh = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    with stepwire.torch.AdamW(fresh, lr=0.5, amsgrad=True, server=target) as second:
        made = second.session_id
        second.load_state_dict(handle)
        assert_same_bits(fresh, params)
        assert (second.session_id, second.applied_step, second.param_groups[0]["lr"]) == (first.session_id, 4, 0.01)
        assert made not in {info.session_id for info in client.sessions()}
        advance(second, fresh, range(5, 9))
    assert_same_bits(fresh, straight)


def test_half_precision_goes_on_from_the_masters(remote: Any, target: str) -> None:
    straight, params = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    advance(remote("Adam", straight, lr=1e-3), straight, range(1, 9))
    first = remote("Adam", params, lr=1e-3)
    advance(first, params, range(1, 5))
    first.detach()
    fresh = [Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    with stepwire.torch.Adam(fresh, lr=1e-3, server=target, session=first.session_id) as second:
        assert_same_bits(fresh, params)
        advance(second, fresh, range(5, 9))
    assert_same_bits(fresh, straight)


def test_other_numbers_are_the_present_ones(remote: Any, target: str) -> None:
    """The session was created with lr 1; the groups' numbers count."""
    parameter = Parameter(torch.zeros(2))
    first = remote("SGD", [parameter], lr=1.0)
    first.detach()
    with stepwire.torch.SGD([parameter], lr=0.25, server=target, session=first.session_id) as second:
        parameter.grad = torch.ones(2)
        second.step()
    assert parameter.tolist() == [-0.25] * 2


def test_attaching_to_ones_own_session_again_keeps_no_streams(exits: contextlib.ExitStack) -> None:
    from stepwire_server.testing import serving

    target = exits.enter_context(serving(threads=1, max_streams=6))
    parameter = Parameter(torch.zeros(2))
    with stepwire.torch.SGD([parameter], lr=1.0, server=target) as optimizer:
        for _ in range(20):
            optimizer.load_state_dict(optimizer.handle())
            parameter.grad = torch.ones(2)
            optimizer.step()
    assert parameter.tolist() == [-20.0] * 2


# --- another's ------------------------------------------------------------------------------------------

Change = Callable[[str, str], Any]


def opened(rule: str = "Adam", shapes: Any = SHAPES, names: str = "abc", **options: Any) -> Change:
    """Return a function that opens a session with another model, optimizer or option."""

    def found(target: str, session: str) -> Any:
        params = list(zip(names, parameters(shapes), strict=True))
        return getattr(stepwire.torch, rule)(params, server=target, session=session, **options)

    return found


def two_groups(target: str, session: str) -> Any:
    params = list(zip("abc", parameters(), strict=True))
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    return stepwire.torch.Adam(groups, server=target, session=session)


DIFFERENT: dict[str, tuple[Change, str]] = {
    "a name": (opened(names="abx"), r"it has no tensor 'x', but 'a', 'b', 'c'"),
    "one more": (opened(shapes=(*SHAPES, (2,)), names="abcd"), r"it has no tensor 'd'"),
    "one less": (opened(shapes=SHAPES[:2], names="ab"), r"it has a tensor 'c' that the model has not"),
    "a shape": (opened(shapes=((33, 17), (130,), ())), r"'b' has shape \(129,\) there and \(130,\) here"),
    "a group": (two_groups, r"'b' is in group 0 there and in 1 here"),
    "the rule": (opened("NAdam"), r"it runs Adam\(.*\) and this is NAdam\("),
    "decay": (opened("AdamW"), r"it runs Adam\(.*decoupled_weight_decay=False.*decoupled_weight_decay=True"),
    "amsgrad": (opened(amsgrad=True), r"it runs Adam\(.*amsgrad=False.*amsgrad=True"),
    "clipping": (opened(clip_grad_norm=1.0), r"it has clip_grad_norm=None and this has 1.0"),
    "non_finite": (opened(non_finite="allow"), r"it has non_finite='reject' and this has 'allow'"),
    "precision": (opened(state_precision="int8"), r"it has state_precision='float32' and this has 'int8'"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_session_of_another_model_or_optimizer_is_refused(what: str, target: str, remote: Any) -> None:
    """The session stays its owner's: a check does not attach."""
    params = parameters()
    owner = remote("Adam", list(zip("abc", params, strict=True)))
    advance(owner, params, range(1, 3))
    change, words = DIFFERENT[what]
    with pytest.raises(
        InvalidRequestError, match=f"session: '{owner.session_id}' is not the session of this optimizer: {words}"
    ) as raised:
        change(target, owner.session_id)
    assert "leave `session` out for a new one" in str(raised.value)
    advance(owner, params, range(3, 5))
    assert owner.applied_step == 4


def test_an_unknown_session_is_not_made_anew(target: str, client: stepwire.Client) -> None:
    before = len(list(client.sessions()))
    with pytest.raises(SessionNotFoundError):
        stepwire.torch.Adam(parameters(), server=target, session="0123456789abcdef0123456789abcdef")
    assert len(list(client.sessions())) == before


def test_a_handle_of_an_ended_session_leaves_the_present_one(remote: Any) -> None:
    params = parameters()
    ended, optimizer = remote("Adam", parameters()), remote("Adam", params)
    handle = ended.handle()
    ended.close()
    with pytest.raises(SessionNotFoundError):
        optimizer.load_state_dict(handle)
    advance(optimizer, params, range(1, 3))
    assert optimizer.applied_step == 2


def test_an_optimizer_that_attaches_fences_the_one_before(remote: Any, target: str) -> None:
    params, others = parameters(), parameters()
    first = remote("Adam", params)
    advance(first, params, range(1, 3))
    with stepwire.torch.Adam(others, server=target, session=first.session_id) as second:
        advance(second, others, range(3, 4))
        before = [parameter.detach().clone() for parameter in params]
        with pytest.raises(
            FencedError, match=f"To attach again, make this optimizer again with session='{first.session_id}'"
        ):
            advance(first, params, range(3, 4))
        assert_same_bits(params, before)
        advance(second, others, range(4, 5))
        assert second.applied_step == 4
