"""A character-level language model in PyTorch: AdamW on a stepwire server beside torch's; its client is killed.

    pip install '.[demo]' torch
    python examples/language_model.py [--target HOST:PORT] [--precision bfloat16] [--quick]

The program trains four times, from the same seed and on the same batches:

- with torch's AdamW;
- with the server's;
- with the server's in a process that is killed (SIGKILL) in the middle, continued by another process;
- with torch's AdamW, fused, to show the difference of two runs by rounding alone.

The program fails if the loss of the server's run differs from the local loss by 1e-3. It also fails if the parameters
of the killed run differ in a bit from those of the run without a kill.

`train` is a user's function: parameter groups, a schedule of warm-up and cosine, clipping, mixed precision, all of it
torch's. Only the lines with `server` are for a server.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import stepwire.torch
from character_transformer import CharacterTransformer, Text
from command_line import a_server, command_line, progress_bar
from comparison import Comparison
from training_process import TrainingProcess

SEED = 7
CLIP = 1.0
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


class Settings(NamedTuple):
    """The settings of all runs.

    Attributes:
        steps: the number of steps of the optimizer.
        warm_up: the number of steps with a rising learning rate.
        lr: the highest learning rate.
        batch: the number of windows of text in a step.
        length: the number of characters in a window.
        width: the width of the transformer.
        layers: the number of layers of the transformer.
        precision: the precision of matrix products; a key of `PRECISIONS`.
        threads: the number of torch's threads. The order of torch's additions, and so the last bits of all losses,
            depend on this number.
    """

    steps: int
    warm_up: int
    lr: float
    batch: int
    length: int
    width: int
    layers: int
    precision: str
    threads: int

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate: a rise along a line, then half a cosine down to zero."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / (self.steps - self.warm_up)))


class Step(NamedTuple):
    """The report of a run after each step; another process would resume `session`."""

    number: int
    loss: float
    session: str | None


class TrainingResult(NamedTuple):
    """The result of a run: the loss of held-out text, and the parameters."""

    held_out_loss: float
    parameters: dict[str, np.ndarray[Any, Any]]
    began_after: int
    transport: str


def train(
    settings: Settings,
    report: Callable[[Step], None],
    server: str | None = None,
    session: str | None = None,
    *,
    fused: bool = False,
) -> TrainingResult:
    """Train with torch's optimizer, or with a server's, from the start or from the step of a session."""
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    text, shape = Text.of_python(), {"size": settings.batch, "length": settings.length}
    model = CharacterTransformer(
        len(text.alphabet), length=settings.length, width=settings.width, layers=settings.layers, heads=4
    )

    optimizer: Any
    groups, adamw = groups_of(model), {"lr": settings.lr, "betas": (0.9, 0.95)}
    if server is None:
        optimizer, done = torch.optim.AdamW(groups, **adamw, fused=fused), 0
    else:
        optimizer = stepwire.torch.AdamW(groups, **adamw, server=server, session=session, clip_grad_norm=CLIP)
        done = optimizer.applied_step  # 0 in a new session; the model has the parameters of a resumed session now
    for group in optimizer.param_groups:
        group["initial_lr"] = settings.lr  # torch's schedules need it if they begin in the middle
    schedule = LambdaLR(optimizer, settings.factor, last_epoch=done - 1)

    # bfloat16 has the exponents of float32, so no gradient is too small for it. A float16 needs a scaled loss. The
    # scale is constant, so that a resumed process has nothing to restore, and overflows no gradient of this model.
    autocast = {"dtype": PRECISIONS[settings.precision] or torch.bfloat16, "enabled": settings.precision != "float32"}
    scaled = settings.precision == "float16"
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2**31 - 1, enabled=scaled)

    for step in range(done + 1, settings.steps + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", **autocast):
            loss = model.loss(*text.batch(step, **shape))
        scaler.scale(loss).backward()
        if server is None:  # a server clips by itself
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        report(Step(step, loss.item(), None if server is None else optimizer.session_id))

    with torch.no_grad():
        held_out_loss = model.loss(*text.test(size=512, length=settings.length)).item()
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    transport = "none" if server is None else optimizer.transport.name
    if server is not None:
        optimizer.close()
    return TrainingResult(held_out_loss, parameters, done, transport)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups of parameters: the matrices, which decay, and the others (biases and scales)."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.dim() >= 2) is decays] for decays in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train_killed(
    settings: Settings, report: Callable[[Step], None], server: str, kill_at: int
) -> tuple[int | None, TrainingResult]:
    """Train in a process, kill it at the report of a step, and continue in another; return the first exit code too."""
    session = None
    with TrainingProcess(train, settings, server=server) as first:
        for step in first.reports():
            report(step)
            session = step.session  # a user's program would store the id
            if step.number == kill_at:
                first.kill()
        exit_code = first.exit_code
    with TrainingProcess(train, settings, server=server, session=session) as second:
        for step in second.reports():
            report(step)
        return exit_code, second.returned


def read_command_line() -> tuple[argparse.Namespace, Settings]:
    """Return a model for a few minutes of training, or with --quick for a few seconds."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="of matrix products; default bfloat16")
    own.add_argument("--threads", type=int, default=1, help="of torch, in all runs; default 1")
    options = command_line(__doc__, steps=500, quick_steps=40, least_steps=4, plot="language-model.png", also=own)
    size = {"batch": 32, "length": 64, "width": 96, "layers": 2}
    if options.quick:
        size = {"batch": 8, "length": 32, "width": 32, "layers": 1}
    warm_up = options.steps // 10
    return options, Settings(options.steps, warm_up, 2e-3, **size, precision=options.precision, threads=options.threads)


