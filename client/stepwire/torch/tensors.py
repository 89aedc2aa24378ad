"""A parameter of torch as a NumPy array: a view of its memory if possible, else a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from stepwire.arrays.rows import Rows
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.torch.sparse import rows_of_gradient

__all__ = [
    "Mark",
    "ParameterTensor",
    "from_numpy",
    "locations_of",
    "marks_of",
    "to_numpy",
    "touch",
    "touch_in_place",
    "version_of",
]

_DTYPES: Final = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float16: np.dtype(np.float16),
    torch.complex64: np.dtype(np.float32),
}
_NUMPY: Final = (np.dtype(np.float32), np.dtype(np.float16))
"""The dtypes that NumPy and torch have in common."""

_DEVICES: Final = ("cpu", "cuda")

Mark: TypeAlias = tuple[Any, ...]
"""A parameter's version, and the location of its values; see `marks_of`."""


class ParameterTensor:
    """One parameter, with the host memory of its values and its gradient.

    A contiguous parameter in host memory is read and written in place. A parameter on a GPU or with other strides has a
    contiguous copy in host memory, pinned for a GPU.

    Attributes:
        name: the name in the session.
        parameter: the user's parameter.
        shape: the shape in the session. Complex numbers are pairs in a last dimension of 2, as in torch's own
            optimizers.
        dtype: NumPy's dtype of the values.
        made_dense: a sparse gradient is read as a dense one, with zeros for the rows that did not come.
    """

    def __init__(self, name: str, parameter: Any) -> None:
        """Wrap a parameter.

        Raises:
            UnsupportedFeatureError: the parameter cannot be stepped by a server; the message has the reason and a
                remedy.
        """
        _check(name, parameter)
        self.name = name
        self.parameter = parameter
        self.shape: tuple[int, ...] = tuple(_real(parameter.detach()).shape)
        self.dtype = _DTYPES[parameter.dtype]
        self.made_dense = False
        self._is_numpys = self.dtype in _NUMPY
        self._location: tuple[object, ...] | None = None
        self._array: npt.NDArray[Any] = np.empty(0)
        self._direct = False
        self._copy: Any = None
        self._gradient_copy: Any = None
        self._seen: Mark | None = None

    @property
    def on_gpu(self) -> bool:
        """True for a parameter on a GPU, with asynchronous copies to and from the host."""
        return bool(self.parameter.is_cuda)

    def array(self, location: tuple[object, ...] | None = None) -> npt.NDArray[Any]:
        """Return the array that replies are written to: the parameter's own memory, or its copy.

        Args:
            location: the present location of the values; None to look.
        """
        if (location or self.location()) != self._location:
            if self.parameter.is_conj() or self.parameter.is_neg():  # what is written to it would be lost
                raise InvalidRequestError.of(
                    f"params[{self.name!r}]",
                    "it is a view that conjugates or negates another tensor by now; make a copy of it with "
                    "resolve_conj() or resolve_neg()",
                )
            real = _real(self.parameter.detach())
            self._direct = real.device.type == "cpu" and real.is_contiguous()
            if not self._direct:
                self._copy = _empty_like(real)
            self._array = to_numpy(real if self._direct else self._copy)
            self._location = self.location()
        return self._array

    def real(self) -> Any:
        """Return the parameter's memory as a tensor of real numbers that autograd does not follow."""
        return _real(self.parameter.detach())

    def fetch(self) -> npt.NDArray[Any]:
        """Return the parameter's present values. Values of a GPU are complete after a synchronisation."""
        array = self.array()
        if not self._direct:
            self._copy.copy_(_real(self.parameter.detach()), non_blocking=True)
        return array

    def settle(self) -> None:
        """Copy the values that were written to `array` into the parameter; `touch` tells of them."""
        if not self._direct:
            with torch.no_grad():
                _real(self.parameter.detach()).copy_(self._copy, non_blocking=True)

    def follow(self, mark: Mark | None = None) -> None:
        """Note that the session has the parameter's present values; `mark` is their mark, if it is known."""
        self._seen = mark or mark_of(self.parameter)

    def follow_version(self, version: int) -> None:
        """Note that the session has the present values, which one change has led to since the values of before."""
        if (seen := self._seen) is not None and version == seen[0] + 1:
            self._seen = version, *seen[1:]
        else:
            self.follow()

    def mark_changed(self) -> None:
        """Note that the session lacks the parameter's present values."""
        self._seen = None

    @property
    def changed(self) -> bool:
        """True if torch has counted a change of the parameter since `follow`; it counts no change through `.data`."""
        return self._seen != mark_of(self.parameter)

    @property
    def followed(self) -> Mark | None:
        """The mark of the values that the session has; None where it lacks the present ones."""
        return self._seen

    @property
    def followed_location(self) -> tuple[object, ...]:
        """The location of the values that the session has; that of the present ones where it lacks them."""
        return self.location() if self._seen is None else self._seen[1:]

    def location(self) -> tuple[object, ...]:
        """Return the place of the values in memory, and their form."""
        return locations_of((self.parameter,))[0]

    def gradient(self) -> npt.NDArray[Any] | None:
        """Return the gradient; None without one. Values of a GPU are complete after a synchronisation.

        Raises:
            InvalidRequestError: the gradient is sparse, on another device, or of a dtype that does not travel.
        """
        gradient = self.parameter.grad
        if gradient is None:
            return None
        if self._is_numpys and not self.parameter.is_cuda:
            try:  # what is neither sparse, nor elsewhere, nor conjugated or negated, nor followed by autograd
                array: npt.NDArray[Any] = gradient.numpy()
            except (RuntimeError, TypeError):
                pass
            else:
                if array.dtype == self.dtype and array.flags.c_contiguous:
                    return array
        if self.made_dense and gradient.layout == torch.sparse_coo:
            gradient = gradient.to_dense()
        self._check_gradient(gradient)
        real = _real(gradient.detach())
        if real.device.type == "cpu" and real.is_contiguous():
            return to_numpy(real)
        if self._gradient_copy is None or self._gradient_copy.dtype != real.dtype:
            self._gradient_copy = _empty_like(real)
        self._gradient_copy.copy_(real, non_blocking=True)
        return to_numpy(self._gradient_copy)

    def rows(self) -> Rows | None:
        """Return the gradient of a table by rows, with repetitions as they are; None without one.

        A dense gradient has every row.

        Raises:
            InvalidRequestError: as `gradient`, or a sparse gradient is not sparse along its first dimension alone.
        """
        gradient = self.parameter.grad
        if gradient is None or gradient.layout != torch.sparse_coo:
            dense = self.gradient()
            return None if dense is None else Rows(np.arange(len(dense)), dense)
        if gradient.sparse_dim() != 1 or gradient.dtype not in _DTYPES or gradient.is_complex():
            raise InvalidRequestError.of(
                f"gradients[{self.name!r}]",
                f"{gradient.sparse_dim()} sparse dimensions of {gradient.dtype}; a table takes rows of float32, "
                "bfloat16 or float16, such as those of Embedding(sparse=True)",
            )
        return rows_of_gradient(gradient, f"gradients[{self.name!r}]")

    def put_rows(self, rows: Rows) -> None:
        """Write rows of a reply into the parameter, as torch's optimizers do, and note the change as our own."""
        real, values = self.real(), np.ascontiguousarray(rows.values)
        indices = torch.from_numpy(np.asarray(rows.indices).astype(np.int64)).to(real.device)
        real.index_copy_(0, indices, from_numpy(values).to(real.device, real.dtype))
        self.follow()

    def _check_gradient(self, gradient: Any) -> None:
        if gradient.layout != torch.strided:
            problem = f"is sparse ({gradient.layout}); make it dense, with Embedding(sparse=False), or use SparseAdam"
        elif gradient.device != self.parameter.device:
            problem = f"is on {gradient.device} and the parameter on {self.parameter.device}; move the gradient there"
        elif gradient.dtype not in _DTYPES:
            problem = f"has dtype {gradient.dtype}; cast it to {self.parameter.dtype}"
        else:
            return
        raise InvalidRequestError(
            f"the gradient of {self.name!r} {problem}", metadata={"field": f"gradients[{self.name!r}]"}
        )

    def tensor(self, values: npt.NDArray[np.float32]) -> Any:
        """Return float32 values of the session's shape as a tensor of the parameter's shape, on its device."""
        made = torch.from_numpy(np.ascontiguousarray(values))
        if self.parameter.is_complex():
            made = torch.view_as_complex(made)
        return made.reshape(self.parameter.shape).to(self.parameter.device)

    def values(self, tensor: Any, field: str) -> npt.NDArray[np.float32]:
        """Return a tensor of the parameter's shape as float32 values of the session's shape; inverse of `tensor`.

        Raises:
            InvalidRequestError: the value is not a tensor, or has another shape.
        """
        if not isinstance(tensor, torch.Tensor):
            raise InvalidRequestError.of(field, f"{tensor!r:.60} is no tensor; the state is damaged, or no optimizer's")
        if tuple(tensor.shape) != tuple(self.parameter.shape):
            raise InvalidRequestError.of(
                field,
                f"shape {tuple(tensor.shape)} is not the parameter's {tuple(self.parameter.shape)}; the state is "
                "another model's",
            )
        given = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        real = _real(given).to(device="cpu", dtype=torch.float32).contiguous()
        return to_numpy(real).reshape(self.shape)


