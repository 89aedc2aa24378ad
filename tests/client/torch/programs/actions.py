"""The actions of programs: everything that scripts do to an optimizer of torch. Each is one function of a side."""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from stepwire.errors import DeadlineExceededError, SessionNotFoundError
from tests.client.torch.programs.world import World
from tests.support.lost_replies import lost_replies

__all__ = ["ACTIONS", "NEEDS_NEW_STATE", "Action"]

Action = Callable[[World, random.Random], object]


# --- steps ------------------------------------------------------------------------------------------------


def step(world: World, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        world.optimizer.zero_grad(set_to_none=rng.random() < 0.7)
        world.backward(rng)
        world.optimizer.step()


def accumulate(world: World, rng: random.Random) -> None:
    world.optimizer.zero_grad()
    for _ in range(2):
        world.backward(rng)
    world.optimizer.step()


def step_with_closure(world: World, rng: random.Random) -> float:
    seed = rng.getrandbits(32)

    def closure() -> float:
        world.optimizer.zero_grad()
        world.backward(random.Random(seed))
        return 1.5

    loss: float = world.optimizer.step(closure)
    return loss


def clip(world: World, rng: random.Random) -> None:
    world.optimizer.zero_grad()
    world.backward(rng)
    if rng.random() < 0.5:
        torch.nn.utils.clip_grad_norm_(world.stepped(), rng.choice((0.1, 1e6)))
    elif any(parameter.grad is not None for parameter in world.stepped()):
        torch.nn.utils.clip_grad_value_(world.stepped(), 0.5)
    world.optimizer.step()


def change_gradients(world: World, rng: random.Random) -> None:
    """Between the backward pass and the step, in ways that torch counts and in ways that it does not."""
    world.optimizer.zero_grad()
    world.backward(rng)
    way = rng.randrange(4)
    for parameter in world.stepped():
        if parameter.grad is None:
            continue
        if way == 0:
            parameter.grad.data.mul_(0.5)
        elif way == 1:
            parameter.grad = torch.ones_like(parameter)
        elif way == 2 and rng.random() < 0.5:
            parameter.grad = None
        elif way == 3:
            parameter.grad.neg_()
    world.optimizer.step()


def scale(world: World, rng: random.Random) -> float:
    """Step with a `GradScaler`, now and then over a gradient that overflows."""
    if world.scaler is None:
        world.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    overflow, unscale = rng.random() < 0.3, rng.random() < 0.5
    world.optimizer.zero_grad()
    world.backward(rng, world.scaler.scale(torch.ones(())))
    if overflow and world.stepped() and world.stepped()[0].grad is not None:
        world.stepped()[0].grad.fill_(float("inf"))
    if any(parameter.grad is not None for parameter in world.stepped()):
        if unscale:
            world.scaler.unscale_(world.optimizer)
        world.scaler.step(world.optimizer)
        world.scaler.update()
    world.optimizer.zero_grad()
    factor: float = world.scaler.get_scale()
    return factor


# --- numbers ----------------------------------------------------------------------------------------------


def change_numbers(world: World, rng: random.Random) -> None:
    group = rng.choice(world.optimizer.param_groups)
    group["lr"] = rng.choice((0.0, 0.01, 0.1, torch.tensor(0.02)))
    if "weight_decay" in group:
        group["weight_decay"] = rng.choice((0.0, 0.1))
    if "betas" in group:
        group["betas"] = rng.choice(((0.9, 0.999), (0.5, 0.9)))
    if group.get("momentum"):
        group["momentum"] = rng.choice((0.5, 0.95))
    if "maximize" in group:
        group["maximize"] = rng.random() < 0.3


def schedule(world: World, rng: random.Random) -> list[float]:
    if not world.schedulers or rng.random() < 0.2:
        made = rng.choice(
            (
                lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
                lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
                lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
            )
        )
        world.schedulers = [made(world.optimizer)]
    step(world, rng)
    for scheduler in world.schedulers:
        scheduler.step()
    return [float(group["lr"]) for group in world.optimizer.param_groups]


def freeze(world: World, rng: random.Random) -> None:
    parameter = rng.choice(world.params)
    parameter.requires_grad_(not parameter.requires_grad)
    if not parameter.requires_grad:
        parameter.grad = None


# --- parameters -------------------------------------------------------------------------------------------


def write_parameters(world: World, rng: random.Random) -> None:
    way = rng.randrange(5)
    for parameter in world.params:
        values = world.tensor(rng, parameter.shape)
        if way == 0:
            with torch.no_grad():
                parameter.copy_(values)
        elif way == 1:
            parameter.data.copy_(values)
        elif way == 2:
            parameter.data = values
        elif way == 3:
            parameter.data.clamp_(-0.5, 0.5)
        else:
            with torch.no_grad():
                parameter[...] *= 0.5


def swap_an_average(world: World, rng: random.Random) -> None:
    kept = [parameter.data.clone() for parameter in world.params]
    for parameter in world.params:
        parameter.data.copy_(torch.zeros_like(parameter))
    for parameter, values in zip(world.params, kept, strict=True):
        parameter.data.copy_(values)


def write_one_element(world: World, rng: random.Random) -> None:
    """Samples may miss it, so the drop-in is told."""
    parameter = rng.choice(world.params)
    parameter.data.view(-1)[rng.randrange(parameter.numel())] = 0.75
    world.on_the_server(lambda optimizer: optimizer.upload_parameters())


def cast_and_back(world: World, rng: random.Random) -> None:
    """Lose bits and go on in float32; torch's own moments cannot follow a model of another dtype through a step.

    Both sides lose the bits of the same values: values that differ in the last bit may be rounded apart.
    """
    dtype = rng.choice((torch.bfloat16, torch.float16))
    for parameter in world.params:
        parameter.grad = None
        parameter.data = world.tensor(rng, parameter.shape).to(dtype)
    if rng.random() < 0.5 and not _leftovers(world):
        world.optimizer.state_dict()
    for parameter in world.params:
        parameter.data = parameter.data.float()


# --- groups -----------------------------------------------------------------------------------------------


def _place(world: World, rng: random.Random) -> tuple[dict[str, Any], int] | None:
    """Choose a parameter of a group."""
    places = [(group, place) for group in world.optimizer.param_groups for place, _ in enumerate(group["params"])]
    return rng.choice(places) if places else None


def replace_parameter(world: World, rng: random.Random) -> None:
    if (found := _place(world, rng)) is None:
        return
    group, place = found
    old, keeps = group["params"][place], rng.random() < 0.5
    new = Parameter(old.detach() * 0.5)
    if keeps and old in world.optimizer.state:
        moved = world.optimizer.state[new] = world.optimizer.state.pop(old)
        # A tensor that is put into the state is copied with the next step, and is no part of it after.
        world.held = [held for held in world.held if not any(held is each for each in moved.values())]
    group["params"][place] = new
    world.params = [new if parameter is old else parameter for parameter in world.params]


def prune_parameter(world: World, rng: random.Random) -> None:
    """Keep some rows of a parameter and of each of its slots."""
    if (found := _place(world, rng)) is None or found[0]["params"][found[1]].dim() == 0:
        return
    group, place = found
    old = group["params"][place]
    kept = torch.arange(len(old)) != rng.randrange(len(old)) if len(old) > 1 else torch.ones(1, dtype=torch.bool)
    new = Parameter(old.detach()[kept].clone())
    stored = world.optimizer.state.get(old)
    if stored is not None:
        for key, value in list(stored.items()):
            if torch.is_tensor(value) and value.shape == old.shape:
                stored[key] = value[kept]
        del world.optimizer.state[old]
        world.optimizer.state[new] = stored
    group["params"][place] = new
    world.params = [new if parameter is old else parameter for parameter in world.params]


def remove_parameter(world: World, rng: random.Random) -> None:
    if (found := _place(world, rng)) is None or len(world.stepped()) < 2:
        return
    group, place = found
    removed = group["params"].pop(place)
    if rng.random() < 0.5:
        world.optimizer.state.pop(removed, None)


def put_back(world: World, rng: random.Random) -> None:
    """Add parameters of the model that no group has."""
    present = {id(parameter) for parameter in world.stepped()}
    group = rng.choice(world.optimizer.param_groups)
    group["params"].extend(parameter for parameter in world.params if id(parameter) not in present)


def append_parameter(world: World, rng: random.Random) -> None:
    world.params.append(world.parameter(rng, (rng.randint(1, 6), 3)))
    rng.choice(world.optimizer.param_groups)["params"].append(world.params[-1])


def add_group(world: World, rng: random.Random) -> None:
    world.params.append(world.parameter(rng, (rng.randint(1, 6),)))
    world.optimizer.add_param_group({"params": [world.params[-1]], "lr": 0.02})


def shuffle_group(world: World, rng: random.Random) -> None:
    rng.shuffle(rng.choice(world.optimizer.param_groups)["params"])


# --- state ------------------------------------------------------------------------------------------------


def _entry(world: World, rng: random.Random) -> Any:
    present = [parameter for parameter in world.stepped() if parameter in world.optimizer.state]
    return rng.choice(present) if present else None


def reset_state(world: World, rng: random.Random) -> None:
    way = rng.randrange(3)
    if way == 0:
        world.optimizer.state.clear()
    elif way == 1:
        world.optimizer.state = collections.defaultdict(dict)
    else:
        world.optimizer.__setstate__({"state": collections.defaultdict(dict)})


def drop_state(world: World, rng: random.Random) -> None:
    if (parameter := _entry(world, rng)) is not None:
        del world.optimizer.state[parameter]


def write_state(world: World, rng: random.Random) -> None:
    if (parameter := _entry(world, rng)) is None:
        return
    entry, way = world.optimizer.state[parameter], rng.randrange(4)
    for key, value in list(entry.items()):
        if not torch.is_tensor(value) or value.shape != parameter.shape or key == "step":
            continue
        if way == 0:
            value.zero_()
        elif way == 1:
            entry[key] = value * 0.5
        elif way == 2:
            value.view(-1)[0].mul_(0.25)
        else:
            value.data.mul_(0.75)


def count_on(world: World, rng: random.Random) -> None:
    if (parameter := _entry(world, rng)) is not None and "step" in world.optimizer.state[parameter]:
        world.optimizer.state[parameter]["step"] += 2


def hold_state(world: World, rng: random.Random) -> None:
    """Keep tensors of the state in variables; those that a script has put there are no part of it after a step."""
    if world.remote is not None:
        _follow(world)
    if (parameter := _entry(world, rng)) is not None:
        entry = world.optimizer.state[parameter].items()
        world.held += [value for key, value in entry if torch.is_tensor(value) and key != "step"]


def write_held(world: World, rng: random.Random) -> list[torch.Tensor]:
    for value in world.held:
        value.mul_(0.5)
    return [value.clone() for value in world.held]


def keep_values_in_state(world: World, rng: random.Random) -> float:
    """Keep values of a wrapper beside the slots."""
    for parameter in world.stepped():
        entry = world.optimizer.state[parameter]
        if entry:
            entry["calls"] = entry.get("calls", 0) + 1
    return float(sum(entry.get("calls", 0) for entry in world.optimizer.state.values()))


# --- checkpoints --------------------------------------------------------------------------------------------


def _written(state: Any) -> Any:
    """Return a state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save(world: World, rng: random.Random) -> None:
    if _leftovers(world):
        return
    values = [parameter.detach().clone() for parameter in world.params]
    world.saved = [id(p) for p in world.stepped()], list(world.params), values, _written(world.optimizer.state_dict())


def load(world: World, rng: random.Random) -> None:
    """Go back to the last checkpoint, if the groups are those of then."""
    if world.saved is None or world.saved[0] != [id(parameter) for parameter in world.stepped()]:
        return
    if [len(group["params"]) for group in world.optimizer.param_groups] != [
        len(group["params"]) for group in world.saved[3]["param_groups"]
    ]:
        return
    lost = rng.random() < 0.3
    if lost and world.remote is not None:
        _lose(world)
    for parameter, values in zip(world.saved[1], world.saved[2], strict=True):
        with torch.no_grad():
            parameter.copy_(values)
    world.optimizer.load_state_dict(copy.deepcopy(world.saved[3]))
    world.held = []


def save_and_load(world: World, rng: random.Random) -> None:
    if not _leftovers(world):
        world.optimizer.load_state_dict(_written(world.optimizer.state_dict()))
        world.held = []


def make_anew(world: World, rng: random.Random) -> None:
    """Make another optimizer of the same groups, and load the state of the present one."""
    if _leftovers(world) or world.schedulers or len(world.optimizer.param_groups) > 1:
        return
    state = _written(world.optimizer.state_dict())
    order, present = {id(p): place for place, p in enumerate(world.stepped())}, world.params
    world.close()
    world.params = sorted((p for p in present if id(p) in order), key=lambda p: order[id(p)])
    world.optimizer = world.made()
    world.params = present
    world.optimizer.load_state_dict(state)
    world.held, world.saved = [], None


def resume(world: World, rng: random.Random) -> None:
    """Leave the session, and go on with it in another optimizer; torch's own goes on as it is."""
    optimizer, world.held = world.optimizer, []
    if world.remote is None or _leftovers(world) or world.schedulers or len(optimizer.param_groups) > 1:
        return
    _follow(world)
    stays = any(not entry or set(entry) - optimizer.rule.keys for entry in optimizer.state.values())
    if stays or not world.stepped():  # what a session does not have stays with its optimizer
        return
    session, groups, present = optimizer.session_id, optimizer.param_groups, world.params
    optimizer.detach()
    world.params = list(groups[0]["params"])
    world.optimizer = world.made(session=session)
    world.params = present
    world.optimizer.param_groups[0].update({k: v for k, v in groups[0].items() if k != "params"})


def _leftovers(world: World) -> bool:
    """Tell whether the state has parameters of no group, which torch's own `state_dict` cannot save."""
    present = {id(parameter) for parameter in world.stepped()}
    return any(torch.is_tensor(key) and id(key) not in present for key in world.optimizer.state)


def _follow(world: World) -> None:
    """Have the drop-in send what was written, and move to the session of the present groups."""
    world.optimizer.handle()


def _lose(world: World) -> None:
    with contextlib.suppress(SessionNotFoundError):
        world.optimizer.backing._client.session(world.optimizer.session_id).close()


# --- failures ---------------------------------------------------------------------------------------------


def interrupted_step(world: World, rng: random.Random) -> None:
    """A step whose reply is lost, and which is repeated; torch's own takes it once."""
    world.optimizer.zero_grad()
    world.backward(rng)
    applied = rng.random() < 0.5
    if world.remote is None:
        world.optimizer.step()
        return
    _follow(world)  # a session that is left has another hold
    hold = world.optimizer.session._link.shards[0].hold
    try:
        # A step that the backward pass has begun is under way already, and arrives.
        with lost_replies(applied=applied, of=lambda other: other is hold):
            world.optimizer.step()
    except DeadlineExceededError:
        world.optimizer.step()


NEEDS_NEW_STATE: frozenset[Action] = frozenset(
    {replace_parameter, prune_parameter, put_back, append_parameter, add_group, reset_state, drop_state}
)
"""The actions after which a parameter has no state: torch's Adagrad makes state in its constructor alone, and fails."""

ACTIONS: list[tuple[int, Action]] = [
    (8, step),
    *((1, each) for each in (accumulate, step_with_closure, clip, scale, change_gradients, interrupted_step)),
    *((2, each) for each in (change_numbers, schedule)),
    *((1, each) for each in (freeze, swap_an_average, write_one_element, cast_and_back)),
    (2, write_parameters),
    *((1, each) for each in (replace_parameter, prune_parameter, remove_parameter, put_back, append_parameter)),
    *((1, each) for each in (add_group, shuffle_group)),
    *((1, each) for each in (reset_state, drop_state, count_on, hold_state, write_held, keep_values_in_state)),
    (2, write_state),
    *((1, each) for each in (save, load, save_and_load, make_anew, resume)),
]
"""The actions, each with its weight."""
