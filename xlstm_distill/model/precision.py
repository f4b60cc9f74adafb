"""Autocast off where the precision of a product is part of what is computed."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Run `function` in the dtypes of its arguments, whatever autocast says where it is called (or its gradient is)."""

    @functools.wraps(function)
    def outside_autocast(*args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return outside_autocast  # type: ignore[return-value]
