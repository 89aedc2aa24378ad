"""The benchmarks' arithmetic: medians and ratios, goals, tables; and that contests go on without who fails."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NAMES = (
    "arrow_flight",
    "bare_disk",
    "child",
    "contest",
    "convergence",
    "doorbell",
    "durability",
    "durable_server",
    "echo",
    "fairness",
    "fairness_child",
    "fairness_server",
    "flood_child",
    "floods",
    "floors",
    "flower_messages",
    "footprint",
    "goals",
    "kernels",
    "lane",
    "lane_child",
    "lane_many",
    "lane_python",
    "lane_torch",
    "local_torch",
    "machine",
    "main",
    "many",
    "moves",
    "occupancy",
    "page",
    "peers",
    "plot",
    "raw_http2",
    "ray_actor",
    "recovery",
    "report",
    "row_steps",
    "sections",
    "security",
    "shaped_link",
    "shards",
    "sockets",
    "standby",
    "tables",
    "torch_memory",
    "transports",
    "variants",
    "wire_encodings",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[types.SimpleNamespace]:
    """The benchmark's modules, which import one another by their bare names."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


# --- contests -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make contenders whose jobs take what they are told to, on a clock of their own; nothing waits."""
    now = 0.0

    def contender(name: str, *seconds: float, log: list[str] | None = None) -> Any:
        turns = iter(seconds)

        def action() -> None:
            nonlocal now
            now += next(turns)
            if log is not None:
                log.append(name)

        return bench.contest.Contender(name, lambda stack, size: action)

    monkeypatch.setattr(bench.contest.time, "perf_counter", lambda: now)
    monkeypatch.setattr(bench.contest.time, "sleep", lambda seconds: None)
    return contender


def test_contenders_take_turns_in_every_round(bench, clock) -> None:
    log: list[str] = []
    entrants = [clock("a", *[1.0] * 9, log=log), clock("b", *[1.0] * 9, log=log)]
    bench.contest.run_contest(entrants, 10, rounds=2)
    assert "".join(log) == "aabb" + "ab" * 2  # two jobs each to warm up, and then the rounds
    log.clear()
    bench.contest.run_contest([clock("a", *[1.0] * 9, log=log), clock("b", *[1.0] * 9, log=log)], 10, rounds=2, batch=2)
    assert "".join(log) == "aabb" + "aaabbb" * 2  # one of a batch is not counted


def test_a_round_is_the_median_of_its_batch_and_a_figure_that_of_its_rounds(bench, clock) -> None:
    warm, unseen = (9.0, 9.0), 9.0
    job = clock("job", *warm, unseen, 1.0, 5.0, 2.0, unseen, 7.0, 3.0, 4.0, unseen, 8.0, 8.0, 8.0)
    result = bench.contest.run_contest([job], 10, rounds=3, batch=3)
    assert result.times == {"job": [2.0, 4.0, 8.0]}
    assert result.figures() == {"parameters": 10, "rounds": 3, "job ms": 4000.0}


def test_ratios_are_taken_round_by_round(bench, clock) -> None:
    result = bench.contest.run_contest(
        [clock("step", 1, 1, 2.0, 30.0, 9.0), clock("wire", 1, 1, 1.0, 10.0, 2.0), clock("rest", 1, 1, 1.0, 20.0, 1.0)],
        10,
        rounds=3,
    )
    wanted = {"to wire": ("step", ("wire",)), "to parts": ("step", ("wire", "rest")), "to none": ("step", ("none",))}
    assert result.ratios(wanted) == {"to wire": 3.0, "to parts": 1.0}  # 2, 3, 4.5 and 1, 1, 3
    assert result.ratios({"to wire": ("none", ("wire",))}) == {}


def test_who_is_not_there_is_left_out_and_who_fails_is_told(bench, clock, capsys: pytest.CaptureFixture[str]) -> None:
    closed: list[str] = []

    def absent(stack: contextlib.ExitStack, size: int) -> Any:
        stack.callback(closed.append, f"absent {size}")
        raise bench.contest.Absent("it is not installed")

    def broken(stack: contextlib.ExitStack, size: int) -> Any:
        return lambda: [].pop()

    def tires(stack: contextlib.ExitStack, size: int) -> Any:
        return [1, 2, 3].pop

    make = bench.contest.Contender
    entrants = [make("absent", absent), make("broken", broken), make("tires", tires), clock("well", *[1.0] * 4)]
    result = bench.contest.run_contest(entrants, 10, rounds=2)
    assert result.times == {"well": [1.0, 1.0]}
    assert result.left_out == {
        "absent": "it is not installed",
        "broken": "failed: IndexError: pop from empty list",
        "tires": "failed: IndexError: pop from empty list",
    }
    assert closed == ["absent 10"]
    figures = result.figures()
    assert figures["absent left out"] == "it is not installed"
    assert bench.report.failures({"s": figures, "other": {"skipped": "no root"}}) == ["s: broken", "s: tires"]
    told = capsys.readouterr().err
    assert "broken failed:" in told and "tires failed:" in told and "absent" not in told


