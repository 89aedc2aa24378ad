"""All sessions: found, listed, counted, ended and swept, on a clock of the test's own."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from stepwire import errors
from stepwire.errors import Reason
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Adam
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire_server.devices.pool import DevicePool
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.session_statistics import RegistryStatistics
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import RegistryLimits, TenantLimits
from stepwire_server.sessions.tenants import qualified
from tests.server.configs import make_config
from tests.server.pretended_engine import PretendedEngine

BYTES = 3 * 4 * 10


NO_LIMITS = TenantLimits()


def config(lease_seconds: float = 60.0, label: str = "", device: str = "") -> SessionConfig:
    return make_config(TensorSpec("w", (10,)), lease_seconds=lease_seconds, label=label, device=device)


@pytest.fixture
def make_registry(clock: Any) -> Callable[..., Registry]:
    def make(
        *devices: str,
        max_sessions: int = 10,
        max_streams: int = 3,
        budget_bytes: int = 10_000,
        tenant: TenantLimits = NO_LIMITS,
    ) -> Registry:
        pool = DevicePool.of([PretendedEngine(name) for name in devices or ("cpu",)], budget_bytes)
        return Registry(pool, RegistryLimits(max_sessions, max_streams, 5.0, tenant), clock)

    return make


def test_a_created_session_is_found_and_its_creator_holds_the_worker(make_registry: Any) -> None:
    registry = make_registry()
    session, token, replayed = registry.create("r", config())
    assert registry.get(session.session_id) is session
    assert replayed is False
    holder = session.ledger.worker.holder
    assert (token, holder.generation, session.ledger.epoch) == (holder.token, 1, 1)
    assert registry.statistics() == RegistryStatistics(1, 0, BYTES, 10_000)


def test_the_same_request_returns_the_same_session(make_registry: Any) -> None:
    registry = make_registry()
    first, second = registry.create("r", config()), registry.create("r", config())
    assert second == (first.session, first.token, True)
    first.session.acquire()
    assert registry.create("r", config()).token == first.token, "a client that acquired the worker since keeps it"
    assert registry.statistics().sessions == 1


def test_the_same_request_with_another_config_is_refused(make_registry: Any) -> None:
    registry = make_registry()
    registry.create("r", config())
    with pytest.raises(errors.InvalidRequestError, match="'r' created another session before") as refused:
        registry.create("r", config(label="other"))
    assert refused.value.metadata == {"field": "request_id"}
    assert registry.create("s", config(label="other")).session.config.label == "other"


@pytest.mark.parametrize("how", ["delete", "expire", "expire and sweep"])
def test_a_request_whose_session_has_ended_creates_a_new_one(make_registry: Any, clock: Any, how: str) -> None:
    registry = make_registry()
    first = registry.create("r", config()).session
    if how == "delete":
        registry.delete(first.session_id)
    else:
        clock.now += 61.0
    if how == "expire and sweep":
        registry.sweep()
    second = registry.create("r", config()).session
    assert second.session_id != first.session_id
    registry.sweep()
    assert registry.create("r", config()).session is second
    assert registry.statistics() == RegistryStatistics(1, 0, BYTES, 10_000)


def test_one_request_from_many_threads_creates_one_session(make_registry: Any) -> None:
    registry, made, start = make_registry(), [], threading.Barrier(8)

    def create() -> None:
        start.wait()
        made.append(registry.create("r", config()).session)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(map(id, made))) == 1
    assert registry.statistics().reserved_bytes == BYTES


def test_nobody_waits_for_another_tenants_creation(make_registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds, and the first values of a large table as well; the session counts from its beginning."""
    registry, asked, compiled = make_registry(max_sessions=2), threading.Event(), threading.Event()
    prepare, compiling, made = PretendedEngine.prepare, [], []

    def prepare_slowly(*arguments: Any) -> None:
        if threading.current_thread() in compiling:
            asked.set()
            compiled.wait()
        prepare(*arguments)

    monkeypatch.setattr(PretendedEngine, "prepare", prepare_slowly)
    slow = qualified("slow", "r")
    compiling.append(threading.Thread(target=lambda: made.append(registry.create(slow, config()))))
    compiling[0].start()
    asked.wait()
    assert registry.created(slow) is None
    quick = registry.create(qualified("quick", "r"), config())
    with pytest.raises(errors.ResourceExhaustedError, match="2 sessions, its most"):
        registry.create(qualified("other", "r"), config())
    compiled.set()
    compiling[0].join()
    assert registry.create(slow, config()) == made[0]._replace(replayed=True)
    assert registry.create(qualified("quick", "r"), config()).session is quick.session
    assert registry.statistics().sessions == 2


