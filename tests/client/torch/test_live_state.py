"""`optimizer.state`: reads are torch's, writes do what they do in torch, and nothing is fetched without need."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

import stepwire
import stepwire.torch
from stepwire.errors import InvalidRequestError, UnavailableError
from stepwire.torch.state_tensor import StateTensor
from tests.client.torch.twins import Twins, parameters, same_bits

EPS = torch.finfo(torch.float32).eps
BOUND = {"rtol": 16 * EPS, "atol": 16 * EPS}


def twins(target: str, rule: str = "Adam", **options: Any) -> Twins:
    return Twins(
        lambda params, remote_params: (
            getattr(torch.optim, rule)(params, lr=0.05, **options),
            getattr(stepwire.torch, rule)(remote_params, lr=0.05, server=target, **options),
        )
    )


def assert_same_state(pair: Twins) -> None:
    """Compare the keys, the slots and the values of both states."""
    one, other = pair.local.state, pair.remote.state
    assert [place for place, parameter in enumerate(pair.params) if parameter in one] == [
        place for place, parameter in enumerate(pair.remote_params) if parameter in other
    ]
    for mine, theirs in zip(pair.params, pair.remote_params, strict=True):
        if mine not in one:
            continue
        present = {key: value for key, value in one[mine].items() if value is not None}
        assert list(present) == list(other[theirs])
        for key, value in present.items():
            torch.testing.assert_close(other[theirs][key], value, **BOUND, check_device=True)


# --- reads ----------------------------------------------------------------------------------------------

RULES = [
    ("Adam", {}),
    ("AdamW", {"amsgrad": True}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("Adagrad", {"initial_accumulator_value": 0.25}),
    ("Adadelta", {}),
]


@pytest.mark.parametrize(("rule", "options"), RULES, ids=lambda value: str(value))
def test_reads_are_torchs(rule: str, options: dict[str, Any], target: str) -> None:
    with (pair := twins(target, rule, **options)).remote:
        assert_same_state(pair)
        assert (len(pair.remote.state), bool(pair.remote.state)) == (len(pair.local.state), bool(pair.local.state))
        for _ in range(3):
            pair.draw()
            pair.params[1].grad = pair.remote_params[1].grad = None
            pair.local.step()
            pair.remote.step()
            assert_same_state(pair)
        assert len(pair.remote.state) == len(pair.local.state)


def test_a_state_is_fetched_once_between_two_steps(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (pair := twins(target)).remote:
        fetched: list[int] = []
        fetch = stepwire.Session.state
        monkeypatch.setattr(
            stepwire.Session, "state", lambda self, **options: (fetched.append(1), fetch(self, **options))[1]
        )
        pair.step(2)
        assert fetched == []
        for _ in range(2):
            assert len(pair.remote.state) == 3
            assert all(float(entry["exp_avg"].abs().sum()) for entry in pair.remote.state.values())
        assert fetched == [1]
        pair.step()
        assert fetched == [1]
        assert pair.remote.state[pair.remote_params[0]]["step"].item() == 3.0
        assert fetched == [1, 1]


def test_a_read_that_fails_leaves_the_entry_to_be_read_again(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (pair := twins(target)).remote:
        pair.step(1)
        entry = pair.remote.state[pair.remote_params[0]]
        pair.step(1)
        with monkeypatch.context() as patched, pytest.raises(UnavailableError):
            patched.setattr(stepwire.Session, "state", failing)
            len(entry)
        assert_same_state(pair)
        pair.step(2)
        assert_same_state(pair)


def failing(session: stepwire.Session, **options: Any) -> NoReturn:
    raise UnavailableError("not now")


def test_a_tensor_that_is_held_shows_the_present_values(target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step()
        held = pair.remote.state[pair.remote_params[0]]["exp_avg"]
        view, entry = held.view(-1)[5:9], pair.remote.state[pair.remote_params[1]]
        mine = pair.local.state[pair.params[0]]["exp_avg"]
        for _ in range(2):
            pair.step()
            torch.testing.assert_close(held, mine, **BOUND)
            torch.testing.assert_close(view, mine.view(-1)[5:9], **BOUND)
            assert entry["step"].item() == pair.local.state[pair.params[1]]["step"].item()
            assert pair.remote.state[pair.remote_params[0]]["exp_avg"] is held


def test_an_entry_of_before_the_first_step_is_filled_by_it(target: str) -> None:
    with (pair := twins(target)).remote:
        entry = pair.remote.state[pair.remote_params[0]]
        assert (dict(entry), len(pair.remote.state), pair.remote_params[0] in pair.remote.state) == ({}, 1, True)
        assert pair.remote.state.get(pair.remote_params[1]) is None
        pair.step()
        assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]


def test_tensors_look_like_any_other(target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step()
        state = pair.remote.state
        tensor = state[pair.remote_params[0]]["exp_avg"]
        assert isinstance(tensor, torch.Tensor)
        assert type(tensor.clone()) is type(tensor * 2) is type(torch.stack([tensor])) is torch.Tensor
        assert tensor.to("cpu") is tensor
        file = io.BytesIO()
        torch.save({"entry": state[pair.remote_params[0]], "tensor": tensor}, file)
        file.seek(0)
        read = torch.load(file, weights_only=True)
        for again in (read["tensor"], read["entry"]["exp_avg"], copy.deepcopy(tensor), copy.copy(tensor)):
            assert type(again) is torch.Tensor
            assert same_bits(again, tensor)
        for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.copy()):
            assert isinstance(copied, dict)
            assert len(copied) == 3
        assert "exp_avg_sq" in repr(state)
        assert state[pair.remote_params[0]] == state[pair.remote_params[0]]


def test_a_state_can_be_read_of_a_resumed_session(target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step(2)
        saved = pair.remote.session_id
        pair.remote.detach()
        with pytest.raises(InvalidRequestError, match="the optimizer is closed"):
            len(pair.remote.state)
        pair.remote = stepwire.torch.Adam(pair.remote_params, lr=0.05, server=target, session=saved)
        assert_same_state(pair)
        pair.remote.close()


# --- writes ---------------------------------------------------------------------------------------------

Write = Callable[[Any, list[Any]], object]


def clear(optimizer: Any, params: list[Any]) -> None:
    optimizer.state.clear()


def assign(optimizer: Any, params: list[Any]) -> None:
    optimizer.state = defaultdict(dict)


def set_state(optimizer: Any, params: list[Any]) -> None:
    optimizer.__setstate__({"state": defaultdict(dict)})


def delete(optimizer: Any, params: list[Any]) -> None:
    del optimizer.state[params[0]]


def pop(optimizer: Any, params: list[Any]) -> None:
    entry = optimizer.state.pop(params[0])
    assert float(entry["step"]) == 3.0
    assert optimizer.state.pop(params[0], None) is None
    with pytest.raises(KeyError):
        optimizer.state.pop(params[0])
    with pytest.raises(KeyError):
        del optimizer.state[params[0]]


def zero(optimizer: Any, params: list[Any]) -> None:
    for parameter in params:
        optimizer.state[parameter]["exp_avg"].zero_()


def zero_all(optimizer: Any, params: list[Any]) -> None:
    for entry in optimizer.state.values():
        for value in entry.values():
            value.zero_()


def zero_one_view(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[0]]["exp_avg"].data[3].zero_()


def zero_foreach(optimizer: Any, params: list[Any]) -> None:
    torch._foreach_mul_([entry["exp_avg_sq"] for entry in optimizer.state.values()], 0.25)


def write_through_numpy(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[1]]["exp_avg"].numpy()[7] = 2.0


def replace(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[0]]["exp_avg"] = torch.full((33, 17), 0.5)


def put(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[1]] = {"step": torch.tensor(9.0), "exp_avg": torch.ones(129), "exp_avg_sq": torch.ones(129)}


def put_and_fill(optimizer: Any, params: list[Any]) -> None:
    entry: dict[str, Any] = {}
    optimizer.state[params[2]] = entry
    entry.update(step=torch.tensor(2.0), exp_avg=torch.tensor(0.5), exp_avg_sq=torch.tensor(0.25))
    assert optimizer.state[params[2]] is entry


def put_nothing(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[1]] = {}
    assert params[1] in optimizer.state


def count_on(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[0]]["step"] += 5
    optimizer.state[params[1]]["step"].fill_(1.0)


def drop_and_put(optimizer: Any, params: list[Any]) -> None:
    entry = optimizer.state[params[0]]
    del optimizer.state[params[0]]
    entry["exp_avg"] = entry["exp_avg"] * 2
    optimizer.state[params[0]] = entry
    assert optimizer.state[params[0]] is entry


def swap(optimizer: Any, params: list[Any]) -> None:
    """Give a parameter a copy of its own state, as code that moves a state between devices does."""
    for parameter, entry in optimizer.state.items():
        optimizer.state[parameter] = type(entry)(OrderedDict((key, value.clone()) for key, value in entry.items()))


def move(optimizer: Any, params: list[Any]) -> None:
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = value.to("cpu")


def update(optimizer: Any, params: list[Any]) -> None:
    optimizer.state.update({params[0]: {}})
    assert optimizer.state.setdefault(params[0], 7) == {}
    optimizer.state[params[1]].setdefault("exp_avg", None)
    optimizer.state.setdefault(params[2], None)["exp_avg"].neg_()


def clear_entry(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[0]].clear()


WRITES = [
    *(clear, assign, set_state, delete, pop, zero, zero_all, zero_one_view, zero_foreach, write_through_numpy, replace),
    *(put, put_and_fill, put_nothing, count_on, drop_and_put, swap, move, update, clear_entry),
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("read_first", [False, True])
def test_writes_do_what_they_do_in_torch(write: Write, read_first: bool, target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step(3)
        if read_first:
            assert_same_state(pair)
        write(pair.local, pair.params)
        write(pair.remote, pair.remote_params)
        assert_same_state(pair)
        pair.step(2)
        pair.assert_close(**BOUND, what=write.__name__)
        assert_same_state(pair)


@pytest.mark.parametrize("write", [zero, delete, put, count_on], ids=lambda write: write.__name__)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_writes_reach_moments_of_fewer_bits(write: Write, precision: Any, target: str) -> None:
    """A matrix beside small tensors: blocks of 8-bit moments get their maxima anew."""
    shapes = ((80, 100), (129,), ())
    params = parameters(shapes)
    with stepwire.torch.Adam(params, lr=0.05, server=target, state_precision=precision) as optimizer:
        for _ in range(3):
            for parameter in params:
                parameter.grad = torch.full_like(parameter, 2.0)
            optimizer.step()
        optimizer.state[params[0]]["exp_avg"][:] = torch.linspace(-3, 3, 8000).view(80, 100)
        if write is not put:
            write(optimizer, params)
        present = {place: dict(optimizer.state.get(parameter, {})) for place, parameter in enumerate(params)}
        wanted = {place: {k: v.clone() for k, v in entry.items()} for place, entry in present.items()}
        saved = optimizer.state_dict()["state"]
        for place, entry in wanted.items():
            for key, value in entry.items():
                torch.testing.assert_close(saved[place][key], value, rtol=0.08, atol=0.02)


def test_tensors_that_are_held_are_written_after_more_steps(target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step(2)
        both = ((pair.local, pair.params), (pair.remote, pair.remote_params))
        held = [
            (
                optimizer.state[params[0]],
                optimizer.state[params[1]]["exp_avg"],
                optimizer.state[params[2]]["exp_avg_sq"],
            )
            for optimizer, params in both
        ]
        views = [second.view(3, 43)[1] for _, second, _ in held]
        for _ in range(3):
            pair.step()
            for (entry, _, third), view in zip(held, views, strict=True):
                entry["exp_avg"].mul_(0.5)
                view.zero_()
                third.add_(0.125)
        pair.step(2)
        pair.assert_close(**BOUND)
        assert_same_state(pair)


def test_what_was_taken_out_is_alive_no_more(target: str) -> None:
    """In torch a tensor that is no part of the state any more keeps its values, and may be written."""
    with (pair := twins(target)).remote:
        pair.step(2)
        first, second, _ = pair.remote_params
        dropped, kept = pair.remote.state[first]["exp_avg"], pair.remote.state[second]["exp_avg"]
        entry, before = pair.remote.state[first], dropped.clone()
        del pair.remote.state[first]
        pair.remote.state[second]["exp_avg"] = torch.zeros(129)
        del pair.local.state[pair.params[0]]
        pair.local.state[pair.params[1]]["exp_avg"] = torch.zeros(129)
        pair.step()
        assert same_bits(dropped.clone(), before)
        assert same_bits(entry["exp_avg"].clone(), before)
        dropped.zero_()
        kept.zero_()
        entry["step"].zero_()
        pair.step()
        pair.assert_close(**BOUND)


def test_a_state_dict_and_a_load_have_what_was_written(target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step(2)
        held = []
        for optimizer, params in ((pair.local, pair.params), (pair.remote, pair.remote_params)):
            held.append(optimizer.state[params[0]]["exp_avg"])
            held[-1].fill_(0.5)
            saved = copy.deepcopy(optimizer.state_dict())
            assert saved["state"][0]["exp_avg"].unique().tolist() == [0.5]
            held[-1].fill_(0.75)  # of the state until the load; torch's tensor is replaced by it
            optimizer.load_state_dict(saved)
            held[-1].fill_(0.25)
        assert_same_state(pair)
        pair.step(2)
        pair.assert_close(**BOUND)
        assert held[1].unique().tolist() == [0.25]


def test_a_saved_state_dict_is_no_part_of_the_state(target: str) -> None:
    """The one difference: torch's own state dict shares the memory of the state."""
    with (pair := twins(target)).remote:
        pair.step(2)
        saved = pair.remote.state_dict()
        before = copy.deepcopy(saved)
        for entry in saved["state"].values():
            entry["exp_avg"].zero_()
        assert float(pair.remote.state[pair.remote_params[0]]["exp_avg"].abs().sum()) > 0
        pair.step(1)
        pair.assert_close(**BOUND)
        pair.remote.load_state_dict(before)