def test_short_jobs_are_done_often(bench) -> None:
    sizes = (1, 1_000, 10_000, 1_000_000, 32_000_000)
    assert [bench.contest.batch_of(size) for size in sizes] == [100, 100, 50, 5, 1]


# --- goals ----------------------------------------------------------------------------------------------------

RESULTS: dict[str, dict[str, Any]] = {
    "steps": {"ratio": 1.05, "speed": 3.5, "other": 2},
    "link": {"skipped": "network namespaces need root"},
    "peers": {"Ray actor left out": "ray cannot be imported here"},
}


@pytest.mark.parametrize(
    ("section", "figure", "bound", "at_least", "status"),
    [
        ("steps", "ratio", 1.05, False, "met"),
        ("steps", "ratio", 1.04, False, "missed"),
        ("steps", "speed", 3.5, True, "met"),
        ("steps", "speed", 4.0, True, "missed"),
        ("link", "ratio", 1.0, False, "not measured: network namespaces need root"),
        ("peers", "ratio", 1.0, False, "not measured: who is compared did not take part"),
        ("none", "ratio", 1.0, False, "not measured: no such section in this run"),
    ],
)
def test_a_goal_is_met_missed_or_not_measured(bench, section, figure, bound, at_least, status) -> None:
    goal = bench.goals.Goal(section, figure, bound, at_least)
    assert bench.goals.status(goal, RESULTS) == status
    (line,) = bench.goals.lines([goal], RESULTS)
    assert line.endswith(f"{'>=' if at_least else '<='} {bound:g}  {status}")
    assert line.startswith(f"  {section}: {figure}  ")


