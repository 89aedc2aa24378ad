"""Embeddings whose table lives on a server alone: a forward pass gets the rows that it needs, and a step sends theirs.

Neither the table nor its moments are ever in this process, so a table may be larger than its memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from stepwire.arrays.rows import Rows, Table
from stepwire.client import RowSemantics
from stepwire.connection.errands import as_a_whole
from stepwire.errors import InvalidRequestError, StepMismatchError, StepwireError, UnsupportedFeatureError
from stepwire.optimizers import Adam, Optimizer
from stepwire.session import Session
from stepwire.step_result import StepResult
from stepwire.torch.prefetch import PrefetchedRows
from stepwire.torch.targets import Server, client_of
from stepwire.torch.workers import leave

__all__ = ["RemoteEmbedding", "RemoteEmbeddingBag"]

_NAME = "weight"


@dataclasses.dataclass(slots=True)
class _Step:
    """The gradients of one step.

    Attributes:
        indices: the indices of its rows, `(n,)` integers, with repetitions.
        values: their gradients, `(n, embedding_dim) float32`.
        lr: the learning rate; None for the optimizer's.
        in_doubt: True if the server may have applied it.
    """

    indices: npt.NDArray[Any]
    values: npt.NDArray[np.float32]
    lr: float | None
    in_doubt: bool = False


class _RowsOfPasses:
    """The rows of forward passes, until a step has been made of their gradients.

    Attributes:
        gathered: for each pass since the last step, the indices of its rows, and the rows, which have the gradients.
        collected: the step that has been collected, and was not made yet; None without one.
    """

    __slots__ = ("collected", "gathered")  # plain places: no interrupt arrives between two assignments to them

    def __init__(self) -> None:
        self.gathered: list[tuple[Any, Any]] = []
        self.collected: _Step | None = None

    def collect(self, lr: float | None, width: int, *, even_without: bool) -> None:
        """Make one step of all gradients there are, those of a step included that the server has not applied.

        Args:
            lr: the learning rate; None for the optimizer's.
            width: the elements of a row.
            even_without: make a step without rows, where there are none.
        """
        passes = [(indices, rows.grad) for indices, rows in self.gathered if rows.grad is not None]
        came = [(each.cpu().numpy(), gradient.float().cpu().numpy()) for each, gradient in passes]
        if (kept := self.collected) is not None:
            came.insert(0, (kept.indices, kept.values))
        if even_without and not came:
            came = [(np.empty(0, np.int64), np.empty((0, width), np.float32))]
        indices, values = ([pair[place] for pair in came] for place in (0, 1))
        step = _Step(np.concatenate(indices), np.concatenate(values), lr) if came else None
        self.gathered, self.collected = [], step

    def forget(self) -> None:
        """Forget all of them."""
        self.gathered, self.collected = [], None


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
        server: Server = None,
        timeout: float | None = None,
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
            server: `host:port` or `unix:/path`, or a list of them, whose servers have ranges of rows each; or a client,
                which stays the caller's; None for that of `connect`.
            timeout: seconds for a step, or another call, with all its repetitions; None for those of the client.
            options: further arguments of `Client.create_session`, such as `clip_grad_norm` or `durability`; for one of
                several workers `aggregation`, `worker` and `request_id`.

        Raises:
            StepwireError: as `Client.create_session`.
        """
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        bound = embedding_dim**-0.5 if uniform_bound is None else uniform_bound
        table = Table((num_embeddings, embedding_dim), semantics, bound, seed, hashed, max_age_steps)
        client, is_own = client_of(server, timeout)
        self._owned, self._timeout = client if is_own else None, timeout
        try:
            self.session: Session = client.create_session(
                {_NAME: table}, optimizer=optimizer or Adam(), timeout=timeout, **options
            )
        except BaseException:
            if self._owned is not None:
                self._owned.close()
            raise
        self._rows, self._is_closed = _RowsOfPasses(), False
        moves_all = semantics == "global" or max_age_steps > 0
        self._prefetched = PrefetchedRows(self.session, _NAME, timeout, moves_all=moves_all)

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

        One of several workers steps without rows too: the others need not wait.

        After an error the rows stay until `zero_grad`. If the outcome is unknown, that step is made first, as it was,
        and rows since then are the next step. Else all of them are one step.

        Args:
            lr: the learning rate of this step; default the optimizer's.

        Raises:
            StepMismatchError: another client stepped the table; the rows of a step whose outcome is unknown are lost.
            StepwireError: as `Session.step`; the same call again is the same step.
        """
        rows = self._rows
        result = self._sent() if rows.collected is not None and rows.collected.in_doubt else None
        others_wait = self.session.config.aggregation is not None and result is None
        rows.collect(lr, self.embedding_dim, even_without=others_wait)
        return self._sent() or result

    def _sent(self) -> StepResult | None:
        """Make the step that is collected, if there is one, and forget it as one with its reply."""
        if (collected := self._rows.collected) is None:
            return None

        def made() -> StepResult | None:
            gradient = {_NAME: Rows(collected.indices, collected.values)}
            step = functools.partial(self.session.step, gradient, lr=collected.lr, reply="none", timeout=self._timeout)
            self._prefetched.step(collected.indices, step)
            self._rows.collected = None
            return self.last_result

        collected.in_doubt = True
        try:
            return as_a_whole(made)
        except StepMismatchError:  # nobody can tell the outcome, so it is never repeated
            self._rows.collected = None
            raise
        except StepwireError:
            collected.in_doubt = self.session.statistics().step_in_doubt is not None
            raise

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
        self._rows.forget()
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """End the session, and the connection if it was made here. Closing twice is harmless.

        One of several workers leaves the session. The last one ends it, once all have been there.
        """
        self._rows.forget()
        self._prefetched.forget()
        if not self._is_closed:
            leave(self.session, keep=False)
        self._is_closed = True
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
            self._rows.gathered.append((indices, rows))
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