# --- keys of other code ----------------------------------------------------------------------------------


def look_ahead(optimizer: Any, params: list[Any]) -> None:
    """Keep slow weights in the state of the optimizer, as wrappers do."""
    for parameter in params:
        slow = optimizer.state[parameter].setdefault("slow", parameter.detach().clone())
        slow.add_(parameter.detach() - slow, alpha=0.5)
        with torch.no_grad():
            parameter.copy_(slow)


def test_values_of_wrappers_stay_and_are_saved(target: str) -> None:
    with (pair := twins(target)).remote:
        for _ in range(3):
            pair.step(2)
            look_ahead(pair.local, pair.params)
            look_ahead(pair.remote, pair.remote_params)
        for optimizer in (pair.local, pair.remote):
            optimizer.state["calls"] = 6
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert optimizer.state["calls"] == 6
        assert_same_state(pair)
        look_ahead(pair.local, pair.params)
        look_ahead(pair.remote, pair.remote_params)
        pair.step(2)
        pair.assert_close(**BOUND)
        fresh = torch.optim.Adam(pair.remote_params)
        fresh.load_state_dict(pair.remote.state_dict())
        assert same_bits(fresh.state[pair.remote_params[0]]["slow"], pair.remote.state[pair.remote_params[0]]["slow"])
        pair.remote.state.clear()
        assert len(pair.remote.state) == 0


