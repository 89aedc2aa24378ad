"""The device that a session lives on, and the budget of each."""

from __future__ import annotations

import pytest

from stepwire.errors import UnsupportedFeatureError
from stepwire_server.devices.pool import Device, DevicePool, default_budget
from stepwire_server.engines import DeviceInfo
from stepwire_server.rules import Precision
from tests.server.pretended_engine import PretendedEngine


def make_devices(*names: str, budget_bytes: int = 100) -> DevicePool:
    return DevicePool.of([PretendedEngine(name) for name in names], budget_bytes)


def test_devices_are_in_the_order_asked_for_and_found_by_name() -> None:
    pool = make_devices("cuda:2", "cuda:0")
    assert [device.name for device in pool] == ["cuda:2", "cuda:0"]
    for device in pool:
        assert pool.named(device.name) is device is pool.choose(device.name)


@pytest.mark.parametrize("name", ["", "cpu", "cuda", "cuda:1", "CUDA:0", "cuda:0\n"])
def test_an_unknown_name_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(UnsupportedFeatureError) as refused:
        make_devices("cuda:0", "cuda:2").named(name)
    assert str(refused.value) == (
        f"config.device asks for {name!r}, and this server has cuda:0, cuda:2; name one of these, or none for the one "
        "with the most free budget"
    )
    assert refused.value.metadata == {"field": "config.device", "feature": f"device_{name}"}


def test_a_long_name_is_cut() -> None:
    with pytest.raises(UnsupportedFeatureError) as refused:
        make_devices("cpu").choose("tpu:" + "9" * 1000)
    assert refused.value.metadata["feature"] == "device_tpu:" + "9" * 28
    assert len(str(refused.value)) < 200


def test_the_device_with_the_most_free_budget_is_chosen() -> None:
    pool = make_devices("cuda:0", "cuda:1", "cuda:2")
    first, second, third = pool
    assert pool.choose("") is first, "of equals, the first"
    first.budget.reserve(50, "it")
    held = second.budget.reserve(20, "it")
    assert pool.choose("") is third
    third.budget.reserve(30, "it")
    assert pool.choose("") is second
    held.release()
    second.budget.reserve(60, "it")
    assert pool.choose("") is third


def test_free_bytes_count_not_shares() -> None:
    large = PretendedEngine("cuda:1", memory_bytes=1000)
    pool = DevicePool.of([PretendedEngine("cuda:0", memory_bytes=100), large])
    pool.named("cuda:1").budget.reserve(700, "it")
    assert pool.choose("").engine is large, "100 of 800 bytes are more than all of 80"


def test_a_budget_is_the_devices_own() -> None:
    given = make_devices("cuda:0", "cuda:1", budget_bytes=70)
    assert [device.budget.limit_bytes for device in given] == [70, 70]
    assert len({id(device.budget) for device in given}) == 2
    derived = DevicePool.of([PretendedEngine("cuda:0", memory_bytes=100), PretendedEngine("cuda:1", memory_bytes=1000)])
    assert [device.budget.limit_bytes for device in derived] == [80, 800]


@pytest.mark.parametrize(("memory", "working", "budget"), [(100, 0, 80), (100, 50, 40), (100, 100, 0), (100, 200, 0)])
def test_a_default_budget_leaves_room_for_the_engine(memory: int, working: int, budget: int) -> None:
    assert default_budget(DeviceInfo("cuda:0", "GPU", memory, working)) == budget


def test_bytes_are_summed_over_devices() -> None:
    pool = make_devices("cpu", "cuda:0")
    for device, nbytes in zip(pool, (10, 20), strict=True):
        device.budget.reserve(nbytes, "it").release()
        device.budget.reserve(2 * nbytes, "it")
    assert (pool.reserved_bytes, pool.limit_bytes, pool.released_bytes) == (60, 200, 30)


def test_closing_closes_every_engine_whatever_becomes_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_devices("cuda:0", "cuda:1", "cuda:2")
    first, broken, last = (device.engine for device in pool)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(broken, "close", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        pool.close()
    assert isinstance(first, PretendedEngine) and isinstance(last, PretendedEngine)
    assert (first.closed, last.closed) == (1, 1)


def test_a_place_is_of_one_device() -> None:
    device = Device(PretendedEngine("cuda:0"), next(iter(make_devices("cpu"))).budget)
    assert device.name == "cuda:0"
    for wrong in ([], [device, device]):
        with pytest.raises(AssertionError):
            DevicePool(wrong)


def test_statistics_are_those_of_each_device_at_one_moment() -> None:
    pool = make_devices("cuda:0", "cuda:1", budget_bytes=1 << 20)
    first, second = pool
    state = first.engine.allocate({"param": Precision.FLOAT32}, 1000)
    held = first.budget.reserve(4000, "it")
    before = pool.statistics()
    held.release()
    state.close()
    assert [each.name for each in before] == ["cuda:0", "cuda:1"]
    assert [each.budget for each in before] == [(1 << 20, 4000, 0), (1 << 20, 0, 0)]
    assert [each.engine.allocated_bytes for each in before] == [4000, 0]
    assert first.statistics() == ("cuda:0", (1 << 20, 0, 4000), (0, 0, 0, 1, 0, 0), (0, 0))
    assert second.statistics() == before[1]
