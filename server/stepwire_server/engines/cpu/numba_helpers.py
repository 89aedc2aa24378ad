"""Helpers of kernels, each compiled once a process however many kernels call it.

The text of a kernel's module has everything that the kernel calls, so that Numba can cache the machine code. Modules
share most helpers, and inferring the types of these lasts about as long as compiling the kernels' own loops. So equal
functions become one. Numba links the helper's code into every kernel, and its cache file holds the linked code.
"""

from __future__ import annotations

import builtins
import hashlib
import sys
import threading
import types
from typing import Any, Final

import numba
import numpy as np

from stepwire_server.engines.cpu.numba_module import HELPER_OPTIONS

__all__ = ["shared_helper"]

_made: Final[dict[tuple[Any, ...], Any]] = {}
_lock: Final = threading.Lock()


def shared_helper(function: types.FunctionType) -> Any:
    """Decorate a helper; functions of equal code, with equal globals, become one. The decorator `helper` of modules."""
    identity = _identity(function)
    with _lock:
        if identity not in _made:
            _made[identity] = numba.njit(**HELPER_OPTIONS)(_in_own_module(function, identity))
        return _made[identity]


def _in_own_module(function: types.FunctionType, identity: tuple[Any, ...]) -> types.FunctionType:
    """Return the function in a module of its own, whose name is made of its identity.

    Numba keeps the names of the modules of all helpers beside a kernel's machine code, and imports them when it loads
    that. The module of the kernel that came first in one process does not exist in another.
    """
    module = types.ModuleType(f"stepwire_helper_{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}")
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    module.__dict__.update(used, __builtins__=builtins)
    sys.modules[module.__name__] = module
    own = types.FunctionType(function.__code__, module.__dict__, function.__name__)
    own.__module__ = module.__name__
    return own


def _identity(function: types.FunctionType) -> tuple[Any, ...]:
    """Return all that decides the machine code of a function: its code, and the values of the names in it.

    It is the same in every process. A helper is defined after those that it calls, so each name of a helper has the
    shared one as its value.
    """
    code = function.__code__
    constants = repr(code.co_consts)  # which tells 1 from 1.0, and 0.0 from -0.0
    values = tuple(_value(function.__globals__.get(name)) for name in code.co_names)
    return function.__name__, code.co_code, constants, code.co_names, code.co_varnames, code.co_argcount, values


def _value(value: Any) -> Any:
    """Return a global by its elements where it is an array, which a module has a copy of, else by its full name."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if value is None:
        return None
    module = getattr(value, "__module__", "numpy")  # older ufuncs do not say theirs
    return module, getattr(value, "__qualname__", None) or value.__name__