def test_a_creation_that_fails_leaves_its_place(make_registry: Any) -> None:
    registry = make_registry(max_sessions=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretendedEngine, "allocate", None)
        with pytest.raises(TypeError):
            registry.create("r", config())
    assert registry.create("r", config()).replayed is False


def reserved(registry: Registry) -> list[int]:
    return [device.budget.reserved_bytes for device in registry.pool]


def test_sessions_that_name_no_device_spread_over_all(make_registry: Any) -> None:
    registry = make_registry("cuda:0", "cuda:1")
    made = [registry.create(str(index), config()).session.device for index in range(4)]
    assert made == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert reserved(registry) == [2 * BYTES, 2 * BYTES]
    assert registry.statistics() == RegistryStatistics(4, 0, 4 * BYTES, 20_000)


def test_a_session_lives_where_it_names(make_registry: Any) -> None:
    registry = make_registry("cuda:0", "cuda:1")
    made = [registry.create(str(index), config(device="cuda:1")).session.device for index in range(3)]
    assert made == ["cuda:1"] * 3
    assert registry.create("any", config()).session.device == "cuda:0"


def test_a_device_that_is_not_there_creates_nothing(make_registry: Any) -> None:
    registry = make_registry("cuda:0", "cuda:1")
    with pytest.raises(errors.UnsupportedFeatureError, match="asks for 'cpu', and this server has cuda:0, cuda:1;"):
        registry.create("r", config(device="cpu"))
    assert registry.statistics() == RegistryStatistics(0, 0, 0, 20_000)
    assert registry.create("r", config()).replayed is False


def test_a_device_that_is_full_leaves_the_others_as_they_are(make_registry: Any) -> None:
    registry = make_registry("cuda:0", "cuda:1", budget_bytes=2 * BYTES)
    for index in range(2):
        registry.create(f"full {index}", config(device="cuda:0"))
    with pytest.raises(errors.ResourceExhaustedError) as refused:
        registry.create("named", config(device="cuda:0"))
    assert refused.value.reason is Reason.MEMORY_EXHAUSTED
    assert [registry.create(f"any {index}", config()).session.device for index in range(2)] == ["cuda:1"] * 2
    with pytest.raises(errors.ResourceExhaustedError):
        registry.create("any", config())
    assert reserved(registry) == [2 * BYTES, 2 * BYTES]


@pytest.mark.parametrize("how", ["delete", "sweep", "close"])
def test_an_ended_session_gives_its_memory_back_to_its_own_device(make_registry: Any, clock: Any, how: str) -> None:
    registry = make_registry("cuda:0", "cuda:1")
    registry.create("here", config(lease_seconds=1e6, device="cuda:0"))
    there = registry.create("there", config(device="cuda:1")).session
    if how == "delete":
        registry.delete(there.session_id)
    elif how == "sweep":
        clock.now += 61.0
        registry.sweep()
    else:
        registry.close()
    assert reserved(registry) == [0 if how == "close" else BYTES, 0]


def test_a_repeated_request_returns_the_session_wherever_it_is(make_registry: Any) -> None:
    registry = make_registry("cuda:0", "cuda:1")
    registry.create("first", config())
    there, token, _ = registry.create("r", config())
    assert there.device == "cuda:1"
    assert registry.create("r", config()) == (there, token, True), "though cuda:0 is the one to choose now"
    with pytest.raises(errors.InvalidRequestError, match="'r' created another session before"):
        registry.create("r", config(device="cuda:0"))


def test_too_many_sessions_are_refused(make_registry: Any) -> None:
    registry = make_registry(max_sessions=2)
    first = registry.create("a", config()).session
    registry.create("b", config())
    with pytest.raises(errors.ResourceExhaustedError, match="2 sessions, its most") as refused:
        registry.create("c", config())
    assert (refused.value.reason, refused.value.metadata) == (
        Reason.TOO_MANY_SESSIONS,
        {"max_sessions": "2", "idle_sessions": "2"},
    )
    registry.create("b", config())
    registry.delete(first.session_id)
    registry.create("c", config())


