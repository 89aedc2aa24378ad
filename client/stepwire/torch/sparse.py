"""torch's SparseAdam with the moments of its tables on a server: each step sends rows, and gets them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepwire.arrays.rows import Rows
from stepwire.client import RowSemantics
from stepwire.connection.errands import as_a_whole
from stepwire.errors import InvalidRequestError, Reason, UnsupportedFeatureError
from stepwire.optimizers import Adam
from stepwire.optimizers.gradient_treatment import NonFinite
from stepwire.session import Session
from stepwire.step_result import StepResult
from stepwire.torch.targets import Server, client_of

__all__ = ["SparseAdam", "rows_of_gradient"]

_SLOTS = ("exp_avg", "exp_avg_sq")
_COUNTING = ("row_counter", "skipped")


class SparseAdam(torch.optim.Optimizer):
    """`torch.optim.SparseAdam` for parameters with sparse gradients, such as those of `Embedding(sparse=True)`.

    The update is torch's. The moments have its bits where a row comes once, and parameters but for torch's own root,
    which is not always rounded correctly. Rows that come often are added up exactly here.

    Parameters stay in the model, and a step writes the rows that came. The server has parameters and moments in
    float32. A change of a parameter between steps is noticed by its version, and the whole table is loaded again.
    The rows of a step that failed are written by the next step, or by `state_dict`, if the server has applied it.

    Use another optimizer for the dense parameters of the same model, as with torch.
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        server: Server = None,
        semantics: RowSemantics = "torch_sparse",
        non_finite: NonFinite = "reject",
        timeout: float | None = None,
    ) -> None:
        """Create the session, with the present values of the parameters.

        Args:
            params: parameters, or groups of them; all have at least one dimension.
            lr: the learning rate. It, `betas` and `eps` of the groups are read in each step, so schedulers work.
            betas: the weights of the past in the moments.
            eps: beside the root of the second moment.
            maximize: ascend instead of descend.
            server: `host:port` or `unix:/path`, or a list of them, whose servers have ranges of rows each; or a client,
                which stays the caller's; None for that of `connect`.
            semantics: the meaning of a step for rows; see `Client.create_session`. `"global"` is not served: it moves
                rows that the model would not get back.
            non_finite: the policy for NaN and Inf in a gradient.
            timeout: seconds for a step, or another call, with all its repetitions; None for those of the client.

        Raises:
            InvalidRequestError: a parameter or a number is wrong.
            UnsupportedFeatureError: the meaning is `"global"`.
            StepwireError: as `Client.create_session`.
        """
        if semantics == "global":
            raise UnsupportedFeatureError(
                "semantics: 'global' moves all rows, and a step writes the rows that came; use RemoteEmbedding, or "
                "stepwire.torch.Adam with dense gradients",
                metadata={"field": "semantics", "feature": "sparse_rows"},
            )
        self._session: Session | None = None
        self._timeout = timeout
        self._versions: dict[str, int] = {}
        self._behind: dict[str, npt.NDArray[Any]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})
        self._semantics = semantics
        self._non_finite = non_finite
        self._client, is_own = client_of(server, timeout)
        self._owned = self._client if is_own else None
        try:
            self._session = self._created()
            self._follow()
        except BaseException:
            self.close()
            raise

    @property
    def session(self) -> Session:
        """The session of the tables.

        Raises:
            InvalidRequestError: the optimizer is closed.
        """
        if self._session is None:
            raise InvalidRequestError.of("optimizer", "it is closed; make another one")
        return self._session

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last step; None before the first."""
        return self.session.last_result

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, while the optimizer is made.

        Raises:
            InvalidRequestError: the session has its tables already.
        """
        if self._session is not None:
            raise InvalidRequestError.of("param_group", "the session has its tables; make an optimizer of all groups")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one step, exactly once; a parameter without a gradient keeps its moments and its t.

        Raises:
            InvalidRequestError: a gradient is dense, or of another form.
            StepwireError: as `Session.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        session, parameters = self.session, self._parameters()
        gradients = {
            name: None if parameter.grad is None else rows_of_gradient(parameter.grad, f"the gradient of {name!r}")
            for name, parameter in parameters.items()
        }
        came = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if came:
            if self._changed():
                self._catch_up()
                session.load(self._values(), timeout=self._timeout)
                self._follow()
            as_a_whole(lambda: self._applied(session, gradients, came))
        return loss

    def _applied(self, session: Session, gradients: dict[str, Rows | None], came: dict[str, Rows]) -> None:
        """Apply a step, and write the rows that it changed, and those that steps before it may have changed."""
        owed = self._behind
        indices = {name: np.asarray(rows.indices) for name, rows in came.items()}
        self._behind = indices | {name: np.union1d(rows, indices.get(name, rows)) for name, rows in owed.items()}
        reply = session.step(gradients, hyperparameters=self._numbers(), timeout=self._timeout)
        assert isinstance(reply, dict)
        if owed:
            reply = session.pull(rows=self._behind, timeout=self._timeout)
        self._write(reply)
        self._follow()

    def _catch_up(self) -> None:
        """Write the rows that steps which failed may have changed, but not into parameters that the user has changed.

        The stream is attached first: after that no step that failed is applied any more.
        """
        changed = self._changed()
        if rows := {name: indices for name, indices in self._behind.items() if name not in changed}:
            self.session.attach(timeout=self._timeout)
            self._write(self.session.pull(rows=rows, timeout=self._timeout))

    def _write(self, replied: Any) -> None:
        """Write rows into the parameters, each of which has them all or none of them."""
        for name, parameter in self._parameters().items():
            if (rows := replied.get(name)) is not None:
                indices = torch.from_numpy(rows.indices.astype(np.int64)).to(parameter.device)
                values = torch.from_numpy(rows.values).to(parameter.device, parameter.dtype)
                self._versions[name] = parameter._version + 1
                parameter.detach().index_copy_(0, indices, values)
                self._versions[name] = parameter._version
                self._behind.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, with the moments and the step counts of the server.

        Raises:
            StepwireError: as `Session.state`.
        """
        self._catch_up()
        saved: dict[str, Any] = super().state_dict()
        snapshot = self.session.state(timeout=self._timeout)
        saved["state"] = {
            index: {
                "step": snapshot.tensor_steps[name],
                **{slot: torch.from_numpy(snapshot.slots[slot][name].copy()) for slot in _SLOTS},
            }
            for index, name in enumerate(self._parameters())
            if snapshot.tensor_steps[name]
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, of this class or of torch's, in a new session with the parameters' present values.

        After an error the optimizer is as it was before.

        Raises:
            ValueError: the groups are others, or a moment has another shape.
            UnsupportedFeatureError: the state has moments, and `semantics` counts rows, whose numbers no state has.
            StepwireError: as `Client.create_session`, or `Session.load_state`.
        """
        if state_dict.get("state") and self._semantics in _COUNTING:
            raise UnsupportedFeatureError(
                f"state_dict: moments with semantics {self._semantics!r} belong to the numbers of their rows, which no "
                "state dict has; keep the session, or use 'torch_sparse'",
                metadata={"field": "state_dict", "feature": "sparse_rows"},
            )
        replaced, former, fresh = self.session, self.param_groups, None
        try:
            super().load_state_dict(state_dict)
            fresh = self._created()
            self._load_moments(fresh, dict(self.state))
        except BaseException:
            self.param_groups = former
            if fresh is not None:
                fresh.close()
            raise
        finally:
            self.state.clear()
        self._session = fresh
        self._follow()
        replaced.close()

    def _load_moments(self, session: Session, state: dict[Any, Any]) -> None:
        """Load torch's state of some parameters into a session that has none."""
        if not state:
            return
        names = {parameter: name for name, parameter in self._parameters().items()}
        snapshot = session.state(timeout=self._timeout)
        steps = dict(snapshot.tensor_steps)
        for parameter, own in state.items():
            steps[names[parameter]] = int(own["step"])
            for slot in _SLOTS:
                values = own[slot].to_dense().float().cpu().numpy()
                if values.shape != parameter.shape:
                    raise ValueError(f"{slot} of a parameter of shape {tuple(parameter.shape)} has {values.shape}")
                snapshot.slots[slot][names[parameter]][...] = values
        session.load_state(dataclasses.replace(snapshot, tensor_steps=steps), timeout=self._timeout)

    def close(self) -> None:
        """End the session, and the connection if it was made here. Closing twice is harmless."""
        session, self._session = self._session, None
        owned, self._owned = self._owned, None
        if session is not None:
            session.close()
        if owned is not None:
            owned.close()

    def __enter__(self) -> SparseAdam:
        """Use the optimizer for a block, and end its session after."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def _parameters(self) -> dict[str, Any]:
        """Return the parameters by the names that they have in the session."""
        listed = [parameter for group in self.param_groups for parameter in group["params"]]
        return {str(index): parameter for index, parameter in enumerate(listed)}

    def _values(self) -> dict[str, Any]:
        return {name: parameter.detach().float().cpu().numpy() for name, parameter in self._parameters().items()}

    def _created(self) -> Session:
        values, names = self._values(), iter(self._parameters())
        return self._client.create_session(
            values,
            optimizer=Adam(maximize=any(group["maximize"] for group in self.param_groups)),
            groups=[
                {"params": [next(names) for _ in group["params"]], **numbers}
                for group, numbers in zip(self.param_groups, self._numbers(), strict=True)
            ],
            tables=dict.fromkeys(values, self._semantics),
            missing_gradient="keep",
            non_finite=self._non_finite,
            timeout=self._timeout,
        )

    def _follow(self) -> None:
        """Note that the session has the present values of the parameters."""
        self._versions = {name: parameter._version for name, parameter in self._parameters().items()}
        self._behind = {}

    def _changed(self) -> frozenset[str]:
        """Return the parameters that the user has changed since the session had their values.

        A version that is ahead by one is of rows that an interrupt kept from being written.
        """
        ahead = {name: self._versions[name] - parameter._version for name, parameter in self._parameters().items()}
        return frozenset(name for name, by in ahead.items() if by and not (by == 1 and name in self._behind))

    def _numbers(self) -> Sequence[dict[str, Any]]:
        """Return the present numbers of each group."""
        return [
            {
                "lr": float(group["lr"]),
                "beta1": float(group["betas"][0]),
                "beta2": float(group["betas"][1]),
                "eps": float(group["eps"]),
                "maximize": bool(group["maximize"]),
            }
            for group in self.param_groups
        ]


def rows_of_gradient(gradient: Any, field: str) -> Rows:
    """Return a sparse gradient as rows, in float32, with repetitions as they are.

    Raises:
        InvalidRequestError: the gradient is dense, or not sparse along its first dimension alone.
    """
    if gradient.layout != torch.sparse_coo or gradient.sparse_dim() != 1:
        raise InvalidRequestError.of(
            field,
            f"layout {gradient.layout}; this optimizer steps rows of sparse gradients, such as those of "
            "Embedding(sparse=True); give dense parameters to another optimizer",
            reason=Reason.INVALID_TENSOR,
        )
    indices = gradient._indices()[0].cpu().numpy()
    return Rows(indices, gradient._values().detach().float().cpu().numpy())
