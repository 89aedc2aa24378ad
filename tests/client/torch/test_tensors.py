"""One parameter as NumPy sees it: the memory itself where that can be, a copy beside it elsewhere."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn import Parameter

from stepwire.errors import InvalidRequestError
from stepwire.torch.tensors import ParameterTensor, from_numpy, to_numpy, touch, touch_in_place

BITS = [torch.float32, torch.float16, torch.bfloat16]


def wrapped(values: torch.Tensor) -> ParameterTensor:
    return ParameterTensor("w", Parameter(values))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_an_array_lies_where_its_tensor_does(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.5, -2.0, 0.0], dtype=dtype)
    array = to_numpy(tensor)
    array[1] = 3.0
    assert tensor.tolist() == [1.5, 3.0, 0.0]
    assert from_numpy(array).data_ptr() == tensor.data_ptr()
    assert (from_numpy(array).dtype, from_numpy(array).tolist()) == (dtype, [1.5, 3.0, 0.0])


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_a_contiguous_parameter_is_written_in_place(dtype: torch.dtype) -> None:
    tensor = wrapped(torch.zeros(2, 3, dtype=dtype))
    tensor.array()[0, 1] = 2.0
    assert tensor.parameter.tolist() == [[0.0, 2.0, 0.0], [0.0] * 3]
    assert tensor.shape == (2, 3)
    assert tensor.dtype == (ml_dtypes.bfloat16 if dtype is torch.bfloat16 else np.dtype(str(dtype)[6:]))


def test_one_with_other_strides_is_settled_from_its_copy() -> None:
    tensor = wrapped(torch.arange(6.0).reshape(2, 3).t())
    assert tensor.fetch().tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    tensor.array()[...] = [[9.0, 8.0], [7.0, 6.0], [5.0, 4.0]]
    assert tensor.parameter[0].tolist() == [0.0, 3.0]
    tensor.settle()
    assert tensor.parameter.tolist() == [[9.0, 8.0], [7.0, 6.0], [5.0, 4.0]]


def test_complex_numbers_are_pairs() -> None:
    tensor = wrapped(torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64))
    assert tensor.shape == (2, 2)
    assert tensor.fetch().tolist() == [[1.0, 2.0], [3.0, -4.0]]
    tensor.parameter.grad = torch.tensor([1 + 1j, 2 + 2j], dtype=torch.complex64).conj()
    gradient = tensor.gradient()
    assert gradient is not None
    assert gradient.tolist() == [[1.0, -1.0], [2.0, -2.0]]


def test_a_change_is_seen_until_it_is_followed() -> None:
    tensor = wrapped(torch.zeros(2, 2))
    assert tensor.changed
    tensor.follow()
    assert not tensor.changed
    with torch.no_grad():
        tensor.parameter.add_(1.0)
    assert tensor.changed
    tensor.follow()
    tensor.parameter.data = torch.zeros(2, 2)
    assert tensor.changed
    tensor.follow()
    tensor.parameter.data = tensor.parameter.data.t()
    assert tensor.changed
    touch([tensor])
    assert not tensor.changed


def test_a_parameter_that_becomes_a_lazy_view_is_refused() -> None:
    """Its memory is that of the other tensor's values, so what is written to a copy would be lost."""
    tensor = wrapped(torch.ones(2, dtype=torch.complex64))
    tensor.array()
    tensor.follow()
    tensor.parameter.data = tensor.parameter.data.conj()
    assert tensor.changed, "its address is what it was"
    with pytest.raises(InvalidRequestError, match="conjugates or negates another tensor by now"):
        tensor.array()


@pytest.mark.parametrize("takes_several", [True, False])
def test_a_touch_counts_as_a_change_to_autograd(takes_several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    increment = torch.autograd.graph.increment_version

    def increment_one(tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError("argument 'tensor' must be Tensor, not list")
        increment(tensor)

    if not takes_several:  # as older releases of torch
        monkeypatch.setattr(torch.autograd.graph, "increment_version", increment_one)
    tensors = [wrapped(torch.ones(2)), wrapped(torch.ones(3))]
    before = [tensor.parameter._version for tensor in tensors]
    touch(tensors)
    assert [tensor.parameter._version for tensor in tensors] == [version + 1 for version in before]
    assert not any(tensor.changed for tensor in tensors)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_a_contiguous_gradient_is_not_copied(dtype: torch.dtype) -> None:
    tensor = wrapped(torch.zeros(3, dtype=dtype))
    assert tensor.gradient() is None
    tensor.parameter.grad = torch.ones(3, dtype=dtype)
    gradient = tensor.gradient()
    assert gradient is not None
    assert np.shares_memory(gradient, to_numpy(tensor.parameter.grad))


def test_a_gradient_of_other_strides_is_copied_to_one_place() -> None:
    tensor = wrapped(torch.zeros(2, 3))
    seen: list[Any] = []
    for value in (1.0, 2.0):
        tensor.parameter.grad = torch.full((3, 2), value).t()
        seen.append(tensor.gradient())
        assert seen[-1].tolist() == [[value] * 3] * 2
    assert np.shares_memory(*seen)


def test_a_gradient_of_a_dtype_that_does_not_travel() -> None:
    tensor = wrapped(torch.zeros(2))
    if not hasattr(tensor.parameter, "grad_dtype"):
        pytest.skip("this torch has no gradients of other dtypes than their parameters'")
    tensor.parameter.grad_dtype = None
    tensor.parameter.grad = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(
        InvalidRequestError, match="the gradient of 'w' has dtype torch.float64; cast it to torch.float32"
    ):
        tensor.gradient()
    tensor.parameter.grad = torch.ones(2, dtype=torch.bfloat16)
    gradient = tensor.gradient()
    assert gradient is not None
    assert gradient.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("values", [torch.arange(6.0).reshape(2, 3), torch.tensor([1j, 2.0]), torch.tensor(3.0)])
def test_values_and_tensor_are_inverse(values: torch.Tensor) -> None:
    tensor = wrapped(values)
    array = tensor.values(values, "state")
    assert array.dtype == np.float32
    assert array.shape == tensor.shape
    assert torch.equal(tensor.tensor(array), values)


def test_values_of_another_shape_are_another_models() -> None:
    with pytest.raises(InvalidRequestError, match=r"state: shape \(3,\) is not the parameter's \(2,\)") as raised:
        wrapped(torch.zeros(2)).values(torch.zeros(3), "state")
    assert raised.value.metadata["field"] == "state"


def test_a_step_is_the_only_change_that_is_taken_for_its_own() -> None:
    tensor = wrapped(torch.zeros(3))
    tensor.follow()
    for _ in range(2):
        touch_in_place([tensor])
        assert not tensor.changed
    tensor.parameter.data = torch.ones(3)  # beside the step, whose reply has other values
    touch_in_place([tensor])
    assert tensor.changed
    tensor.follow()
    with torch.no_grad():
        tensor.parameter.add_(1.0)
    touch_in_place([tensor])
    assert not tensor.changed
    tensor.mark_changed()
    touch_in_place([tensor])
    assert not tensor.changed
