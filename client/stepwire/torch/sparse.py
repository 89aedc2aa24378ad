"""torch's SparseAdam with the moments of its tables on a server: each step sends rows, and gets them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stepwire.arrays.rows import Rows
from stepwire.client import Client, RowSemantics
from stepwire.connecting import connect
from stepwire.errors import InvalidRequestError, Reason
from stepwire.optimizers import Adam
from stepwire.optimizers.gradient_treatment import NonFinite
from stepwire.session import Session
from stepwire.step_result import StepResult

__all__ = ["SparseAdam", "rows_of_gradient"]

_SLOTS = ("exp_avg", "exp_avg_sq")


class SparseAdam(torch.optim.Optimizer):
    """`torch.optim.SparseAdam` for parameters with sparse gradients, such as those of `Embedding(sparse=True)`.

    The update is torch's. The moments have its bits where a row comes once, and parameters but for torch's own root,
    which is not always rounded correctly. Rows that come often are added up exactly here.

    Parameters stay in the model, and a step writes the rows that came. The server has parameters and moments in
    float32. A change of a parameter between steps is noticed by its version, and the whole table is loaded again.

    Use another optimizer for the dense parameters of the same model, as with torch.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        server: str | Client | None = None,
        semantics: RowSemantics = "torch_sparse",
        non_finite: NonFinite = "reject",
        timeout: float = 60.0,
    ) -> None:
        """Create the session, with the present values of the parameters.

        Args:
            params: parameters, or groups of them; all have at least one dimension.
            lr: the learning rate. It, `betas` and `eps` of the groups are read in each step, so schedulers work.
            betas: the weights of the past in the moments.
            eps: beside the root of the second moment.
            maximize: ascend instead of descend.
            server: `host:port` or `unix:/path`, or a client, which stays the caller's; None for that of `connect`.
            semantics: the meaning of a step for rows; see `Client.create_session`.
            non_finite: the policy for NaN and Inf in a gradient.
            timeout: seconds for a step with all its repetitions.

        Raises:
            InvalidRequestError: a parameter or a number is wrong.
            StepwireError: as `Client.create_session`.
        """
        self._session: Session | None = None
        self._versions: dict[str, int] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})
        self._semantics = semantics
        self._non_finite = non_finite
        self._owned = None if isinstance(server, Client) else connect(server, timeout=timeout)
        self._client = server if isinstance(server, Client) else self._owned
        try:
            self._session = self._created()
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
        if all(gradient is None for gradient in gradients.values()):
            return loss
        if any(parameter._version != self._versions[name] for name, parameter in parameters.items()):
            session.load(self._values())
        reply = session.step(gradients, hyperparameters=self._numbers())
        assert isinstance(reply, dict)
        for name, parameter in parameters.items():
            if (rows := reply[name]) is not None:
                indices = torch.from_numpy(rows.indices.astype(np.int64)).to(parameter.device)
                values = torch.from_numpy(rows.values).to(parameter.device, parameter.dtype)
                parameter.detach().index_copy_(0, indices, values)
        self._follow()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, with the moments and the step counts of the server."""
        saved: dict[str, Any] = super().state_dict()
        snapshot = self.session.state()
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

        Raises:
            ValueError: the groups are others.
            StepwireError: as `Client.create_session`, or `Session.load_state`.
        """
        super().load_state_dict(state_dict)
        state, names = dict(self.state), {parameter: name for name, parameter in self._parameters().items()}
        self.state.clear()
        replaced, self._session = self.session, self._created()
        replaced.close()
        snapshot = self._session.state()
        steps = dict(snapshot.tensor_steps)
        for parameter, own in state.items():
            steps[names[parameter]] = int(own["step"])
            for slot in _SLOTS:
                snapshot.slots[slot][names[parameter]][...] = own[slot].to_dense().float().cpu().numpy()
        if state:
            self._session.load_state(dataclasses.replace(snapshot, tensor_steps=steps))

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
        assert self._client is not None
        session = self._client.create_session(
            values,
            optimizer=Adam(maximize=any(group["maximize"] for group in self.param_groups)),
            groups=[
                {"params": [next(names) for _ in group["params"]], **numbers}
                for group, numbers in zip(self.param_groups, self._numbers(), strict=True)
            ],
            tables=dict.fromkeys(values, self._semantics),
            missing_gradient="keep",
            non_finite=self._non_finite,
        )
        self._follow()
        return session

    def _follow(self) -> None:
        """Note that the session has the present values of the parameters."""
        self._versions = {name: parameter._version for name, parameter in self._parameters().items()}

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
