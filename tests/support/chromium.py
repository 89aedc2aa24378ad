"""Debian's Chromium without a window, spoken to over a pipe by its own protocol: no driver and no package is needed."""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["Browser", "Page", "browser", "executable"]

_FLAGS: Final = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests of containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)


# The page looks, and not the test: a test that asks without a pause leaves the page no time.
_WAIT: Final = """(async () => {
  for (const end = Date.now() + 60000; Date.now() < end; await new Promise((go) => setTimeout(go, 10))) {
    try {
      const value = EXPRESSION;
      if (value) return value instanceof Node ? true : value;
    } catch { /* it is not there yet */ }
  }
})()"""


def executable() -> str | None:
    """Return the path of Chromium; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """A running browser."""

    def __init__(self, commands: int, replies: int) -> None:
        """Speak over two ends of pipes."""
        self._commands, self._replies = commands, replies
        self._number, self._buffer = 0, b""
        self.events: collections.deque[dict[str, Any]] = collections.deque()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._replies, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, url: str, *, width: int = 1200, height: int = 900, mobile: bool = False, dark: bool = False) -> Page:
        """Open a page of a size, in CSS pixels."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        self._await("Page.loadEventFired", session)
        return page

    def _await(self, method: str, session: str) -> None:
        """Wait for an event of a page that has not come."""
        while not any((event["method"], event.get("sessionId")) == (method, session) for event in self.events):
            self.events.append(self._read())


class Page:
    """A page of a browser."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        """See `Browser.open`."""
        self._browser, self._target, self._session = browser, target, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol on this page."""
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, and return its value."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Have the page evaluate JavaScript again and again until it is true, and return its value."""
        value = self.evaluate(_WAIT.replace("EXPRESSION", expression))
        assert value, f"it did not come true: {expression}; the page: {self.evaluate('document.body?.innerText')}"
        return value

    def key(self, key: str, text: str = "") -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "")

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of some methods so far."""
        own = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in own if event["method"] in methods]

    def errors(self) -> list[Any]:
        """Return what the console has of errors and warnings, and exceptions that nobody caught."""
        bad = ("error", "warning", "assert")
        said = [each for each in self.seen("Runtime.consoleAPICalled") if each["type"] in bad]
        logged = [each for each in self.seen("Log.entryAdded") if each["entry"]["level"] in bad]
        return [*self.seen("Runtime.exceptionThrown"), *said, *logged]

    def close(self) -> None:
        """Close the page."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def requests(self) -> list[str]:
        """Return the addresses of everything that was asked for."""
        return [each["request"]["url"] for each in self.seen("Network.requestWillBeSent")]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Run a browser for a block."""
    path = executable()
    assert path is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        (read_commands, commands), (replies, write_replies) = os.pipe(), os.pipe()
        # The protocol is spoken over the descriptors 3 and 4.
        script = f'exec 3<&{read_commands} 4>&{write_replies}; exec "$@"'
        command = ["bash", "-c", script, "bash", path, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        with open(pathlib.Path(folder, "log"), "wb") as log:
            process = subprocess.Popen(
                command, pass_fds=(read_commands, write_replies), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        os.close(read_commands)
        os.close(write_replies)
        try:
            yield Browser(commands, replies)
        finally:
            process.kill()
            process.wait()
            os.close(commands)
            os.close(replies)
