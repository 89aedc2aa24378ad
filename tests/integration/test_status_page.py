"""The status page in a real browser: live, safe, and an answer to whoever's run has gone wrong."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.devices.pool import DevicePool
from stepwire_server.server import Server
from tests.support import chromium
from tests.support.chromium import Browser, Page
from tests.support.numpy_server import numpy_pool

HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
PARAMETERS = {"good": np.ones(8, np.float32), "bad": np.ones(8, np.float32)}
GROUPS = [{"params": ["good"], "lr": 0.001}, {"params": ["bad"], "lr": 0.01}]
GRADIENT = {name: np.full(8, 0.5, np.float32) for name in PARAMETERS}
SPOILT = GRADIENT | {"bad": np.full(8, np.nan, np.float32)}


@pytest.fixture
def settings() -> dict[str, Any]:
    return {"status": "127.0.0.1:0", "sweep_seconds": 3600.0}


@pytest.fixture
def pool() -> DevicePool:
    return numpy_pool()


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    """One browser for all tests of this module."""
    if chromium.executable() is None:
        pytest.skip("Chromium is missing; it is in Debian's package `chromium`")
    with chromium.browser() as browser:
        yield browser


@pytest.fixture
def opened(running: Browser, server: Server) -> Iterator[Any]:
    """Open the page in any form."""
    assert server.monitoring.status is not None
    url = server.monitoring.status.url
    with contextlib.ExitStack() as stack:

        def make(**form: Any) -> Page:
            return stack.enter_context(contextlib.closing(running.open(f"{url}/", **form)))

        yield make


@pytest.fixture
def session(server: Server) -> Iterator[stepwire.Session]:
    options: dict[str, Any] = {"groups": GROUPS, "non_finite": "skip", "clip_grad_norm": 1.0, "label": HOSTILE}
    with (
        stepwire.connect(server.target, transport="tcp") as client,
        client.create_session(PARAMETERS, **options) as session,
    ):
        yield session


def check_clean(page: Page, server: Server) -> None:
    """Nothing is in the console, and nothing was asked for elsewhere."""
    assert server.monitoring.status is not None
    assert page.errors() == []
    assert {url for url in page.requests() if not url.startswith((server.monitoring.status.url, "about:"))} == set()


def row(session: stepwire.Session, column: int) -> str:
    """Return an expression for the text of a session's cell."""
    button = f"document.querySelector('[data-key=\"session {session.session_id}\"]')"
    return f"{button}?.closest('tr').cells[{column}].textContent"


def test_a_run_is_seen_live_and_its_label_is_text(server: Server, session: stepwire.Session, opened: Any) -> None:
    session.step(GRADIENT)
    page = opened()
    page.wait(f"{row(session, 2)} === '1'")
    page.wait("document.querySelector('#alive').dataset.state === 'alive'")
    assert page.evaluate(row(session, 0)) == HOSTILE
    session.step(GRADIENT)
    page.wait(f"{row(session, 2)} === '2'")
    page.wait(f"parseFloat({row(session, 3)}) >= 0")
    assert page.evaluate("document.title") == "stepwire"
    assert page.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_clean(page, server)


def test_whoever_looks_finds_since_when_which_group_and_which_worker(
    server: Server, session: stepwire.Session, opened: Any
) -> None:
    for gradient in (GRADIENT, GRADIENT, SPOILT, SPOILT):
        session.step(gradient)
    page = opened()
    found = page.wait("document.querySelector('#troubles li span')?.textContent")
    assert found.startswith(" NaN or Inf in the gradient: 2 steps, 3 to 4, group 1, worker 0, since ")
    page.evaluate("document.querySelector('#troubles button').click()")
    page.wait("!document.querySelector('#detail').hidden && Charts.count() >= 4")
    points = page.evaluate("latest.detail.points")
    assert sum(points["bad"]) == 2
    assert points["step"][-1] == 4
    assert points["lr"][0][-1] == pytest.approx(0.001)
    assert points["lr"][1][-1] == pytest.approx(0.01)
    assert page.evaluate("document.querySelectorAll('#charts canvas').length") == page.evaluate("Charts.count()")
    assert page.evaluate("document.querySelector('#workers tbody tr').cells[1].textContent") == "attached"
    before = page.evaluate("latest.detail.points.step.at(-1)")
    session.step(GRADIENT)
    page.wait(f"latest.detail?.points.step.at(-1) === {before + 1}")
    check_clean(page, server)


def test_a_phone_in_the_dark_is_served_too(server: Server, session: stepwire.Session, opened: Any) -> None:
    session.step(SPOILT)
    page = opened(width=360, height=740, mobile=True, dark=True)
    page.wait("!document.querySelector('#troubles').hidden")
    page.evaluate("document.querySelector('#troubles button').click()")
    page.wait("Charts.count() > 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)"
    check_clean(page, server)


def test_the_keyboard_is_enough(server: Server, session: stepwire.Session, opened: Any) -> None:
    session.step(GRADIENT)
    page = opened()
    page.wait(f"{row(session, 2)} === '1'")
    page.key("/", "/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.evaluate(f"document.querySelector('[data-key=\"session {session.session_id}\"]').focus()")
    page.key("Enter", "\r")
    page.wait("!document.querySelector('#detail').hidden")
    session.step(GRADIENT)
    page.wait(f"{row(session, 2)} === '2'")
    assert page.evaluate("document.activeElement.dataset.key") == f"session {session.session_id}"
    page.key("Escape")
    page.wait("document.querySelector('#detail').hidden")
    check_clean(page, server)


def test_a_refused_gradient_is_named(server: Server, opened: Any) -> None:
    with (
        stepwire.connect(server.target, transport="tcp") as client,
        client.create_session(PARAMETERS) as session,
    ):
        with pytest.raises(stepwire.NonFiniteGradientError):
            session.step(SPOILT)
        page = opened()
        text = page.wait("document.querySelector('#refusals li')?.textContent")
        assert text.startswith("NON_FINITE_GRADIENT step 1: the gradient of tensor 'bad' holds NaN or Inf")


def test_a_server_that_ends_is_told(server: Server, opened: Any) -> None:
    page = opened()
    page.wait("document.querySelector('#alive').dataset.state === 'alive'")
    server.close()
    page.wait("document.querySelector('#alive').dataset.state === 'lost'")


def ask(server: Server, path: str = "/", **headers: str) -> tuple[int, str, Any]:
    assert server.monitoring.status is not None
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.monitoring.status.port)) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8088", "127.0.0.1.evil.example", "", "[::2]:1"])
def test_another_name_of_the_server_is_refused(server: Server, host: str) -> None:
    for path in ("/", "/page.js", "/events"):
        status, text, _ = ask(server, path, Host=host)
        assert (status, text) == (
            421,
            "this name of the server is not known to it; start it with --status-hosts NAME\n",
        )


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]", "[::1]:8088"])
def test_names_of_loopback_are_known(server: Server, host: str) -> None:
    assert ask(server, Host=host)[0] == 200


def test_nothing_but_own_files_may_load(server: Server) -> None:
    status, text, headers = ask(server)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "<style" not in text
    assert "style=" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/../server.py", "/page/index.html", "/%2e%2e/__init__.py", "/nothing"])
def test_other_files_are_not_there(server: Server, path: str) -> None:
    assert ask(server, path)[:2] == (404, "not found\n")
