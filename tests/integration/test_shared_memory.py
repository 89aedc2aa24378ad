"""Training in shared memory and in messages, side by side: the same bits, whatever breaks, and whoever dies."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.integration.link import Cut, Direction
from tests.integration.probes import steps_over, stream_ends
from tests.integration.proxy import Proxy
from tests.integration.training import SMALL, WIDE, Model, assert_same_result, bits, same_bits
from tests.support.numpy_server import numpy_pool
from tests.support.raw_handoff import held_by_process

pytestmark = pytest.mark.many

PATIENCE_SECONDS = 120.0


@pytest.fixture
def share(exits: Any) -> Callable[[str], stepwire.Client]:
    """Open real clients that use shared memory, and nothing else."""

    def opened(target: str) -> stepwire.Client:
        retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
        client = stepwire.connect(target, transport="shm", timeout=120.0, retry=retry)
        return exits.enter_context(client)

    return opened


class Twins:
    """One training twice: in shared memory, and in messages."""

    def __init__(self, model: Model, shared: stepwire.Client, plain: stepwire.Client, **options: Any) -> None:
        self.model = model
        self.shared = model.create(shared, **options)
        self.plain = model.create(plain, **options)
        self.applied = 0

    def step(self, way: str = "arrays", **options: Any) -> None:
        """Apply the next step in both, the gradient and the reply lying as `way` says."""
        self.applied += 1
        gradient = self.model.gradient(self.applied)
        given: Any = gradient
        if way != "arrays":
            given = self.shared.shared_gradients()
            for name, values in gradient.items():
                given[name][...] = values
        out = self.shared.shared_parameters() if way == "in place" else None
        answer, expected = self.shared.step(given, out=out, **options), self.plain.step(gradient, **options)
        assert bits(answer) == bits(expected)
        assert_same_result(self.shared.last_result, self.plain.last_result)
        if self.shared.transport is not None and self.shared.transport.name == "shm":
            shown: Any = self.shared.shared_parameters()
            assert bits(shown) == bits(self.plain.pull(dtype=shown["w"].dtype))

    def compare(self) -> None:
        assert same_bits(self.shared.state(), self.plain.state())


OPTIONS = {
    "adam": {},
    "bfloat16": {"reply_dtype": "bfloat16", "gradient_dtype": "bfloat16"},
    "float16": {"reply_dtype": "float16", "gradient_dtype": "float16"},
    "clipped": {"clip_grad_norm": 0.5, "non_finite": "skip"},
    "accumulating": {"accumulation_steps": 3, "optimizer": stepwire.SGD(lr=0.1, momentum=0.9)},
    "averaging": {"parameter_average_decay": 0.9, "optimizer": stepwire.Lion(lr=1e-3)},
    "layerwise": {"optimizer": stepwire.LAMB(lr=1e-2)},
    "int8 moments": {"state_precision": "int8"},
    "bfloat16 moments": {"state_precision": "bfloat16", "optimizer": stepwire.RMSprop(lr=1e-3)},
    "int8 gradients": {"gradient_dtype": "int8", "error_feedback": True},
}


COMPILED = {"adam", "clipped", "layerwise"}
"""The options that are tried with compiled kernels; the others, which need kernels of their own, with NumPy."""


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> DevicePool | None:
    return numpy_pool() if getattr(request, "param", "") == "numpy" else None


@pytest.mark.parametrize(
    ("pool", "options"),
    [("compiled" if name in COMPILED else "numpy", options) for name, options in OPTIONS.items()],
    ids=OPTIONS,
    indirect=["pool"],
)
def test_fifty_steps_have_the_same_bits(server: Server, share: Any, client: Any, options: dict[str, Any]) -> None:
    twins = Twins(SMALL, share(server.target), client, **options)
    ways = ["arrays"] if options.get("gradient_dtype") == "int8" else ["arrays", "views", "in place"]
    for step in range(50):
        twins.step(ways[step % len(ways)])
    assert str(twins.shared.transport).startswith("transport shm")
    twins.compare()


def test_a_wide_model_of_two_groups_has_the_same_bits(server: Server, share: Any, client: Any) -> None:
    twins = Twins(WIDE, share(server.target), client)
    for way in ("arrays", "views", "in place") * 2:
        twins.step(way)
    twins.compare()


@pytest.mark.parametrize(
    "options",
    [
        {"reply_dtype": "bfloat16"},
        {"gradient_dtype": "bfloat16"},
        {"overlap": True},
        {"reply": "changed", "reply_dtype": "bfloat16"},
        {"lr": 0.25},
        {"hyperparameters": {"lr": 0.5, "beta1": 0.5}},
        {"reply_first": ["b"]},
    ],
    ids=str,
)
def test_steps_of_other_kinds_are_taken_between_those_in_memory(
    server: Server, share: Any, client: Any, options: dict[str, Any]
) -> None:
    twins = Twins(SMALL, share(server.target), client, non_finite="allow")
    for _ in range(4):
        twins.step("views")
        twins.step(**options)
        twins.step("in place")
    twins.compare()


def test_a_session_without_answers_and_with_tensors_left_out(server: Server, share: Any, client: Any) -> None:
    twins = Twins(SMALL, share(server.target), client, missing_gradient="keep", frozen=["scale"])
    twins.step()
    views = twins.shared.shared_gradients()
    for step in range(5):
        gradient = SMALL.gradient(step)
        del gradient["scale" if step % 2 else "b"]
        for name, values in gradient.items():
            views[name][...] = values
        given = {name: views[name] for name in gradient}
        assert twins.shared.step(given, reply="none") == twins.plain.step(gradient, reply="none") == {}
        assert bits(twins.shared.shared_parameters()) == bits(twins.plain.pull())
    twins.compare()


def test_tensors_arrive_all_at_once_in_the_order_that_was_asked_for(server: Server, share: Any) -> None:
    session = SMALL.create(share(server.target))
    for out in (None, session.shared_parameters()):
        seen: list[tuple[str, bytes]] = []
        answer = session.step(
            SMALL.gradient(1),
            out=out,
            reply_first=["scale", "b"],
            on_tensor=lambda name, values, seen=seen: seen.append((name, values.tobytes())),
        )
        assert seen == [(name, answer[name].tobytes()) for name in ("scale", "b", "w")]


def test_views_are_the_users_kind_of_container(server: Server, share: Any) -> None:
    session = share(server.target).create_session([np.ones(3, np.float32), np.zeros((2, 2), np.float32)])
    gradients, parameters = session.shared_gradients(), session.shared_parameters()
    assert [array.shape for array in gradients] == [(3,), (2, 2)]
    assert not any(array.any() for array in gradients)
    assert [array.tolist() for array in parameters] == [[1.0] * 3, [[0.0] * 2] * 2]
    with pytest.raises(ValueError, match="read-only"):
        parameters[0][0] = 2.0
    gradients[0][:] = 1.0
    answer = session.step(gradients, out=parameters)
    assert [np.shares_memory(one, other) for one, other in zip(answer, parameters, strict=True)] == [True, True]
    assert isinstance(answer, list)


def test_views_in_the_place_of_other_tensors_are_moved_and_not_mixed_up(
    server: Server, share: Any, client: Any
) -> None:
    start = {name: np.zeros(4, np.float32) for name in "abc"}
    shared, plain = share(server.target).create_session(start), client.create_session(start)
    views = shared.shared_gradients()
    values = {name: np.arange(4, dtype=np.float32) + index for index, name in enumerate("abc")}
    for name in "abc":
        views[name][:] = values[name]
    given = {"a": views["b"], "b": views["a"], "c": views["c"][::-1]}
    expected = plain.step({"a": values["b"], "b": values["a"], "c": values["c"][::-1]})
    assert bits(shared.step(given)) == bits(expected)


def test_a_session_in_messages_says_why_it_shares_nothing(client: stepwire.Client) -> None:
    session = SMALL.create(client)
    for ask in (session.shared_gradients, session.shared_parameters):
        with pytest.raises(stepwire.UnsupportedFeatureError, match="transport 'tcp' was asked for"):
            ask()


def test_int8_gradients_have_no_views(server: Server, share: Any) -> None:
    session = SMALL.create(share(server.target), gradient_dtype="int8")
    with pytest.raises(stepwire.UnsupportedFeatureError, match="lie in shared memory as codes"):
        session.shared_gradients()


def test_a_load_and_a_whole_state_show_in_memory(server: Server, share: Any, client: Any) -> None:
    twins = Twins(SMALL, share(server.target), client)
    twins.step("views")
    for session in (twins.shared, twins.plain):
        session.load(SMALL.gradient(77))
    assert bits(twins.shared.shared_parameters()) == bits(SMALL.gradient(77))
    twins.step("in place")
    twins.shared.load_state(twins.plain.state())
    twins.step("arrays")
    twins.compare()


# --- connections that break --------------------------------------------------------------------------------

# Over TCP the client would find the server's own Unix socket, and go around the proxy.
through_the_proxy = pytest.mark.parametrize("proxy", ["uds"], indirect=True)


@through_the_proxy
@pytest.mark.parametrize("model", [SMALL, WIDE], ids=lambda model: model.name)
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("way", ["arrays", "old views"])
def test_a_cut_anywhere_in_a_step(
    server: Server, proxy: Proxy, share: Any, client: Any, model: Model, direction: Direction, way: str
) -> None:
    """The views are those of the memory before: what the user wrote there is what is applied."""
    twins = Twins(model, share(proxy.target), client)
    twins.shared.attach()
    for after in range(40):
        twins.step("in place")
        gradient = model.gradient(1000 + after)
        views = twins.shared.shared_gradients()
        for name, values in gradient.items():
            views[name][...] = values
        out = twins.shared.shared_parameters() if way == "old views" else None
        cuts = proxy.cuts
        proxy.arm(Cut(direction, "frame", after))
        answer = twins.shared.step(views if way == "old views" else gradient, out=out)
        proxy.disarm()
        assert bits(answer) == bits(twins.plain.step(gradient))
        twins.applied += 1
        if proxy.cuts == cuts:
            break
    assert after >= 2
    twins.compare()


@through_the_proxy
def test_a_step_whose_answer_is_lost_is_answered_in_the_new_memory(
    server: Server, proxy: Proxy, share: Any, client: Any
) -> None:
    twins = Twins(WIDE, share(proxy.target), client)
    twins.step("views")
    views, out = twins.shared.shared_gradients(), twins.shared.shared_parameters()
    for name, values in WIDE.gradient(2).items():
        views[name][...] = values
    proxy.arm(Cut("down", "frame", 0))
    answer = twins.shared.step(views, out=out)
    proxy.disarm()
    assert bits(answer) == bits(twins.plain.step(WIDE.gradient(2)))
    assert not np.shares_memory(answer["w"], out["w"])  # of a memory that is gone; the answer lies in the new
    assert bits(twins.shared.shared_parameters()) == bits(answer)
    twins.applied = 2
    twins.step("in place")
    twins.compare()


# --- processes that die ------------------------------------------------------------------------------------

_VICTIM = """
import sys
import numpy as np
import stepwire
client = stepwire.connect(sys.argv[1], transport=sys.argv[3], timeout=60.0)
session = client.session(sys.argv[2])
session.attach(take_over=True)
gradients = session.shared_gradients()
session.step({name: np.ones(view.shape, np.float32) for name, view in gradients.items()})
print(session.applied_step, flush=True)
while True:
    for view in gradients.values():
        view += 1.0
