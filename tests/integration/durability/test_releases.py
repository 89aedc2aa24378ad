"""Data directories that earlier releases have written: this one reads them, and goes on to the same bits."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

import stepwire
from tests.integration.durability.release import KINDS, SETTINGS, stepped
from tests.support.numpy_server import numpy_server

RELEASES = sorted(pathlib.Path(__file__).with_name("releases").iterdir())


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_data_directory_of_a_release_is_read(release: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = shutil.copytree(release / "data", tmp_path / "data")
    for folder in ("work", "epochs", "log", "sessions"):  # git keeps no empty folders
        (data / folder).mkdir(exist_ok=True)
    expected = json.loads((release / "expected.json").read_text())["sessions"]
    with numpy_server(data_dir=str(data), **SETTINGS) as server, stepwire.connect(server.target) as client:
        for name in KINDS:
            session = client.session(expected[name]["id"])
            session.attach(take_over=True)
            if name == "parked":
                assert session.applied_step == 2
                stepped(session, 3, 1)
            assert session.applied_step == 3
            assert stepped(session, 4, 2) == expected[name]["after"]