def test_a_session_that_does_not_fit_leaves_nothing(make_registry: Any) -> None:
    registry = make_registry(budget_bytes=2 * BYTES - 1)
    registry.create("a", config())
    with pytest.raises(errors.ResourceExhaustedError) as refused:
        registry.create("b", config())
    assert refused.value.reason is Reason.MEMORY_EXHAUSTED
    assert registry.statistics() == RegistryStatistics(1, 0, BYTES, 2 * BYTES - 1)


def test_a_refusal_names_the_idle_sessions_of_the_device_and_the_command_that_ends_them(
    make_registry: Any, clock: Any
) -> None:
    registry = make_registry("cuda:0", "cuda:1", budget_bytes=3 * BYTES)
    used, old, other = (
        registry.create(name, config(lease_seconds=9000.0, label=name, device=device)).session
        for name, device in (("used", "cuda:0"), ("old", "cuda:0"), ("other", "cuda:1"))
    )
    clock.now += 3600.0
    late = registry.create("late", config(label="l" * 60, device="cuda:0")).session
    clock.now += 130.0
    with registry.streams.stream(lambda: None) as stream, used.attached(stream, 0, 1):
        with pytest.raises(errors.ResourceExhaustedError) as refused:
            registry.create("more", config(device="cuda:0"))
    assert str(refused.value) == (
        f"the session's state needs {BYTES} bytes and 0 of {3 * BYTES} are free; close sessions, or start the server "
        f"with a larger --memory-budget. Idle are {old.session_id} 'old' with {BYTES} bytes, for 1h; {late.session_id} "
        f"'{'l' * 48}' with {BYTES} bytes, for 2m. `stepwire sessions close --target HOST:PORT --idle 2m` ends all "
        "that are idle for so long, and an id in the place of --idle one of them"
    )
    assert refused.value.metadata["idle_sessions"] == "2"
    assert other.session_id not in str(refused.value)


def test_a_refusal_names_five_idle_sessions_at_most_and_says_if_there_are_none(make_registry: Any) -> None:
    registry = make_registry(max_sessions=8)
    sessions = [registry.create(str(number), config(label=f"run {number}")).session for number in range(8)]
    with pytest.raises(
        errors.ResourceExhaustedError, match="'run 4' with 120 bytes, for 0s and 3 more\\. `"
    ) as refused:
        registry.create("more", config())
    assert "run 5" not in str(refused.value)
    with contextlib.ExitStack() as uses:
        for session in sessions:
            uses.enter_context(session.calls.one())
        with pytest.raises(errors.ResourceExhaustedError, match="All of its 8 sessions there are in use$"):
            registry.create("more", config())
    with pytest.raises(errors.ResourceExhaustedError, match="It holds no session there$"):
        make_registry(budget_bytes=BYTES - 1).create("r", config())


def test_a_session_that_another_client_has_acquired_outlives_the_client_that_made_it(make_registry: Any) -> None:
    registry = make_registry()
    session, token, _ = registry.create("r", config())
    taken = session.acquire().token
    with pytest.raises(errors.FencedError):
        registry.delete(session.session_id, token)
    assert registry.get(session.session_id) is session
    assert registry.delete(session.session_id, taken) == session.ledger.applied_step


def test_a_deleted_session_is_gone_with_its_memory(make_registry: Any) -> None:
    registry = make_registry()
    session = registry.create("r", config()).session
    assert registry.delete(session.session_id) == session.ledger.applied_step
    assert session.ledger.closed
    assert registry.statistics() == RegistryStatistics(0, 0, 0, 10_000)
    for call in (registry.get, registry.delete):
        with pytest.raises(errors.SessionNotFoundError):
            call(session.session_id)


def test_a_lease_runs_from_the_last_use(make_registry: Any, clock: Any) -> None:
    registry = make_registry()
    session = registry.create("r", config(lease_seconds=60.0)).session
    clock.now += 60.0
    assert registry.get(session.session_id) is session
    session.exchange.snapshot()
    clock.now += 60.0
    assert registry.sweep() == []
    clock.now += 0.1
    with pytest.raises(errors.SessionNotFoundError):
        registry.get(session.session_id)
    assert registry.sweep() == [session.session_id]
    assert registry.sweep() == []
    assert registry.statistics().reserved_bytes == 0