"""


def victim(target: str, session_id: str, transport: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _VICTIM, target, session_id, transport]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_a_client_killed_while_it_writes_leaves_the_session_to_the_next(
    server: Server, share: Any, client: Any
) -> None:
    twins = Twins(SMALL, share(server.target), client)
    ends, plain_steps = stream_ends(server.registry), steps_over(server.registry.get(twins.plain.session_id))
    twins.step("views")
    twins.shared.detach()
    ends.wait()
    plain_steps.wait()  # the gradient's memory is given back after the answer has left
    ones = {name: np.ones(shape, np.float32) for name, shape in SMALL.shapes.items()}
    held, mappings = server.registry.statistics(), held_by_process()
    for round_ in range(5):
        with victim(server.target, twins.shared.session_id, ("shm", "packets")[round_ % 2]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{2 * round_ + 2}\n"
            process.kill()
        ends.wait()
        assert server.registry.statistics() == held
        assert held_by_process()[1] == mappings[1]
        assert server.handoff.statistics()[:1] == (0,)
        twins.plain.step(ones)
        twins.shared.attach(take_over=True)
        ends.wait()  # of the stream that its own token was refused on
        twins.applied = 2 * round_ + 2
        twins.step("arrays")
        twins.shared.detach()
        ends.wait()
        plain_steps.wait(2)
    twins.compare()
    assert held_by_process() <= (mappings[0] + 4, mappings[1])


def test_nothing_is_left_on_the_disk(server: Server, share: Any) -> None:
    folder = pathlib.Path(server.handoff.path).parent
    SMALL.create(share(server.target)).step(SMALL.gradient(1))
    assert os.listdir(folder) == ["handoff.sock"]
    server.close()
    assert not folder.exists()


def test_answers_in_bfloat16_are_those_of_the_masters(server: Server, share: Any) -> None:
    session = SMALL.create(share(server.target), reply_dtype="bfloat16")
    answer = session.step(SMALL.gradient(1))
    masters = session.pull()
    for name, values in masters.items():
        assert answer[name].tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()


def test_a_lease_runs_from_the_end_of_the_stream_that_shared(
    server: Server, share: Any, exits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its client lives, a session does not expire, however silent it is; its memory goes with it."""
    session = SMALL.create(share(server.target), lease_seconds=100.0)
    ends, before = stream_ends(server.registry), server.registry.statistics().reserved_bytes
    views = session.shared_gradients()
    real, passed = server.registry.clock, [0.0]
    last_use = next(iter(server.registry._sessions.values())).last_use
    for owner, name in ((server.registry, "clock"), (last_use, "_clock")):
        monkeypatch.setattr(owner, name, lambda: real() + passed[0])
    passed[0] = 1000.0
    assert server.registry.sweep() == []
    session.detach()
    ends.wait()
    assert server.registry.statistics().reserved_bytes == before
    passed[0] = 1099.0
    assert server.registry.sweep() == []
    passed[0] = 1101.0
    assert server.registry.sweep() == [session.session_id]
    assert server.registry.statistics().reserved_bytes == 0
    views["w"][...] = 1.0  # memory of nobody, and no fault
