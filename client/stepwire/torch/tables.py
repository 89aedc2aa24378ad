"""Parameters with sparse gradients: the meaning of a step for their rows, and those that are tables of the session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from stepwire.arrays.trees import expanded
from stepwire.client import RowSemantics
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Parameters
from stepwire.torch.rules import Group, TorchRule
from stepwire.torch.workers import aggregation_of

__all__ = ["SparseGradients"]

_DENSE: Final = frozenset({torch.strided})


class SparseGradients:
    """The way of an optimizer with sparse gradients."""

    def __init__(self, rule: TorchRule, options: RemoteOptions) -> None:
        """Decide for a rule and the options of an optimizer.

        Args:
            rule: the rule.
            options: the options.
        """
        self._rule = rule
        self._options = options

    def meaning(self, groups: Sequence[Group]) -> RowSemantics | None:
        """Return the meaning of a step for the rows of sparse gradients; None where they are refused.

        By default it is that of torch. Adagrad, and SGD without momentum, step the rows that came. SGD with momentum
        moves every row that ever came by its momentum, as a dense step does.

        Raises:
            UnsupportedFeatureError: the meaning has one sum a row, and torch's state one of each element.
        """
        meaning = self._options.row_semantics
        if meaning == "row_wise":
            raise UnsupportedFeatureError(
                "row_semantics: 'row_wise' keeps one sum a row, and torch's state has one of each element; use "
                "'torch_sparse', or RemoteEmbedding with this meaning",
                metadata={"field": "row_semantics", "feature": "torch_row_semantics"},
            )
        if meaning is not None or not self._rule.takes_rows:
            return meaning
        return "global" if self._rule.keeps_momentum(groups) else "torch_sparse"

    def by_rows(self, groups: Sequence[Group]) -> bool:
        """Tell whether parameters with sparse gradients are tables; `global` is a dense step, and needs none.

        Raises:
            UnsupportedFeatureError: as `meaning`.
        """
        return self.meaning(groups) not in (None, "global")

    def declare(self, parameters: Parameters, groups: Sequence[Group]) -> None:
        """Expect sparse gradients of the parameters that the options name.

        Raises:
            InvalidRequestError: a name is no parameter's and no module's, or sparse gradients are refused.
            UnsupportedFeatureError: as `meaning`, or the session has several workers.
        """
        meaning, names = self.meaning(groups), parameters.membership
        declared = list(expanded(self._options.tables, names, "."))
        for name in declared:
            if name not in names:
                raise InvalidRequestError.of("tables", f"{name!r} is the name of no parameter and no module")
            if meaning is None:
                raise InvalidRequestError.of("tables", f"{name!r} cannot be a table: {self._refusal}")
            self._check_alone(name, groups)
        parameters.expect_sparse(declared, by_rows=self.by_rows(groups))

    def tables(self, parameters: Parameters, groups: Sequence[Group]) -> dict[str, RowSemantics]:
        """Return the tables of a session, by name, with their meaning."""
        meaning = self.meaning(groups)
        return {} if meaning is None else dict.fromkeys(sorted(parameters.tables), meaning)

    def followed(self, parameters: Parameters, groups: Sequence[Group]) -> Parameters | None:
        """Expect sparse gradients of the parameters that have one for the first time.

        Returns:
            The same parameters with more tables, which need another session; None where the session may stay.

        Raises:
            InvalidRequestError: sparse gradients are refused; nothing was applied.
            UnsupportedFeatureError: as `meaning`, or the session has several workers.
        """
        gradients = [tensor.parameter.grad for tensor in parameters.tensors]
        if {gradient.layout for gradient in gradients if gradient is not None} <= _DENSE:
            return None
        known = parameters.sparse
        names = [t.name for t in parameters.tensors if t.name not in known and _is_sparse(t.parameter.grad)]
        if not names:
            return None
        if self.meaning(groups) is None:
            raise InvalidRequestError(
                f"the gradient of {names[0]!r} is sparse (torch.sparse_coo), and {self._refusal}",
                metadata={"field": f"gradients[{names[0]!r}]"},
            )
        self._check_alone(names[0], groups)
        self._check_movable(names[0], groups)
        by_rows = self.by_rows(groups)
        successor = parameters.regrouped(groups, by_rows=by_rows) if by_rows else parameters
        successor.expect_sparse(names, by_rows=by_rows)
        return successor if by_rows else None

    def _check_alone(self, name: str, groups: Sequence[Group]) -> None:
        """Refuse a table of several workers: a step sends back its own rows, and a model would lack those of others.

        Raises:
            UnsupportedFeatureError: there are several.
        """
        if self.by_rows(groups) and aggregation_of(self._options) is not None:
            raise UnsupportedFeatureError(
                f"{name!r} cannot be a table of several workers: a step sends back its own rows, and the model would "
                "lack those of the others; use row_semantics='global', or RemoteEmbedding",
                metadata={"field": "tables", "feature": "torch_tables"},
            )

    def _check_movable(self, name: str, groups: Sequence[Group]) -> None:
        """Refuse a table that comes late, and whose numbers of rows no state that moves has.

        Raises:
            UnsupportedFeatureError: the meaning has such numbers.
        """
        if (meaning := self.meaning(groups)) in ("row_counter", "skipped"):
            raise UnsupportedFeatureError(
                f"the gradient of {name!r} is sparse, and {name!r} no table yet; with row_semantics={meaning!r} name "
                "tables from the beginning, by tables=[…], as no state that moves has numbers of rows",
                metadata={"field": "tables", "feature": "torch_row_semantics"},
            )

    @property
    def _refusal(self) -> str:
        name = self._rule.optimizer.__name__
        return (
            f"{name} does not support sparse gradients, please consider SparseAdam instead; or name a meaning, such as "
            "row_semantics='torch_sparse' or 'global', or make the gradient dense, with Embedding(sparse=False)"
        )


def _is_sparse(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and gradient.layout == torch.sparse_coo