def test_every_goal_names_a_figure_that_is_measured(bench) -> None:
    """Goals speak by name; a name that nobody measures would never be missed."""
    large = {"transports 32M": bench.transports.RATIOS, "transports 1k": bench.transports.RATIOS}
    large |= dict.fromkeys(("peers 32M", "peers 1k"), bench.peers.RATIOS)
    large |= {"shaped link": bench.shaped_link.RATIOS, "lane torch": bench.lane_torch.RATIOS}
    goals = [*bench.main.GOALS, *bench.peers.GOALS]
    assert {goal.figure for goal in goals if goal.section in large} <= set().union(*large.values())
    assert all(goal.figure in large[goal.section] for goal in goals if goal.section in large)
    names = {variant.name for variant in bench.variants.VARIANTS}
    occupied = {goal.figure.rpartition(" ")[0] for goal in goals if goal.section in ("occupancy", "growth")}
    assert occupied <= names


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="it starts several servers; CI runs it")
def test_every_goal_of_a_server_among_strangers_is_measured(bench) -> None:
    sections = {
        "floods": bench.floods.floods(bench.floods.Scale(seconds=0.1, kinds=("silent_call",))),
        "many": bench.many.many(bench.many.Scale.quick()),
        "lane python": bench.lane_python.lane_python(rounds=2, batch=5),
        "security": bench.security.security(rounds=1, batch=2),
    }
    assert bench.report.failures(sections) == []
    for goal in bench.main.GOALS:
        assert goal.section not in sections or goal.figure in sections[goal.section], goal
    assert (sections["many"]["clients"], sections["many"]["errors"]) == (20, 0)
    assert {"4 KiB mTLS to plaintext", "1 MiB mTLS to plaintext"} <= sections["security"].keys()


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="it starts several servers; CI runs it")
def test_a_move_is_measured_beside_a_copy_of_the_state(bench) -> None:
    figures = bench.moves.moves(bench.moves.Scale(20_000, 2))
    assert figures["slowest step of a move ms"] > figures["ordinary step ms"] > 0.0
    copy_and_step = figures["copy of the state ms"] + figures["ordinary step ms"]
    assert figures["slowest step of a move to a copy and a step"] == pytest.approx(
        figures["slowest step of a move ms"] / copy_and_step
    )


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="it starts servers with 64 sessions; CI runs it")
def test_every_goal_of_durable_sessions_is_measured(bench, tmp_path: pathlib.Path) -> None:
    scale = bench.durability.Scale(20_000, 1, 2, 1, 1_000, 50_000, 2)
    figures = bench.durability.durability(tmp_path, scale)
    assert bench.report.failures({"durability": figures}) == []
    goals = {goal.figure for goal in bench.main.GOALS if goal.section == "durability"}
    assert goals <= figures.keys() and len(goals) == 6
    assert figures["recovery steps"] == 2 and figures["64 sessions, steps a sync"] > 1
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_of_durable_sessions_that_fails_leaves_the_others_alone(
    bench, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = {"one": lambda folder, scale: [].pop(), "two": lambda folder, scale: {"found": folder.parent.name}}
    monkeypatch.setattr(bench.durability, "_MEASUREMENTS", measurements)
    monkeypatch.setattr(bench.durability, "file_system_of", lambda folder: "tmpfs")
    figures = bench.durability.durability(tmp_path, bench.durability.Scale.quick())
    assert figures["caution"].startswith("tmpfs is memory") and figures["found"] == tmp_path.name
    assert bench.report.failures({"durability": figures}) == ["durability: one"]


def test_every_ratio_is_of_contenders_that_take_part(bench) -> None:
    echo, sockets = bench.echo.EchoTargets("t", "u"), bench.sockets.Addresses(("h", 1), "p")
    entrants = [one.name for one in bench.transports.contenders(["t", "t"], echo, sockets)]
    assert len(entrants) == len(set(entrants))
    asked = {name for one, others in bench.transports.RATIOS.values() for name in (one, *others)}
    assert asked <= set(entrants)
    beside = [one.name for one in bench.peers.peers()]
    asked = {name for one, others in bench.peers.RATIOS.values() for name in (one, *others)}
    assert asked <= {*beside, *bench.peers.OURS} and set(bench.peers.OURS) <= set(entrants)


def test_the_overhead_of_shards_is_fitted_and_predicted(bench) -> None:
    assert bench.shards.fitted({1: 1.0, 2: 2.0, 4: 4.0, 8: 9.0}) == (0.0, pytest.approx(93 / 85))
    trip, each = bench.shards.fitted({1: 3.5, 2: 4.0, 4: 5.0, 8: 7.0})
    assert (trip, each) == pytest.approx((3.0, 0.5))
    # 1e9 float32 up and down over 1.25e9 B/s are 6.4 s; 64 shards of 1 ms and a trip of 16 ms are 80 ms.
    assert bench.shards.overhead_of(0.016, 0.001) == pytest.approx(0.0125)
    modelled = bench.shards.model_of(2.0, 0.1, 0.01)
    assert [modelled(count) for count in (1, 8)] == pytest.approx([2.0, 2.07])


def test_sections_are_named_by_their_size(bench) -> None:
    names = [bench.transports.section_name("peers", size) for size in (1_000, 10_000, 32_000_000, 1_500_000, 77)]
    assert names == ["peers 1k", "peers 10k", "peers 32M", "peers 1500k", "peers 77"]


# --- runs -----------------------------------------------------------------------------------------------------


def test_a_section_that_fails_leaves_the_others_alone(bench, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "deep" / "results.json"
    monkeypatch.setattr(bench.main.footprint, "footprint", lambda rounds: {"bytes": 12.0})
    monkeypatch.setattr(bench.main.kernels, "kernels", lambda sizes: [].pop())
    monkeypatch.setattr(bench.main.kernels, "many_small", lambda rounds: {"left": 1.0})
    run = bench.main.Run(quick=True, only=["footprint", "kern"], path=path)
    run.everything()
    assert run.results == {
        "footprint": {"bytes": 12.0},
        "kernels": {"skipped": "failed: IndexError: pop from empty list"},
    }
    assert bench.report.failures(run.results) == ["kernels: skipped"]
    kept = bench.page.json.loads(path.read_text())
    assert kept.pop("machine")["cores"] and kept == run.results
    assert "IndexError" in capsys.readouterr().err
    told = bench.report.text(run.results, bench.main.GOALS[:1])
    assert "  bytes  12.000" in told and told.endswith("not measured: no such section in this run")


# --- the page -------------------------------------------------------------------------------------------------


def test_a_table_stands_between_its_markers(bench) -> None:
    page = "before\n<!-- bench:a -->\nold\nlines\n<!-- /bench:a -->\nafter <!-- bench:b -->\n<!-- /bench:b -->\n"
    once = bench.page.filled(page, "a", r"| new \1 |")
    assert once == page.replace("old\nlines", r"| new \1 |")
    assert bench.page.filled(once, "a", r"| new \1 |") == once
    with pytest.raises(LookupError, match="no markers for 'c'"):
        bench.page.filled(page, "c", "")


def test_a_contest_becomes_two_tables(bench) -> None:
    results = {
        "transports 10k": {
            "parameters": 10_000,
            "rounds": 9,
            "tcp ms": 0.5,
            "uds left out": "failed: X: y",
            "uds to tcp": 0.75,
        },
        "transports 32M": {"parameters": 32_000_000, "rounds": 9, "tcp ms": 1234.5, "raw TCP ms": 100.0},
    }
    assert bench.tables.TABLES["times"](results).splitlines() == [
        "| median in ms | 10k parameters | 32M parameters |",
        "| --- | --- | --- |",
        "| tcp | 0.5 | 1,234 |",
        "| raw TCP | – | 100 |",
        "",
        "uds: not measured: failed: X: y",
    ]
    assert bench.tables.TABLES["ratios"](results).splitlines() == [
        "| ratio | 10k parameters | 32M parameters |",
        "| --- | --- | --- |",
        "| uds to tcp | 0.75 | – |",
    ]
    assert bench.tables.TABLES["peers"](results) == ""


def test_the_other_tables(bench) -> None:
    results = {
        "machine": {"cores": "2", "memory": "24 GiB"},
        "small_step": {"ratio_p50": 3.5, "ratio_p99": 1.25},
        "growth": {"tcp client_growth_kib": -16.0, "tcp server_growth_kib": 8.0, "shm left out": "failed: X"},
        "kernels": {"copy_ms 1M 1t": 0.5, "ratio_fused 1M 1t": 0.8, "ratio_fused 1M 2t": 0.9, "ratio_int8 1M 1t": 1.5},
        "digits": {
            "seeds": 5,
            "float32: mean": 0.5,
            "float32: deviation": 0.01,
            "int8: mean": 0.75,
            "int8: deviation": 0.25,
        }
        | {"int8: difference": 0.25, "int8: difference_deviation": 0.125},
    }
    tables = {name: table(results).splitlines()[2:] for name, table in bench.tables.TABLES.items() if name != "machine"}
    assert bench.tables.TABLES["machine"](results) == "cores: 2; memory: 24 GiB"
    wide = bench.tables.TABLES["machine"]({"machine": {"packages": ", ".join(["one 1.0-post"] * 30)}}).splitlines()
    assert len(wide) == 4 and max(map(len, wide)) <= 120
    assert tables["small step"] == ["| ratio_p50 | 3.5 |", "| ratio_p99 | 1.25 |"]
    assert tables["growth"] == ["| tcp | -16 | 8 |"]
    assert tables["kernels"] == [
        "| float32 step to torch fused, ≤ 1.05 | 0.8 | 0.9 |",
        "| 8-bit moments to float32 ones, both answered, ≤ 1.2 | 1.5 | – |",
    ]
    assert tables["encodings"] == [
        "| float32 | 0.5000 ± 0.0100 | – |",
        "| int8 | 0.7500 ± 0.2500 | 0.2500 ± 0.1250 |",
    ]
    assert tables["goals"][0] == "| small_step | ratio_p50 | 3.5 | ≤ 1.25, **missed** |"
    assert tables["goals"][1] == "| small_step | ratio_p99 | 1.25 | ≤ 1.5, met |"
    assert all(row.startswith("| growth |") for row in tables["goals"][2:])


def test_levels_of_durability_become_a_table(bench) -> None:
    figures = {
        "memory 1k float32 ms": 0.5,
        "journal 1k float32 ms": 0.75,
        "bare write 32M bfloat16 ms": 25.0,
        "park ms": 9,
    }
    assert bench.tables.DURABILITY_TABLES["durability levels"]({"durability": figures}).splitlines() == [
        "| ms | 1k parameters, float32 | 32M parameters, bfloat16 |",
        "| --- | --- | --- |",
        "| memory | 0.5 | – |",
        "| journal | 0.75 | – |",
        "| bare write | – | 25 |",
    ]


def test_the_pages_have_a_place_for_every_table(bench) -> None:
    for path, tables in bench.page.PAGES.items():
        page = path.read_text(encoding="utf-8")
        for name in tables:
            assert bench.page.filled(page, name, "x").count(f"<!-- bench:{name} -->\nx\n<!-- /bench:{name} -->") == 1


def test_the_plot_tells_floors_from_steps_from_peers(bench, tmp_path) -> None:
    figures = {"rounds": 9, "tcp ms": 2.0, "raw TCP duplex ms": 1.0, "Ray actor ms": 3.0, "shm to tcp": 0.5}
    assert bench.plot.bars(figures) == [
        ("raw TCP duplex", 1.0, "floor"),
        ("tcp", 2.0, "stepwire"),
        ("Ray actor", 3.0, "peer"),
    ]
    bench.plot.draw({"transports 1M": figures, "peers 1M": figures}, tmp_path / "images" / "steps.png")
    assert (tmp_path / "images" / "steps.png").read_bytes().startswith(b"\x89PNG")
    bench.plot.draw({"machine": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- disks ----------------------------------------------------------------------------------------------------


def test_a_bare_file_goes_on_through_its_room_and_begins_again(bench, tmp_path: pathlib.Path) -> None:
    disk = bench.bare_disk.SlowDisk()
    file = bench.bare_disk.BareFile(tmp_path / "bare", 3 * 4096, disk)
    write, before = file.writer(4096), disk.syncs
    found = []
    for _ in range(4):
        (tmp_path / "bare").write_bytes(bytes(3 * 4096))
        write()
        found.append((tmp_path / "bare").read_bytes().index(1) // 4096)
    assert found == [0, 1, 2, 0] and disk.syncs - before == 4
    file.close()
    assert not (tmp_path / "bare").exists()


def test_a_slow_disk_waits_for_the_rest_of_the_time_alone(
    bench, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept = iter([10.0, 10.5, 20.0, 23.0]), list[float]()
    monkeypatch.setattr(bench.bare_disk.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(bench.bare_disk.time, "sleep", slept.append)
    with (tmp_path / "file").open("wb") as file:
        disk = bench.bare_disk.SlowDisk(2.0)
        disk.sync(file.fileno())
        disk.sync(file.fileno())
    assert slept == [1.5] and disk.syncs == 2


def test_files_are_read_whole_after_an_eviction(bench, tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(5 << 20))
    (tmp_path / "other").write_bytes(b"12345")
    bench.bare_disk.evict(tmp_path)
    assert bench.bare_disk.read_files(tmp_path) == (5 << 20) + 5


# --- what is measured with ------------------------------------------------------------------------------------


def test_a_payload_is_cut_into_messages_and_the_last_is_marked(bench) -> None:
    messages = bench.echo.bulk_messages((8 << 20) + 5)
    assert [len(message) for message in messages] == [4 << 20, 4 << 20, 5]
    assert [message[:1] for message in messages] == [b"M", b"M", b"L"]


@pytest.mark.parametrize("size", [7, 70_000, 3_000_000])
def test_sockets_move_the_bytes(bench, size: int) -> None:
    up = memoryview(np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes())
    with bench.sockets.socket_server() as at:
        for address in at:
            down, stream = bytearray(size), bench.sockets.SocketStream(address)
            stream.duplex(up, memoryview(down))
            assert down == up
            part = bytearray(size // 2)
            stream.push_pull(up, memoryview(part))
            assert part == up[: size // 2]
            stream.close()


def test_raw_grpc_streams_answer_in_their_order(bench) -> None:
    with bench.echo.echo_process() as at:
        for target in at:
            duplex, push_pull, echo = (bench.echo.EchoStream(target, name) for name in ("Duplex", "PushPull", "Echo"))
            assert duplex.round_trip(b"one") == b"one"
            push_pull.exchange([b"M1", b"M2", b"L3"])
            assert push_pull.round_trip(b"L4") == b"L4"
            assert echo.round_trip(bench.echo.sized_message(20, 9)) == bytes(9)
            for stream in (duplex, push_pull, echo):
                stream.close()


def test_a_link_that_cannot_be_made_says_why(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.shaped_link.os, "geteuid", lambda: 1000)
    assert bench.shaped_link.shaped_link(size=10, rounds=1) == {"skipped": "network namespaces need root"}
    monkeypatch.setattr(bench.shaped_link.os, "geteuid", lambda: 0)
    monkeypatch.setattr(bench.shaped_link.shutil, "which", lambda name: None)
    assert bench.shaped_link.shaped_link(size=10, rounds=1) == {"skipped": "ip is not installed; install iproute2"}


def test_encodings_are_compared_seed_by_seed(bench) -> None:
    figures = bench.wire_encodings.compare({"exact": [1.0, 2.0, 3.0], "lossy": [1.5, 2.0, 4.0]})
    assert figures["exact: mean"] == 2.0 and figures["exact: deviation"] == 1.0
    assert figures["lossy: difference"] == 0.5 and figures["lossy: difference_deviation"] == 0.5
    assert "exact: difference" not in figures
    assert bench.wire_encodings.ENCODINGS[0].name == "float32"


def test_a_ratio_of_sums(bench) -> None:
    times = {"a": [1.0, 8.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}
    assert math.isclose(bench.contest.ratio(times, "a", "b", "c"), 1.25)


def test_saved_memory_is_that_in_use(bench: types.SimpleNamespace) -> None:
    """Free memory of the C library is no part of a state, and libraries are the same in every row."""
    figures = bench.torch_memory.Figures
    rows = {
        "torch.optim.Adam": figures(libraries=100.0, private=520.0, free=20.0, shared=0.0),
        "tcp": figures(libraries=100.0, private=380.0, free=60.0, shared=0.0),
    }
    title, heading, local, remote = bench.torch_memory._table(25_000_000, rows).splitlines()
    assert "200 MB" in title
    assert heading.split() == ["private", "free", "in", "use", "saved", "shared"]
    assert local.split()[1:] == ["420", "20", "400", "0"]
    assert remote.split()[1:] == ["280", "60", "220", "180", "0"]


# --- sessions side by side ------------------------------------------------------------------------------------


def test_jains_index_is_one_for_equal_values_and_one_in_n_where_one_has_all(bench) -> None:
    assert bench.fairness.jains_index([3.0] * 7) == pytest.approx(1.0)
    assert bench.fairness.jains_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert bench.fairness.jains_index([1.0, 2.0, 3.0]) == pytest.approx(36 / 42)


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="it starts a server and clients; CI runs it")
def test_sessions_side_by_side_are_measured_by_every_goals_figure(bench) -> None:
    scale = bench.fairness.Scale(small=2, small_size=1_000, large_size=1_100_000, processes=1, seconds=0.2)
    figures = bench.fairness.fairness(scale)
    goals = {goal.figure for goal in bench.main.GOALS if goal.section == "fairness"}
    assert len(goals) == 3 and goals <= figures.keys()
    assert figures["small steps a second"] > 0 and 0.0 < figures[bench.fairness.LARGE_SHARE] < 1.0


# --- small steps on one host ----------------------------------------------------------------------------------


def test_small_steps_are_compared_with_each_floor_round_by_round(bench) -> None:
    lane = bench.lane
    scale = lane.Scale(rounds=3, batch=4)
    calls = {
        name: [0.0]
        for name in (
            "doorbell",
            "gRPC echo",
            *(variant.name for variant in (*lane._STEPS, *lane._COMPILED, lane._SPINNING)),
        )
    }
    ready = {name: (lambda count=count: count.__setitem__(0, count[0] + 1)) for name, count in calls.items()}
    assert {len(batch) for rounds in lane._times(ready, 0.0, scale).values() for batch in rounds} == {4}
    assert {count[0] for count in calls.values()} == {16}, "the first round is not counted"
    times = {name: [[1e-6] * 4, [2e-6] * 4, [4e-6] * 4] for name in calls}
    times["packets"] = [[3e-6] * 4, [4e-6] * 4, [4e-6] * 4]
    figures = lane._figures(times, "1k, 0 ms")
    assert figures[lane.ECHO_GOAL] == 2.0, "the ratios are 3, 2 and 1"
    assert figures["gRPC echo 1k, 0 ms p50 us"] == pytest.approx(2.0)
    assert not any("torch" in name for name in figures)
    table = bench.tables.TABLES["lane"]({"lane": figures}).splitlines()
    assert table[0] == "| ratio of medians | 1k, 0 ms |"
    assert "| packets to gRPC echo | 2 |" in table


def test_a_doorbell_rings_back(bench) -> None:
    with bench.doorbell.doorbell_process() as path, contextlib.closing(bench.doorbell.Doorbell(path)) as doorbell:
        assert [doorbell.ring() for _ in range(3)] == [64] * 3