def test_each_session_has_a_lease_of_its_own(make_registry: Any, clock: Any) -> None:
    registry = make_registry()
    short = registry.create("short", config(lease_seconds=10.0)).session
    long = registry.create("long", config(lease_seconds=1000.0)).session
    clock.now += 11.0
    assert registry.sweep() == [short.session_id]
    assert registry.get(long.session_id) is long


def test_a_lease_does_not_run_while_a_stream_is_attached(make_registry: Any, clock: Any) -> None:
    registry = make_registry()
    session = registry.create("r", config(lease_seconds=10.0)).session
    with (
        registry.streams.stream(lambda: None) as stream,
        session.attached(stream, session.ledger.worker.holder.token, 0),
    ):
        clock.now += 1e6
        assert registry.sweep() == []
        assert registry.get(session.session_id) is session
    clock.now += 9.0
    assert registry.sweep() == []
    clock.now += 2.0
    assert registry.sweep() == [session.session_id]


def test_a_lease_does_not_run_while_a_load_is_on_its_way(make_registry: Any, clock: Any) -> None:
    """However long the upload takes, and whether it is committed or breaks off."""
    registry = make_registry()
    session = registry.create("r", config(lease_seconds=10.0)).session
    for request in (LoadRequest(1, ("param",)), LoadRequest(1, ("param", "exp_avg"))):
        with pytest.raises(ZeroDivisionError), session.exchange.loading(request, session.ledger.worker.holder):
            clock.now += 1e6
            assert registry.sweep() == []
            assert registry.get(session.session_id) is session
            raise ZeroDivisionError
        clock.now += 9.0
        assert registry.sweep() == []
    clock.now += 2.0
    assert registry.sweep() == [session.session_id]


def test_a_load_that_ends_beside_another_does_not_let_the_lease_run(make_registry: Any, clock: Any) -> None:
    registry = make_registry()
    session = registry.create("r", config(lease_seconds=10.0)).session
    holder = session.ledger.worker.holder
    with session.exchange.loading(LoadRequest(1, ("param",)), holder):
        with session.exchange.loading(LoadRequest(1, ("exp_avg",)), holder):
            assert session.statistics().loads == 2
        clock.now += 1e6
        assert (registry.sweep(), session.statistics().loads) == ([], 1)
    clock.now += 10.1
    assert registry.sweep() == [session.session_id]


def test_a_lease_runs_from_the_end_of_the_creation(make_registry: Any, clock: Any) -> None:
    """Kernels are compiled in it, which may take longer than the lease is."""
    registry = make_registry()
    (device,) = registry.pool
    prepare = device.engine.prepare

    def slow(*arguments: Any) -> None:
        clock.now += 100.0
        prepare(*arguments)

    device.engine.prepare = slow
    session = registry.create("r", config(lease_seconds=10.0)).session
    assert registry.create("r", config(lease_seconds=10.0)).replayed
    assert (session.created, session.last_use.at) == (clock.now, clock.now)
    clock.now += 10.0
    assert registry.sweep() == []
    clock.now += 0.1
    assert registry.sweep() == [session.session_id]


