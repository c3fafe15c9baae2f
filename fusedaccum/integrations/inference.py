"""Calls inside `torch.inference_mode()`: an evaluation that loads, logs or flushes makes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def leaves_inference(method: Callable[P, R]) -> Callable[P, R]:
    """Have a method make ordinary tensors: torch lets nobody write those of inference mode after
    it, and buffers are made once, by the first call that needs them."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call
