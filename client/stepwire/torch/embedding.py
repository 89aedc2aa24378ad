"""Embeddings whose table lives on a server alone: a forward pass gets the rows that it needs, and a step sends theirs.

Neither the table nor its moments are ever in this process, so a table may be larger than its memory.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import numpy as np
import torch

from stepwire.arrays.rows import Rows, Table
from stepwire.client import Client, RowSemantics
from stepwire.connecting import connect
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.optimizers import Adam, Optimizer
from stepwire.session import Session
from stepwire.step_result import StepResult
from stepwire.torch.prefetch import PrefetchedRows

__all__ = ["RemoteEmbedding", "RemoteEmbeddingBag"]

_NAME = "weight"


class RemoteEmbedding(torch.nn.Module):
    """`torch.nn.Embedding` with its table on a server. It has no parameters: call `step` beside `optimizer.step`.

        embedding = RemoteEmbedding(100_000_000, 16, server="host:50051")
        loss(embedding(ids)).backward()
        embedding.step()

    Attributes:
        num_embeddings: the rows of the table.
        embedding_dim: the elements of a row.
        session: the session of the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        optimizer: Optimizer | None = None,
        semantics: RowSemantics = "torch_sparse",
        uniform_bound: float | None = None,
        seed: int = 0,
        hashed: bool = False,
        max_age_steps: int = 0,
        server: str | Client | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> None:
        """Have the server make a table.

        Args:
            num_embeddings: the number of rows.
            embedding_dim: the elements of a row.
            optimizer: the rule; default `Adam()`.
            semantics: the meaning of a step for rows; see `Client.create_session`.
            uniform_bound: the first values are uniform in [−bound, bound); default 1 / √embedding_dim.
            seed: the seed of the first values.
            hashed: True for ids below 2⁶³ in the place of indices; `num_embeddings` is then the capacity, and a row is
                made when a step first names its id. See `stepwire.Table`.
            max_age_steps: the steps without a row after which the row may be evicted; 0 for never.
            server: `host:port` or `unix:/path`, or a client, which stays the caller's; None for that of `connect`.
            timeout: seconds for a step, or a pull, with all its repetitions.
            options: further arguments of `Client.create_session`, such as `clip_grad_norm` or `durability`.

        Raises:
            StepwireError: as `Client.create_session`.
        """
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        bound = embedding_dim**-0.5 if uniform_bound is None else uniform_bound
        table = Table((num_embeddings, embedding_dim), semantics, bound, seed, hashed, max_age_steps)
        self._owned = None if isinstance(server, Client) else connect(server, timeout=timeout)
        client = server if isinstance(server, Client) else self._owned
        assert client is not None
        try:
            self.session: Session = client.create_session({_NAME: table}, optimizer=optimizer or Adam(), **options)
        except BaseException:
            if self._owned is not None:
                self._owned.close()
            raise
        self._gathered: list[tuple[Any, Any]] = []
        self._prefetched = PrefetchedRows(self.session, _NAME, moves_all=semantics == "global" or max_age_steps > 0)

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last step; None before the first."""
        return self.session.last_result

    def forward(self, input: Any) -> Any:
        """Return the rows of some indices, `(*input.shape, embedding_dim)`, each pulled once.

        Raises:
            StepwireError: as `Session.pull`.
        """
        rows, inverse = self._gather(input)
        return torch.nn.functional.embedding(inverse.reshape(input.shape), rows)

    def step(self, *, lr: float | None = None) -> StepResult | None:
        """Send the gradients of all rows since the last step, as one step; None where no row has one.

        Args:
            lr: the learning rate of this step; default the optimizer's.

        Raises:
            StepwireError: as `Session.step`. The rows stay: the same call again is the same step.
        """
        came = [(indices, rows.grad) for indices, rows in self._gathered if rows.grad is not None]
        if not came:
            self._gathered.clear()
            return None
        indices = np.concatenate([each.cpu().numpy() for each, _ in came])
        values = np.concatenate([gradient.float().cpu().numpy() for _, gradient in came])
        gradient = {_NAME: Rows(indices, values)}
        self._prefetched.step(indices, lambda: self.session.step(gradient, lr=lr, reply="none"))
        self._gathered.clear()
        return self.last_result

    def prefetch(self, input: Any) -> None:
        """Fetch the rows of the next batch in the background, while this one is computed and stepped.

        The next forward passes use them, until the next call, or until the second step from now. They have the values
        of a pull at that time: rows that a step touches are fetched again. Another client that steps the table
        meanwhile is not noticed.

        Args:
            input: the indices, of any shape; those that a pass needs besides are pulled as without this call.

        Raises:
            InvalidRequestError: they are no indices.
            UnsupportedFeatureError: the session has several workers.
        """
        self._prefetched.ask(_checked(input).cpu().numpy())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the rows since the last step."""
        self._gathered.clear()
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """End the session, and the connection if it was made here. Closing twice is harmless."""
        self._gathered.clear()
        self._prefetched.forget()
        self.session.close()
        if self._owned is not None:
            self._owned.close()

    def extra_repr(self) -> str:
        """Describe the table."""
        return f"{self.num_embeddings}, {self.embedding_dim}, session={self.session.own_id!r}"

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError(
            "a RemoteEmbedding is the door to a table on a server, and is not copied; make another one",
            metadata={"field": "embedding", "feature": "copy"},
        )

    def _gather(self, input: Any) -> tuple[Any, Any]:
        """Return the rows of some indices, each once, and the place of each index among them."""
        indices, inverse = torch.unique(_checked(input).reshape(-1), return_inverse=True)
        rows = torch.from_numpy(self._prefetched.rows(indices.cpu().numpy())).to(input.device)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            self._gathered.append((indices, rows))
        return rows, inverse


class RemoteEmbeddingBag(RemoteEmbedding):
    """`torch.nn.EmbeddingBag` with its table on a server; see `RemoteEmbedding`.

    Attributes:
        mode: the way that the rows of a bag become one: `"mean"`, `"sum"` or `"max"`.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, mode: Literal["mean", "sum", "max"] = "mean", **options: Any
    ) -> None:
        """Have the server make a table; `options` are those of `RemoteEmbedding`."""
        super().__init__(num_embeddings, embedding_dim, **options)
        self.mode = mode

    def forward(self, input: Any, offsets: Any = None, per_sample_weights: Any = None) -> Any:
        """Return one row for each bag: as `torch.nn.functional.embedding_bag`.

        Raises:
            StepwireError: as `Session.pull`.
        """
        rows, inverse = self._gather(input)
        return torch.nn.functional.embedding_bag(
            inverse.reshape(input.shape), rows, offsets, mode=self.mode, per_sample_weights=per_sample_weights
        )


def _checked(input: Any) -> Any:
    if input.dtype not in (torch.int64, torch.int32):
        raise InvalidRequestError.of("input", f"dtype {input.dtype}; indices of rows are int64 or int32")
    return input
