"""A table beside a transformation: JAX differentiates with respect to the rows of a batch, and a session steps them."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402

ROWS, WIDTH, LR = 6, 3, 0.1


def loss(params, rows, targets):  # type: ignore[no-untyped-def]
    return jnp.mean((rows @ params["w"] - targets) ** 2)


@pytest.mark.parametrize("meaning", ["torch_sparse", "row_counter", "skipped"])
def test_rows_of_a_batch_train_as_the_whole_table_does(client: stepwire.Client, meaning: str) -> None:
    """Ids come often in a batch, and the table as a whole is never in the program."""
    rng = np.random.default_rng(1)
    table, w = rng.standard_normal((ROWS, WIDTH)).astype(np.float32), jnp.ones(WIDTH)
    tx = stepwire.optax.sgd(LR, server=client)
    params, state = {"w": w}, tx.init({"w": w})
    whole = {"w": w, "table": jnp.asarray(table)}
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    options = {"optimizer": stepwire.SGD(lr=LR), "tables": {"table": meaning}}
    with client.create_session({"table": table}, **options) as session:
        for _ in range(3):
            ids, targets = rng.integers(0, ROWS, 5), rng.standard_normal(5).astype(np.float32)
            rows = session.pull(rows={"table": ids})["table"].values
            grads, row_grads = gradient(params, rows, targets)
            params, state = tx.step(params, grads, state)
            session.step({"table": stepwire.Rows(ids, row_grads)}, reply="none")
            local = jax.grad(lambda p, ids=ids, targets=targets: loss(p, p["table"][ids], targets))(whole)
            whole = jax.tree.map(lambda value, slope: value - LR * slope, whole, local)
        np.testing.assert_allclose(session.pull()["table"], whole["table"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(params["w"], whole["w"], rtol=1e-5, atol=1e-6)
    tx.close(state)