def marks_of(parameters: Sequence[Any]) -> list[Mark]:
    """Return the marks of parameters, which change with their values, but for changes that torch does not count.

    A mark is the parameter's version, and the location of its values: their address and form. Torch has no public name
    for the version, its count of changes in place.
    """
    return [(each._version, *at) for each, at in zip(parameters, locations_of(parameters), strict=True)]


def locations_of(tensors: Iterable[Any]) -> list[tuple[object, ...]]:
    """Return the place of the values of tensors in memory, and their form; with what torch does to them lazily.

    Raises:
        AttributeError: one is None.
        RuntimeError: one is sparse.
    """
    # The address alone would miss `parameter.data = parameter.data.t()`: the same memory in another order.
    return [(each.data_ptr(), each.dtype, each.shape, each.stride(), each.is_conj(), each.is_neg()) for each in tensors]


def mark_of(parameter: Any) -> Mark:
    """Return the mark of one parameter."""
    return marks_of((parameter,))[0]


def touch(tensors: Sequence[ParameterTensor]) -> None:
    """Tell autograd that parameters have changed, as torch's optimizers do, and note the changes as our own."""
    parameters = _counted(tensors)
    for tensor, mark in zip(tensors, marks_of(parameters), strict=True):
        tensor.follow(mark)