def test_empty_entries_are_saved_and_loaded(target: str) -> None:
    """A read makes an empty entry, as in a defaultdict, and a loaded dict makes one of each that it has."""
    with (pair := twins(target)).remote:
        pair.draw()
        pair.params[1].grad = pair.remote_params[1].grad = None
        pair.local.step()
        pair.remote.step()
        for optimizer, params in ((pair.local, pair.params), (pair.remote, pair.remote_params)):
            assert dict(optimizer.state[params[1]]) == {}
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert params[1] in optimizer.state
        assert_same_state(pair)
        pair.step(2)
        assert_same_state(pair)


def test_a_tensor_of_the_state_is_freed_with_its_last_holder(target: str) -> None:
    """A moment that stays in a variable, as after a loop, costs no more than itself."""
    with (pair := twins(target)).remote:
        pair.step()
        last = None
        for entry in pair.remote.state.values():
            for last in entry.values():
                last.mul_(1.0)
        assert isinstance(last, StateTensor)
        pair.step()
        live = pair.remote.state
        assert [tensor is last for tensor in live._alive.values()] == [True]
        assert (live._used, live._read, pair.remote.backing._view) == ({}, [], None)
        del last
        assert list(live._alive.values()) == []


# --- refusals -------------------------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_refused_until_it_is_mended(target: str) -> None:
    with (pair := twins(target)).remote:
        pair.step(2)
        first = pair.remote_params[0]
        for value, words in (
            ({"exp_avg": torch.zeros(3)}, r"state\[0\]\['step'\]: is missing"),
            ({"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}, r"state\[0\]\['exp_avg'\]: shape \(3,\) is not"),
            ({"step": "two"}, r"state\[0\]\['step'\]: 'two' is no number of steps"),
            ([1, 2], r"optimizer.state: the state of a parameter is \[1, 2\], and no dict"),
        ):
            pair.remote.state[first] = value
            pair.draw()
            for _ in range(2):
                with pytest.raises(InvalidRequestError, match=words):
                    pair.remote.step()
            with pytest.raises(InvalidRequestError, match=words):
                pair.remote.state_dict()
        del pair.remote.state[first]
        del pair.local.state[pair.params[0]]
        pair.step(2)
        pair.assert_close(**BOUND)


def test_writes_between_backward_pass_and_step(target: str) -> None:
    """The step that a backward pass has begun is given up for them."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(30, 20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    local = torch.optim.Adam(models[0].parameters(), lr=0.05)
    remote = stepwire.torch.Adam(models[1].parameters(), lr=0.05, server=target, transport="tcp", send_in_backward=True)
    with remote:
        for step in range(5):
            for model, optimizer in zip(models, (local, remote), strict=True):
                optimizer.zero_grad()
                model(torch.full((4, 30), 0.1 * step)).square().sum().backward()
                if step == 3:
                    for entry in optimizer.state.values():
                        entry["exp_avg"].zero_()
                optimizer.step()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(other, one, **BOUND)


class Interrupting(dict[int, Any]):
    """A dict whose first assignment is interrupted, before or after it."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self._after, self._interrupts = after, 1

    def __setitem__(self, key: int, value: Any) -> None:
        self._interrupts -= 1
        if self._interrupts == 0 and not self._after:
            raise KeyboardInterrupt
        super().__setitem__(key, value)
        if self._interrupts == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [False, True])
def test_a_write_that_is_made_again_after_an_interrupt_counts(
    target: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twins(target).remote as optimizer:
        parameter = optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moment = optimizer.state[parameter]["exp_avg"]
        monkeypatch.setattr(moment.keeper, "_used", Interrupting(after=after))
        with pytest.raises(KeyboardInterrupt):
            moment.fill_(0.125)
        moment.fill_(0.125)
        written = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(written, torch.full_like(parameter, 0.125).detach())
