"""The sessions of a JAX program when it ends: those whose ids it has read stay, and the others end."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

import stepwire

pytest.importorskip("jax")

ROOT = pathlib.Path(__file__).parents[3]

PROGRAM = """
import sys, jax, jax.numpy as jnp, optax, stepwire.optax
params = {"w": jnp.ones(3)}

def trained(label, **options):
    tx = stepwire.optax.sgd(1.0, server=sys.argv[1], label=sys.argv[2] + label, **options)
    state = jax.jit(tx.update)(params, tx.init(params), params)[1]
    return tx, state

trained(" plain")
trained(" kept", keep=True)
tx, state = trained(" named")
print(tx.session(state).session_id, int(state.count))
"""


def test_a_program_that_ends_leaves_the_sessions_whose_ids_it_has_read_or_that_it_keeps(target: str) -> None:
    command = [sys.executable, "-c", PROGRAM, target, "jax"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    session_id, count = ended.stdout.split()
    with stepwire.connect(target) as client:
        left = {each.label: each.session_id for each in client.sessions() if each.label.startswith("jax ")}
        for each in left.values():
            client.session(each).close()
    assert (sorted(left), left.get("jax named"), count) == (["jax kept", "jax named"], session_id, "1")