def touch_in_place(tensors: Sequence[ParameterTensor]) -> None:
    """Do as `touch`, to parameters that have not changed since they were followed, but for the changes of this step."""
    versions = [parameter._version for parameter in _counted(tensors)]
    for tensor, version in zip(tensors, versions, strict=True):
        tensor.follow_version(version)


def _counted(tensors: Sequence[ParameterTensor]) -> list[Any]:
    """Have autograd count a change of each parameter, and return the parameters."""
    parameters = [tensor.parameter for tensor in tensors]
    try:
        torch.autograd.graph.increment_version(parameters)
    except TypeError:  # older releases of torch take one tensor at a time
        for parameter in parameters:
            torch.autograd.graph.increment_version(parameter)
    return parameters


def version_of(tensor: Any) -> int:
    """Return torch's count of a tensor's changes in place."""
    version: int = tensor._version
    return version


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Return a contiguous tensor in host memory as an array over the same memory."""
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16
        array: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    array = tensor.numpy()
    return array


def from_numpy(array: npt.NDArray[Any]) -> Any:
    """Return a writable array as a tensor over the same memory; inverse of `to_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _real(tensor: Any) -> Any:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()


def _empty_like(like: Any) -> Any:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)


def _check(name: str, parameter: Any) -> None:
    """Refuse a parameter that this module would step wrong."""
    kinds = {kind.__name__ for kind in type(parameter).__mro__}
    if "DTensor" in kinds or "FlatParameter" in kinds or hasattr(parameter, "_is_flat_param"):
        problem = "is one rank's shard of a parameter (FSDP, DTensor); give the optimizer whole parameters"
    elif "UninitializedTensorMixin" in kinds:
        problem = "has no shape yet; run the model once before making the optimizer"
    elif hasattr(parameter, "__tensor_flatten__"):
        problem = f"is a {type(parameter).__name__}, whose values are not in one tensor; use plain parameters"
    elif parameter.layout != torch.strided:
        problem = f"is sparse ({parameter.layout}); make it dense"
    elif parameter.dtype not in _DTYPES:
        problem = (
            f"has dtype {parameter.dtype}, and a session has float32; cast the model, for example model.float(), or "
            "use torch.optim for it"
        )
    elif parameter.device.type not in _DEVICES:
        problem = f"is on the device {parameter.device}; move the model to the CPU or to a CUDA device first"
    elif parameter.is_conj() or parameter.is_neg():
        problem = "is a view that conjugates or negates another tensor; make a copy of it with resolve_conj()"
    elif any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        problem = "is expanded: several of its elements are one in memory; make a contiguous copy of it"
    else:
        return
    raise UnsupportedFeatureError(
        f"the parameter {name!r} {problem}", metadata={"field": f"params[{name!r}]", "feature": "torch_parameter"}
    )
