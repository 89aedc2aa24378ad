"""Screenshots of the page, of `stepwire top` and of a plot, of a real server: `python docs/plots/screenshots.py`.

It takes a minute, and needs Debian's package `chromium`. Run it from the root of the checkout.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import stepwire  # noqa: E402
import stepwire.plots  # noqa: E402
from stepwire_server.cli.top import drawn  # noqa: E402
from stepwire_server.config import ServerConfig  # noqa: E402
from stepwire_server.server import Server  # noqa: E402
from stepwire_server.testing import serving  # noqa: E402
from tests.support import chromium  # noqa: E402

IMAGES = ROOT / "docs" / "images"
SECONDS = 40.0
SIZE = 20_000
PARAMETERS = {name: np.zeros(SIZE, np.float32) for name in ("encoder/w", "decoder/w")}


def gradient(step: int, seed: int, spoilt: bool = False) -> dict[str, np.ndarray]:
    """Return noise that becomes smaller, as gradients do; one with NaN where it is spoilt."""
    draw, scale = np.random.default_rng((seed, step)), 3.0 / (1.0 + step / 40.0)
    found = {name: (scale * draw.standard_normal(SIZE)).astype(np.float32) for name in PARAMETERS}
    if spoilt:
        found["decoder/w"][17] = np.nan
    return found


@contextlib.contextmanager
def training(server: Server) -> Iterator[None]:
    """Train some sessions for a block: a healthy one, one that gets NaN, and one of two workers."""
    ended, began = threading.Event(), time.monotonic()
    groups = [{"params": ["encoder"], "lr": 3e-4}, {"params": ["decoder"], "lr": 1e-3}]
    schedule = stepwire.Schedule.cosine(2000, warmup_steps=100)
    rounds = stepwire.Aggregation(workers=2)

    def train(session: stepwire.Session, seed: int, pause: float, goes_wrong_after: float = float("inf")) -> None:
        step = 0
        with contextlib.suppress(stepwire.StepwireError):  # at the end, a worker may wait for one that has left
            while not ended.is_set():
                late = time.monotonic() - began
                session.step(gradient(step, seed, spoilt=goes_wrong_after < late < goes_wrong_after + 4.0))
                step += 1
                ended.wait(pause)
            session.detach()

    with contextlib.ExitStack() as stack:

        def start(pause: float, seed: int, wrong: float = float("inf"), **options: object) -> None:
            client = stack.enter_context(stepwire.connect(server.target))
            session = stack.enter_context(client.create_session(PARAMETERS, **options))  # type: ignore[arg-type]
            call: Callable[..., None] = lambda: train(session, seed, pause, wrong)  # noqa: E731
            thread = threading.Thread(target=call)
            thread.start()
            stack.callback(thread.join)

        start(0.05, 1, label="digits, baseline", schedule=schedule, clip_grad_norm=300.0, durability="journal")
        start(0.10, 2, 24.0, label="decoder with lr 1e-3", groups=groups, non_finite="skip")
        for worker, pause in enumerate((0.05, 0.3)):
            start(pause, 3 + worker, label="two workers", aggregation=rounds, worker=worker, request_id="pair")
        stack.callback(ended.set)
        yield


def draw_training() -> None:
    """Train a session of two groups, whose gradient has NaN once, and draw it as its client remembers it."""
    groups = [{"params": ["encoder"], "lr": 3e-4}, {"params": ["decoder"], "lr": 1e-3}]
    options = {"schedule": stepwire.Schedule.cosine(300, warmup_steps=30), "clip_grad_norm": 300.0}
    with serving() as target, stepwire.connect(target) as client:
        with client.create_session(PARAMETERS, groups=groups, non_finite="skip", **options) as session:  # type: ignore[arg-type]
            for step in range(300):
                session.step(gradient(step, 5, spoilt=step == 210))
            stepwire.plots.training(session).savefig(IMAGES / "training.png", dpi=80)


def main() -> None:
    """Write the screenshots."""
    draw_training()
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            bind="127.0.0.1:0", device="cpu", status="127.0.0.1:0", data_dir=folder, log_level="error"
        )
        with Server(config) as server, training(server), stepwire.connect(server.target) as client:
            time.sleep(SECONDS)
            snapshots = client.statistics()
            next(snapshots)
            statistics = next(snapshots)
            console = Console(record=True, width=150, file=open("/dev/null", "w"))
            console.print(drawn(statistics))
            svg = console.export_svg(title="stepwire top")
            (IMAGES / "top.svg").write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL) + "\n")
            assert server.monitoring.status is not None
            with chromium.browser() as browser:
                for name, form in (
                    ("status_page.png", {"width": 1100, "height": 1000}),
                    ("status_page_phone.png", {"width": 390, "height": 844, "mobile": True, "dark": True}),
                ):
                    page = browser.open(server.monitoring.status.url, **form)  # type: ignore[arg-type]
                    page.wait("!!document.querySelector('#troubles li button')")
                    page.evaluate("document.querySelector('#troubles li button').click()")
                    page.wait("Charts.count() > 0")
                    time.sleep(1.5)
                    (IMAGES / name).write_bytes(page.screenshot())


if __name__ == "__main__":
    main()
