"""The signature of an optimizer: torch's own, and the options of a session."""

from __future__ import annotations

import inspect

from stepwire.torch.options import RemoteOptions

__all__ = ["signature_of"]


def signature_of(cls: type, mixin: type) -> inspect.Signature:
    """Return torch's signature, followed by the names of `RemoteOptions`.

    Args:
        cls: the class of the optimizer.
        mixin: the class that makes an optimizer of torch's a remote one.
    """
    own = next((base for base in cls.__mro__ if not issubclass(base, mixin)), object)
    theirs = [
        parameter
        for name, parameter in inspect.signature(own.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    ours = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(RemoteOptions).parameters.values()
    ]
    return inspect.Signature([*theirs, *ours])