def test_looking_at_a_session_does_not_renew_its_lease(make_registry: Any, clock: Any) -> None:
    registry = make_registry()
    session = registry.create("r", config(lease_seconds=10.0)).session
    for _ in range(3):
        clock.now += 5.0
        registry.page("", 10)
        if clock.now <= 1010.0:
            registry.get(session.session_id)
    assert registry.sweep() == [session.session_id]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pages_hold_every_session_once_in_order(make_registry: Any, size: int) -> None:
    registry = make_registry()
    made = sorted(registry.create(str(index), config()).session.session_id for index in range(7))
    listed, after, pages = [], "", 0
    while True:
        sessions, after = registry.page(after, size)
        listed += [session.session_id for session in sessions]
        pages += 1
        if not after:
            break
        assert after == listed[-1]
    assert (listed, pages) == (made, -(-7 // size))


def test_a_page_goes_on_where_a_deleted_session_was(make_registry: Any) -> None:
    registry = make_registry()
    made = sorted(registry.create(str(index), config()).session.session_id for index in range(4))
    _, after = registry.page("", 2)
    registry.delete(after)
    sessions, last = registry.page(after, 2)
    assert ([session.session_id for session in sessions], last) == (made[2:], "")


def test_an_empty_registry_has_one_empty_page(make_registry: Any) -> None:
    assert make_registry().page("", 10) == ([], "")


def test_streams_are_counted_and_bounded(make_registry: Any) -> None:
    registry = make_registry(max_streams=2)
    with contextlib.ExitStack() as streams:
        made = [streams.enter_context(registry.streams.stream(lambda: None)) for _ in range(10)]
        assert [stream.surplus for stream in made] == [False] * 2 + [True] * 8
        for stream in made:
            stream.is_open = True
        assert registry.statistics().streams == 10
        with pytest.raises(errors.ResourceExhaustedError, match="2 attached streams") as refused:
            registry.streams.stream(lambda: None).__enter__()
        assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.TOO_MANY_STREAMS, 1.0)


def test_a_stream_beyond_the_bound_may_only_displace_its_sessions_own(make_registry: Any) -> None:
    registry = make_registry(max_streams=1)
    (session, other), cancelled = [registry.create(name, config()).session for name in ("a", "b")], list[str]()
    token = session.ledger.worker.holder.token
    with (
        registry.streams.stream(lambda: cancelled.append("half open")) as former,
        session.attached(former, token, 0),
    ):
        former.is_open = True
        with registry.streams.stream(lambda: None) as stream:
            with pytest.raises(errors.ResourceExhaustedError, match="1 attached streams, its most"):
                registry.streams.admit(stream, other.tenant, returns=0 in other.ledger.members.attached)
            for worker in (1, None):  # no stream of that worker is there
                with pytest.raises(errors.ResourceExhaustedError):
                    registry.streams.admit(stream, session.tenant, returns=worker in session.ledger.members.attached)
            registry.streams.admit(stream, session.tenant, returns=0 in session.ledger.members.attached)
            with session.attached(stream, token, 0) as holder:
                assert (holder.generation, cancelled) == (3, ["half open"])


def test_a_stream_that_fails_is_not_counted_any_more(make_registry: Any) -> None:
    registry = make_registry()
    with pytest.raises(ZeroDivisionError), registry.streams.stream(lambda: None):
        raise ZeroDivisionError
    assert registry.statistics().streams == 0


@pytest.mark.parametrize(("in_step", "expected"), [(True, ["cancelled"]), (False, [])])
def test_the_sweep_cancels_streams_that_are_silent_inside_a_step(
    make_registry: Any, clock: Any, in_step: bool, expected: list[str]
) -> None:
    registry, cancelled = make_registry(), list[str]()
    with registry.streams.stream(lambda: cancelled.append("cancelled")) as stream:
        stream.in_step = in_step
        clock.now += 5.0
        registry.sweep()
        assert cancelled == []
        clock.now += 0.1
        registry.sweep()
        assert cancelled == expected


def test_streams_are_cancelled_at_the_end_unless_they_end_by_themselves(make_registry: Any) -> None:
    registry, cancelled = make_registry(), list[int]()
    with (
        registry.streams.stream(lambda: cancelled.append(1)),
        registry.streams.stream(lambda: cancelled.append(2)) as ending,
    ):
        ending.ending = True
        registry.streams.cancel()
        assert cancelled == [1]


def test_closing_twice_ends_every_session_once(make_registry: Any) -> None:
    registry = make_registry()
    sessions = [registry.create(str(index), config()).session for index in range(3)]
    registry.close()
    registry.close()
    assert all(session.ledger.closed for session in sessions)
    assert registry.statistics() == RegistryStatistics(0, 0, 0, 10_000)


def test_configs_are_compared_whole(make_registry: Any) -> None:
    registry = make_registry()
    registry.create("r", config())
    for change in (
        {"lease_seconds": 61.0},
        {"treatment": GradientTreatment(non_finite="skip")},
        {"optimizer": Adam(amsgrad=True)},
        {"layout": place([TensorSpec("w", (2, 5))], 1)},
        {"device": "cpu"},
    ):
        with pytest.raises(errors.InvalidRequestError):
            registry.create("r", dataclasses.replace(config(), **change))


def test_calls_under_way_keep_the_lease_from_running(make_registry: Any, clock: Any) -> None:
    """Kernels may be compiled in a step, and the reader of a pull may take its time."""
    registry = make_registry()
    session = registry.create("r", config(lease_seconds=10.0)).session
    with session.calls.one(), session.calls.one():
        clock.now += 1e6
        assert registry.sweep() == []
    clock.now += 10.0
    assert registry.sweep() == []
    clock.now += 0.1
    assert registry.sweep() == [session.session_id]
