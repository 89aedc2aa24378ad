"""The dtypes that travel, and their names on the wire."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import tensor_pb2
from stepwire.wire import dtypes

SERVED = {
    "float32": (np.dtype(np.float32), tensor_pb2.DTYPE_FLOAT32),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), tensor_pb2.DTYPE_BFLOAT16),
    "float16": (np.dtype(np.float16), tensor_pb2.DTYPE_FLOAT16),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_served_dtype_goes_both_ways(name: str) -> None:
    dtype, value = SERVED[name]
    assert dtypes.is_wire_dtype(dtype)
    assert dtypes.dtype_to_wire(dtype) == value
    assert dtypes.dtype_from_wire(value, np.dtype(np.float64), "f") == dtype


@pytest.mark.parametrize("name", SERVED)
def test_users_may_name_a_dtype_in_every_usual_way(name: str) -> None:
    dtype, _ = SERVED[name]
    assert dtypes.dtype_named(name, "f") is dtypes.dtype_named(dtype, "f")
    assert dtypes.dtype_named(dtype.type, "f") == dtype


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_do_not_travel(dtype: Any) -> None:
    assert not dtypes.is_wire_dtype(np.dtype(dtype))
    with pytest.raises(InvalidRequestError, match="reply_dtype: dtype .* cannot be sent; use one of float32"):
        dtypes.dtype_named(dtype, "reply_dtype")


@pytest.mark.parametrize("dtype", ["float99", "bf16", object(), "", ">f4"])
def test_what_is_no_wire_dtype_is_refused_by_name(dtype: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        dtypes.dtype_named(dtype, "gradient_dtype")
    assert refused.value.metadata == {"field": "gradient_dtype"}
    assert repr(dtype) in str(refused.value)


def test_an_unspecified_encoding_is_the_default() -> None:
    assert dtypes.dtype_from_wire(0, dtypes.FLOAT16, "f") is dtypes.FLOAT16


@pytest.mark.parametrize("value", [5, 99, -1])
def test_an_encoding_that_is_not_served_is_refused(value: int) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        dtypes.dtype_from_wire(value, dtypes.FLOAT32, "begin.reply.dtype")
    assert refused.value.reason is Reason.INVALID_CONFIG
    assert str(refused.value).startswith(f"begin.reply.dtype: encoding {value} is not served")


def test_blocks_of_8_bits_are_for_gradients_alone() -> None:
    value = tensor_pb2.DTYPE_INT8_BLOCKWISE
    assert dtypes.dtype_named("int8", "gradient_dtype", gradients=True) is dtypes.INT8
    assert dtypes.dtype_named(dtypes.INT8, "gradient_dtype", gradients=True) is dtypes.INT8
    assert dtypes.dtype_from_wire(value, dtypes.FLOAT32, "f", gradients=True) is dtypes.INT8
    assert dtypes.dtype_to_wire(dtypes.INT8) == value
    assert not dtypes.is_wire_dtype(dtypes.INT8), "no array of a user has it"
    here = "here, only as the encoding of gradients; use one of float32, bfloat16, float16$"
    with pytest.raises(InvalidRequestError, match=f"reply_dtype: dtype 'int8' cannot be sent {here}"):
        dtypes.dtype_named("int8", "reply_dtype")
    with pytest.raises(InvalidRequestError, match=f"open.dtype: encoding {value} is not served {here}"):
        dtypes.dtype_from_wire(value, dtypes.FLOAT32, "open.dtype")


@pytest.mark.parametrize("dtype", [np.int8, np.dtype(np.int8), "i1", np.uint8])
def test_the_dtype_of_numpy_is_not_the_encoding(dtype: Any) -> None:
    with pytest.raises(InvalidRequestError, match="use one of float32, bfloat16, float16, int8"):
        dtypes.dtype_named(dtype, "gradient_dtype", gradients=True)
    assert not dtypes.is_wire_dtype(np.dtype(dtype))


@pytest.mark.parametrize("name", SERVED)
def test_an_element_is_an_item(name: str) -> None:
    dtype, _ = SERVED[name]
    assert dtypes.wire_name(dtype) == name
    assert (dtypes.wire_items(dtype, 300), dtypes.wire_bytes(dtype, 300)) == (300, 300 * dtype.itemsize)
    assert (dtypes.elements_within(dtype, 4001), dtypes.wire_alignment(dtype)) == (4001 // dtype.itemsize, 1)


@pytest.mark.parametrize(("count", "blocks"), [(0, 0), (1, 1), (256, 1), (257, 2), (1 << 40, 1 << 32)])
def test_a_block_is_an_item(count: int, blocks: int) -> None:
    assert (dtypes.wire_items(dtypes.INT8, count), dtypes.wire_bytes(dtypes.INT8, count)) == (blocks, 260 * blocks)
    assert (dtypes.wire_name(dtypes.INT8), dtypes.wire_alignment(dtypes.INT8)) == ("int8", 256)
    assert dtypes.elements_within(dtypes.INT8, 260 * blocks + 259) == 256 * blocks
