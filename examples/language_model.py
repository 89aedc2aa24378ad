"""A character-level language model in PyTorch: AdamW on a stepwire server beside torch's; its client is killed.

    pip install 'stepwire[demo]' torch
    python examples/language_model.py [--target HOST:PORT] [--precision bfloat16] [--quick]

From the same seed and on the same batches it trains with torch's AdamW; with the server's; with the server's in a
process that is killed (SIGKILL) in the middle, whose work another one takes up; and with torch's once more, fused, to
see how far apart rounding alone takes two runs. It fails unless the server's run ends with the local run's loss, within
1e-3, and the run that was killed with the parameters of the one that was not, to the bit.

`train` is what a user writes: parameter groups, a schedule of warm-up and cosine, clipping, mixed precision, all of it
torch's. What a server changes in it stands in the lines with `server`.
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


class Plan(NamedTuple):
    """What all runs have in common.

    Attributes:
        steps: of the optimizer.
        warm_up: of them, those in which the learning rate rises.
        lr: its highest value.
        batch: windows of text a step.
        length: characters a window.
        width: of the transformer.
        layers: of the transformer.
        precision: of matrix products; a key of `PRECISIONS`.
        threads: of torch. The order of its additions depends on them, and the last bits of all losses on that.
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
        """Return what the learning rate is multiplied by: a rise along a line, then half a cosine down to zero."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / (self.steps - self.warm_up)))


class Step(NamedTuple):
    """What a run reports after each step; `session` is what another process would go on with."""

    number: int
    loss: float
    session: str | None


class Outcome(NamedTuple):
    """What a run ends with: the loss of text that it has not seen, and its parameters."""

    held_out_loss: float
    parameters: dict[str, np.ndarray[Any, Any]]
    began_after: int
    transport: str


def train(
    plan: Plan,
    report: Callable[[Step], None],
    server: str | None = None,
    session: str | None = None,
    *,
    fused: bool = False,
) -> Outcome:
    """Train: with torch's optimizer, or with a server's, there from the start or from where a session stands."""
    torch.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    text, shape = Text.of_python(), {"size": plan.batch, "length": plan.length}
    model = CharacterTransformer(len(text.alphabet), length=plan.length, width=plan.width, layers=plan.layers, heads=4)

    optimizer: Any
    groups, settings = groups_of(model), {"lr": plan.lr, "betas": (0.9, 0.95)}
    if server is None:
        optimizer, done = torch.optim.AdamW(groups, **settings, fused=fused), 0
    else:
        optimizer = stepwire.torch.AdamW(groups, **settings, server=server, session=session, clip_grad_norm=CLIP)
        done = optimizer.applied_step  # 0 in a new session; in one to go on with, the model has its parameters now
    for group in optimizer.param_groups:
        group["initial_lr"] = plan.lr  # what torch's schedules ask for where they begin in the middle
    schedule = LambdaLR(optimizer, plan.factor, last_epoch=done - 1)

    # bfloat16 has the exponents of float32: no gradient is too small for it. float16 needs its loss scaled; the scale
    # stays as it is, so that a process that goes on has nothing to restore, and overflows no gradient of this model.
    autocast = {"dtype": PRECISIONS[plan.precision] or torch.bfloat16, "enabled": plan.precision != "float32"}
    scaled = plan.precision == "float16"
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=2**31 - 1, enabled=scaled)

    for step in range(done + 1, plan.steps + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", **autocast):
            loss = model.loss(*text.batch(step, **shape))
        scaler.scale(loss).backward()
        if server is None:  # a server has clip_grad_norm
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        report(Step(step, loss.item(), None if server is None else optimizer.session_id))

    with torch.no_grad():
        held_out_loss = model.loss(*text.test(size=512, length=plan.length)).item()
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    transport = "none" if server is None else optimizer.transport.name
    if server is not None:
        optimizer.close()
    return Outcome(held_out_loss, parameters, done, transport)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Part the parameters into those whose weights decay, the matrices, and the others: biases and scales."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.dim() >= 2) is decays] for decays in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train_killed(plan: Plan, report: Callable[[Step], None], server: str, kill_at: int) -> tuple[int | None, Outcome]:
    """Train in a process, kill it when it reports a step, and go on in another; return the first's exit code too."""
    session = None
    with TrainingProcess(train, plan, server=server) as first:
        for step in first.reports():
            report(step)
            session = step.session  # a user's program would write it down somewhere
            if step.number == kill_at:
                first.kill()
        exit_code = first.exit_code
    with TrainingProcess(train, plan, server=server, session=session) as second:
        for step in second.reports():
            report(step)
        return exit_code, second.outcome


def read_command_line() -> tuple[argparse.Namespace, Plan]:
    """Choose a model that a few minutes can train, or, with --quick, a few seconds."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="of matrix products; default bfloat16")
    own.add_argument("--threads", type=int, default=1, help="of torch, in all runs; default 1")
    options = command_line(__doc__, steps=500, quick_steps=40, least_steps=4, plot="language-model.png", also=own)
    size = {"batch": 32, "length": 64, "width": 96, "layers": 2}
    if options.quick:
        size = {"batch": 8, "length": 32, "width": 32, "layers": 1}
    warm_up = options.steps // 10
    return options, Plan(options.steps, warm_up, 2e-3, **size, precision=options.precision, threads=options.threads)


def main() -> int:
    """Train four times and compare."""
    options, plan = read_command_line()
    kill_at = plan.steps // 2
    names = ("local torch", "stepwire", "stepwire, killed", "torch, fused")
    curves: dict[str, dict[int, float]] = {name: {} for name in names}

    with progress_bar(options) as bar, a_server(options.target) as server:

        def reporter(name: str) -> Callable[[Step], None]:
            task = bar.add_task(name, total=plan.steps)

            def report(step: Step) -> None:
                curves[name][step.number] = step.loss
                bar.update(task, completed=step.number)

            return report

        local = train(plan, reporter("local torch"))
        remote = train(plan, reporter("stepwire"), server)
        exit_code, resumed = train_killed(plan, reporter("stepwire, killed"), server, kill_at)
        fused = train(plan, reporter("torch, fused"), fused=True)

    apart = abs(remote.held_out_loss - local.held_out_loss)
    differing = [name for name, value in remote.parameters.items() if not same_bits(value, resumed.parameters[name])]
    return Comparison(
        title=f"Character-level transformer, AdamW, {plan.precision}",
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
            and kill_at <= resumed.began_after < plan.steps,
            "killed and resumed, it ends with the same parameters, to the bit": not differing,
        },
    ).show(options)


def same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Compare bits, not values, to which two zeros are equal and two NaNs are not."""
    return one.tobytes() == other.tobytes()


if __name__ == "__main__":
    sys.exit(main())