def main() -> int:
    """Train four times and compare."""
    options, settings = read_command_line()
    kill_at = settings.steps // 2
    names = ("local torch", "stepwire", "stepwire, killed", "torch, fused")
    curves: dict[str, dict[int, float]] = {name: {} for name in names}

    with progress_bar(options) as bar, a_server(options.target) as server:

        def reporter(name: str) -> Callable[[Step], None]:
            task = bar.add_task(name, total=settings.steps)

            def report(step: Step) -> None:
                curves[name][step.number] = step.loss
                bar.update(task, completed=step.number)

            return report

        local = train(settings, reporter("local torch"))
        remote = train(settings, reporter("stepwire"), server)
        exit_code, resumed = train_killed(settings, reporter("stepwire, killed"), server, kill_at)
        fused = train(settings, reporter("torch, fused"), fused=True)

    apart = abs(remote.held_out_loss - local.held_out_loss)
    differing = [name for name, value in remote.parameters.items() if not same_bits(value, resumed.parameters[name])]
    return Comparison(
        title=f"Character-level transformer, AdamW, {settings.precision}",
        curves=curves,
        marks={resumed.began_after: "SIGKILL"},
        facts={
            "parameters": sum(value.size for value in local.parameters.values()),
            "transport": remote.transport,
            "killed after step": resumed.began_after,
            "held-out loss, local": local.held_out_loss,
            "held-out loss, stepwire": remote.held_out_loss,
            "held-out loss, stepwire, killed": resumed.held_out_loss,
            "their difference, stepwire and local": apart,
            "the same, torch's own two": abs(fused.held_out_loss - local.held_out_loss),
            "tensors that the kill changed": len(differing),
        },
        checks={
            "the server's run ends with the local run's loss, within 1e-3": apart < 1e-3,
            "the first process was killed in the middle": exit_code == -signal.SIGKILL
            and kill_at <= resumed.began_after < settings.steps,
            "killed and resumed, it ends with the same parameters, to the bit": not differing,
        },
    ).show(options)


def same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Compare bits: two zeros may differ, and two NaNs may be the same."""
    return one.tobytes() == other.tobytes()


if __name__ == "__main__":
    sys.exit(main())
