"""`stepwire doctor`: exit codes, and the settings of `serve`."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest


def test_the_doctor_finds_a_machine_fit_to_serve(command: Any) -> None:
    code, out, err = command("doctor", "--device", "cpu", "--bind", "127.0.0.1:0")
    assert (code, err) == (0, "")
    assert "ok      device         no GPU is asked for (--device cpu)\n" in out
    assert "ok      port           127.0.0.1:0 takes a free one\n" in out


def test_the_doctor_exits_with_1_where_something_needed_is_missing(command: Any) -> None:
    code, out, err = command("doctor", "--device", "cpu", "--bind", "192.0.2.1:50051")
    assert (code, err) == (1, "")
    assert "WRONG   port           192.0.2.1:50051 cannot be listened on: Cannot assign requested address\n" in out
    assert "                       -> choose an address of this machine, shown by: ip -brief address" in out


def test_a_machine_whose_server_is_there_already_is_fit(command: Any, server: Any) -> None:
    code, out, err = command("doctor", "--device", "cpu", "--bind", server.target)
    assert (code, err) == (0, "")
    assert f"note    port           a stepwire server is at {server.target} already, version " in out


def test_a_gpu_is_needed_only_where_it_is_asked_for(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    auto = command("doctor", "--bind", "127.0.0.1:0")
    assert (auto.code, "note    cupy           CuPy cannot be imported: " in auto.out) == (0, True)
    cuda = command("doctor", "--bind", "127.0.0.1:0", "--device", "cuda")
    assert (cuda.code, "WRONG   cupy           CuPy cannot be imported: " in cuda.out) == (1, True)


def test_the_doctor_answers_programs_and_reads_the_settings_of_serve(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_DEVICE", "cpu")
    monkeypatch.setenv("STEPWIRE_BIND", "nowhere")
    code, out, _ = command("doctor", "--json")
    answer = json.loads(out)
    assert (code, answer["healthy"]) == (1, False)
    (port,) = [finding for finding in answer["findings"] if finding["check"] == "port"]
    assert port == {
        "check": "port",
        "ok": False,
        "detail": "'nowhere' is not host:port",
        "remedy": "--bind 127.0.0.1:50051",
        "optional": False,
    }


def test_the_doctor_tries_the_ways_to_a_server(command: Any, server: Any) -> None:
    code, out, err = command("doctor", "--target", server.target)
    assert (code, err) == (0, "")
    assert "ok      uds            works\nok      tcp            works\n" in out
    code, out, _ = command("doctor", "-t", server.target, "--json")
    answer = json.loads(out)
    assert (code, answer["healthy"]) == (0, True)
    assert [finding["check"] for finding in answer["findings"]][-2:] == ["tcp", "in use"]


def test_the_doctor_refuses_bad_settings_as_serve_does(command: Any) -> None:
    code, out, err = command("doctor", "--device", "tpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("stepwire: --device is 'tpu'; it must be auto, cpu, cuda, or GPUs by number such as cuda:0")
