"""What stays out of compiled graphs, said without loading the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def uncompiled(function: AnyFunction) -> AnyFunction:
    """`torch.compiler.disable`, but that loads the compiler where it decorates: a second, wherever a model is used.

    What torch's own optimizers are decorated with does so at the first call, and only there.
    """
    lazily: Callable[[AnyFunction], AnyFunction] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return lazily(function)
