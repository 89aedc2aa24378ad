"""Which client `connect` makes, and what it refuses before anything is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepwire

LARGE = {"w": np.ones((3, 70_000), np.float32), "b": np.ones(4, np.float32)}


@pytest.fixture
def many(target: str):
    with stepwire.connect(target, channels=2, timeout=120.0) as client:
        yield client


def test_several_targets_or_channels_make_a_client_of_several(target: str) -> None:
    for targets, channels, expected in (
        (target, 1, [target]),
        ([target], 1, [target]),
        (target, 3, [target] * 3),
        (["a:1", "b:2"], 1, ["a:1", "b:2"]),
        (("a:1", "b:2"), 2, ["a:1", "a:1", "b:2", "b:2"]),
    ):
        with stepwire.connect(targets, channels=channels) as client:
            assert client.target == ",".join(expected)
            assert client.targets == tuple(expected)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"target": []}, "target"),
        ({"target": ["a:1", 7]}, "target"),
        ({"target": "a:1", "channels": 0}, "channels"),
        ({"target": "a:1", "channels": True}, "channels"),
        ({"target": "a:1", "channels": 1.5}, "channels"),
    ],
)
def test_what_is_no_target_is_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(stepwire.InvalidRequestError) as refused:
        stepwire.connect(**arguments)
    assert refused.value.metadata["field"] == field


def test_bad_input_is_refused_by_the_users_names(many: stepwire.Client) -> None:
    with many.create_session(LARGE) as session:
        assert len(session.shards) == 2
        assert session.shapes == {"w": (3, 70_000), "b": (4,)}
        assert [len(shard.shapes) for shard in session.shards] == [1, 2]
        with pytest.raises(stepwire.InvalidRequestError, match=r"gradients\['w'\]: shape \(3,\) is not the session's"):
            session.step(LARGE | {"w": np.ones(3, np.float32)})
        with pytest.raises(stepwire.InvalidRequestError, match=r"missing \['b'\]"):
            session.step({"w": LARGE["w"]})
        assert session.applied_step == 0


def test_what_a_server_refuses_is_told_with_its_shard(many: stepwire.Client, target: str) -> None:
    with many.create_session(LARGE, non_finite="reject") as session:
        with pytest.raises(stepwire.InvalidRequestError, match=rf"overlap.*\(shard 0 on {target}\)") as refused:
            session.step(LARGE, overlap=True)
        assert refused.value.metadata["shard"] == f"shard 0 on {target}"
        spoiled = LARGE["w"].copy()
        spoiled[2, 69_999] = np.inf
        with pytest.raises(stepwire.NonFiniteGradientError, match=r"tensor 'w' holds .*\(shard 1 on") as refused:
            session.step(LARGE | {"w": spoiled})
        assert (refused.value.metadata["tensor"], refused.value.metadata["element"]) == ("w", "209999")
        assert session.applied_step == 0


def test_ids_are_needed_and_known(many: stepwire.Client) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="there is no id"):
        many.session([])
    with pytest.raises(stepwire.SessionNotFoundError, match="is on none of the servers"):
        many.session("a,b,c")  # more than there are targets, as of a session that has moved to fewer


def test_shards_of_different_sessions_are_told_apart(many: stepwire.Client) -> None:
    with many.create_session(LARGE) as one, many.create_session(LARGE, clip_grad_norm=1.0) as other:
        mixed = [one.session_id.split(",")[0], other.session_id.split(",")[1]]
        with pytest.raises(stepwire.InvalidRequestError, match="another optimizer, other groups or other options"):
            many.session(mixed)


def test_a_session_is_used_after_its_end_as_any_is(many: stepwire.Client) -> None:
    session = many.create_session(LARGE)
    session.step(LARGE)
    session.close()
    session.close()
    with pytest.raises(stepwire.SessionNotFoundError, match="shard 0 on"):
        session.step(LARGE)
    with pytest.raises(stepwire.SessionNotFoundError):
        session.info()
    session.close()
