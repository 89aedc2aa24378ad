"""Models in torch's shared memory: one process may step them, and a second one is refused by name."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]

# Two processes step one model, in turns: each says what its step did.
PROGRAM = """
import sys, torch, torch.multiprocessing as mp, stepwire.torch

def work(target, model, made, mine, other, queue, uploads):
    torch.set_num_threads(1)
    optimizer = stepwire.torch.SGD(model.parameters(), lr=1.0, server=target)
    made.wait()
    said = []
    for _ in range(3):
        mine.acquire()
        try:
            if uploads:
                optimizer.upload_parameters()
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            said.append(float(model.weight[0, 0]))
        except stepwire.UnsupportedFeatureError as error:
            said.append(str(error)[:64])
        other.release()
    queue.put(said)

if __name__ == "__main__":
    target, method, count, uploads = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "uploads"
    context = mp.get_context(method)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model.share_memory()
    turns = [context.Semaphore(1), context.Semaphore(0)]
    turns = turns if count == 2 else [context.Semaphore(3)] * 2
    made = context.Barrier(count)
    queues = [context.SimpleQueue() for _ in range(count)]
    workers = [
        context.Process(target=work, args=(target, model, made, turns[i], turns[1 - i], queues[i], uploads))
        for i in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for queue in queues:
        print(*queue.get(), sep="; ")
    print(float(model.weight[0, 0]))
"""


def run(tmp_path: pathlib.Path, *arguments: str) -> list[str]:
    script = tmp_path / "shared_model.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_process_alone_steps_a_shared_model(tmp_path: pathlib.Path, target: str) -> None:
    assert run(tmp_path, target, "fork", "1", "steps") == ["-1.0; -2.0; -3.0", "-3.0"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_whose_model_another_one_steps_is_refused(tmp_path: pathlib.Path, target: str, method: str) -> None:
    first, second, weight = run(tmp_path, target, method, "2", "steps")
    refused = "the parameter 'param_groups[0][0]' lies in memory shared with other processes"[:64]
    assert (first.split("; ")[0], second.split("; ")[0]) == ("-1.0", refused)
    assert weight == first.split("; ")[-1] == "-3.0", "the other one goes on alone"


def test_changes_between_two_steps_are_followed_by_name(tmp_path: pathlib.Path, target: str) -> None:
    assert run(tmp_path, target, "fork", "2", "uploads") == ["-1.0; -3.0; -5.0", "-2.0; -4.0; -6.0", "-6.0"]
