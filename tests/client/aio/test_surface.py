"""The asynchronous client against a real server."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

import stepwire
import stepwire.aio
from stepwire.errors import InvalidRequestError, SessionNotFoundError, UnavailableError
from tests.support.lost_replies import lost_replies

WEIGHTS = {"layers": [{"w": np.zeros((3, 2), np.float32)}, {"w": np.ones(2, np.float32)}]}
PATIENCE_SECONDS = 120.0


def gradients(seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return {"layers": [{"w": generator.standard_normal(shape).astype(np.float32)} for shape in ((3, 2), (2,))]}


def bits(tree: Any) -> list[bytes]:
    return [layer["w"].tobytes() for layer in tree["layers"]]


def running(body: Callable[[stepwire.aio.AsyncClient], Coroutine[Any, Any, Any]], target: str) -> Any:
    """Run a test in a loop of its own; no task and no thread is left after the client."""

    async def run() -> Any:
        async with stepwire.aio.connect(target, timeout=120.0) as client:
            answer = await asyncio.wait_for(body(client), PATIENCE_SECONDS)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("stepwire-aio")] == []
        return answer

    return asyncio.run(run())


@pytest.mark.parametrize("channels", [1, 2])
def test_a_session_is_used_as_the_synchronous_one_is(target: str, channels: int) -> None:
    async def body(client: stepwire.aio.AsyncClient) -> Any:
        async with await client.create_session(WEIGHTS, optimizer=stepwire.Adam(lr=0.1), label="aio") as session:
            assert session.shapes == {"layers/0/w": (3, 2), "layers/1/w": (2,)}
            for seed in range(3):
                answer = await session.step(gradients(seed))
            assert bits(await session.pull()) == bits(answer)
            assert session.applied_step == await session.settled() == (await session.info()).applied_step == 3
            assert session.last_result is not None
            assert session.transport is not None
            state = await session.state()
            await session.load(WEIGHTS)
            assert bits(await session.pull()) == bits(WEIGHTS)
            assert (await session.state()).step == state.step == 3
            assert any([info.session_id in session.session_id async for info in client.sessions()])
            await session.detach()
            other = await client.session(session.session_id, like=WEIGHTS)
            assert bits(await other.pull()) == bits(WEIGHTS)
        await session.close()
        with pytest.raises(RuntimeError, match="it is closed"):
            await session.step(gradients(0))
        with pytest.raises(SessionNotFoundError):
            await client.session(session.session_id)
        return answer

    with stepwire.connect(target) as client, client.create_session(WEIGHTS, optimizer=stepwire.Adam(lr=0.1)) as session:
        for seed in range(3):
            want = session.step(gradients(seed))
    targets = target if channels == 1 else [target] * channels
    assert bits(running(body, targets)) == bits(want)  # type: ignore[arg-type]


def test_sessions_step_beside_each_other(target: str) -> None:
    """One that waits does not keep the others waiting."""

    async def body(client: stepwire.aio.AsyncClient) -> None:
        assert (await client.info()).protocol_min >= 1
        slow, fast = await client.create_session(WEIGHTS), await client.create_session(WEIGHTS)
        held, free = threading.Event(), threading.Event()

        def hold(name: str, values: Any) -> None:
            held.set()
            assert free.wait(PATIENCE_SECONDS)

        waiting = asyncio.create_task(slow.step(gradients(0), on_tensor=hold))
        assert await asyncio.to_thread(held.wait, PATIENCE_SECONDS)
        await asyncio.gather(*(fast.step(gradients(seed)) for seed in range(4)))
        assert fast.applied_step == 4
        assert not waiting.done()
        free.set()
        await waiting
        await asyncio.gather(slow.close(), fast.close())

    running(body, target)


def test_a_step_whose_await_is_cancelled_is_applied_and_known(target: str) -> None:
    async def body(client: stepwire.aio.AsyncClient) -> None:
        async with await client.create_session(WEIGHTS) as session:
            held, free = threading.Event(), threading.Event()

            def hold(name: str, values: Any) -> None:
                held.set()
                assert free.wait(PATIENCE_SECONDS)

            task = asyncio.create_task(session.step(gradients(0), on_tensor=hold))
            assert await asyncio.to_thread(held.wait, PATIENCE_SECONDS)
            behind = asyncio.create_task(session.step(gradients(9)))
            await asyncio.sleep(0)
            for each in (task, behind):
                each.cancel()
            await asyncio.wait([task, behind])
            assert task.cancelled()
            assert behind.cancelled()
            free.set()
            assert await session.settled() == 1
            await session.step(gradients(1))
            assert (await session.info()).applied_step == 2

    running(body, target)


def test_a_task_that_is_cancelled_in_its_block_leaves_nothing(target: str) -> None:
    """Neither a session on the server nor a thread; the step under way is waited for."""
    held, free, ids = threading.Event(), threading.Event(), []

    async def body(client: stepwire.aio.AsyncClient) -> None:
        def hold(name: str, values: Any) -> None:
            held.set()
            assert free.wait(PATIENCE_SECONDS)

        async def train() -> None:
            async with await client.create_session(WEIGHTS) as session:
                ids.append(session.session_id)
                while True:
                    await session.step(gradients(0), on_tensor=hold)

        task = asyncio.create_task(train())
        assert await asyncio.to_thread(held.wait, PATIENCE_SECONDS)
        task.cancel()
        await asyncio.sleep(0)
        free.set()
        await asyncio.wait([task])
        assert task.cancelled()
        with pytest.raises(SessionNotFoundError):
            await client.session(ids[0])

    running(body, target)


def test_a_step_that_fails_unseen_is_told_and_taken_again(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: stepwire.aio.AsyncClient) -> Any:
        async with await client.create_session(WEIGHTS, optimizer=stepwire.SGD(lr=1.0)) as session:
            step, begun, fails = session.blocking.step, threading.Event(), threading.Event()

            def lost(*arguments: Any, **options: Any) -> Any:
                """Apply the step, and know nothing of it."""
                with lost_replies():
                    try:
                        step(*arguments, **options)
                    finally:
                        begun.set()
                        assert fails.wait(PATIENCE_SECONDS)

            with monkeypatch.context() as patched:
                patched.setattr(session.blocking, "step", lost)
                task = asyncio.create_task(session.step(gradients(0)))
                assert await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
                task.cancel()
                await asyncio.wait([task])
                fails.set()
                with pytest.raises(UnavailableError, match="the reply was lost"):
                    await session.settled()
            answer = await session.step(gradients(0))
            assert session.last_result is not None
            assert session.last_result.replayed
            assert (await session.info()).applied_step == 1
            return answer

    answer = running(body, target)
    for got, old, gradient in zip(answer["layers"], WEIGHTS["layers"], gradients(0)["layers"], strict=True):
        assert got["w"].tolist() == (old["w"] - gradient["w"]).tolist()


def test_a_creation_that_nobody_waits_for_leaves_no_session(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    create = stepwire.Client.create_session

    def held(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert goes_on.wait(PATIENCE_SECONDS)
        return create(*arguments, **options)

    monkeypatch.setattr(stepwire.Client, "create_session", held)

    async def body(client: stepwire.aio.AsyncClient) -> None:
        for request_id, left in ((None, []), ("aio-kept", ["of nobody"])):
            begun.clear()
            goes_on.clear()
            task = asyncio.create_task(client.create_session(WEIGHTS, label="of nobody", request_id=request_id))
            assert await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
            task.cancel()
            await asyncio.wait([task])
            goes_on.set()
            found = [info async for info in client.sessions() if info.label == "of nobody"]
            assert [info.label for info in found] == left
        async with await client.session(found[0].session_id):
            pass

    running(body, target)


def test_errors_are_those_of_the_synchronous_client(target: str) -> None:
    async def body(client: stepwire.aio.AsyncClient) -> None:
        async with await client.create_session(WEIGHTS) as session:
            with pytest.raises(InvalidRequestError, match="names do not match"):
                await session.step({"v": np.zeros(2, np.float32)})
            await session.step(gradients(0))
        with pytest.raises(InvalidRequestError, match="frozen: 'v' is not a parameter"):
            await client.create_session(WEIGHTS, frozen=["v"])

    running(body, target)


def test_a_client_that_closes_leaves_its_sessions_on_the_server(target: str) -> None:
    async def body(client: stepwire.aio.AsyncClient) -> str:
        session = await client.create_session(WEIGHTS)
        await session.step(gradients(0))
        return session.session_id

    session_id = running(body, target)
    with stepwire.connect(target) as client, client.session(session_id) as session:
        assert session.info().applied_step == 1


def test_sessions_that_are_forgotten_leave_no_thread(target: str) -> None:
    async def body(client: stepwire.aio.AsyncClient) -> None:
        for seed in range(3):
            session = await client.create_session(WEIGHTS)
            await session.step(gradients(seed))
            del session
            gc.collect()
            assert len(client._workers) == 1

    running(body, target)


NOT_THERE = {"apply", "shards", "step_async"}


@pytest.mark.parametrize(
    ("synchronous", "asynchronous"),
    [(stepwire.Session, stepwire.aio.AsyncSession), (stepwire.Client, stepwire.aio.AsyncClient)],
)
def test_every_method_is_there_with_its_signature_and_docstring(synchronous: type, asynchronous: type) -> None:
    owners = [owner for owner in synchronous.__mro__ if owner.__module__.startswith("stepwire.")]
    public = {name for owner in owners for name in vars(owner) if not name.startswith("_")} - NOT_THERE
    assert public <= set(dir(asynchronous))
    for name in public - {"close"}:
        one, other = inspect.getattr_static(synchronous, name), inspect.getattr_static(asynchronous, name)
        assert inspect.getdoc(one) == inspect.getdoc(other)
        if isinstance(one, property):
            assert isinstance(other, property)
            continue
        assert inspect.iscoroutinefunction(other) or inspect.isasyncgenfunction(other)
        assert inspect.signature(one).parameters == inspect.signature(other).parameters
    assert inspect.signature(stepwire.connect).parameters == inspect.signature(stepwire.aio.connect).parameters
