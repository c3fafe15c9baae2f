"""Validation of what users pass, with errors that name what was received and what is allowed."""

from __future__ import annotations

import inspect
import math
import operator

import torch
from torch.optim import Optimizer


def check_optimizer(optimizer: object, wrapper: type[Optimizer]) -> None:
    """Refuse what is no optimizer, and what cannot come out right, with the reason.

    Args:
        optimizer: what somebody wants to wrap.
        wrapper: the wrapping class.

    Raises:
        TypeError: for a wrapped wrapper and for something else than an optimizer.
        ValueError: for `differentiable=True` and for bitsandbytes' optimizers.
    """
    if isinstance(optimizer, wrapper):
        raise TypeError(
            f"this optimizer is a {wrapper.__name__} already; wrap its .optimizer instead"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            f"construct it first: {wrapper.__name__}(torch.optim.AdamW(model.parameters()))"
        )
    kind = type(optimizer)
    if kind.__module__.split(".")[0] == "bitsandbytes":
        raise ValueError(
            f"{kind.__module__}.{kind.__name__} cannot be wrapped: it chooses its kernel by the "
            "gradient's dtype alone, so an fp32 gradient of a bf16 parameter would make it treat "
            "the parameter's memory as fp32. Use torch.optim.AdamW here, or bitsandbytes unwrapped"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind.__name__}(differentiable=True) cannot be wrapped: the update is made in place "
            "behind autograd's back. Construct it with differentiable=False"
        )


def check_steps(steps: object) -> int | None:
    """Validate `gradient_accumulation_steps`."""
    advice = (
        "gradient_accumulation_steps must be an int >= 1 (the wrapper counts micro-batches) "
        "or None (every step() is an update)"
    )
    if steps is None:
        return None
    if isinstance(steps, bool):
        raise TypeError(f"{advice}, got {steps!r}")
    try:
        value = operator.index(steps)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{advice}, got {steps!r} of type {type(steps).__name__}") from None
    if value < 1:
        raise ValueError(f"{advice}, got {value}")
    return value


def check_weight(weight: object) -> float:
    """Validate the weight of a micro-batch."""
    try:
        value = float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(
            f"weight must be a positive number (the micro-batch's token count, say), "
            f"got {weight!r} of type {type(weight).__name__}"
        ) from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"weight must be positive and finite, got {value!r}; a micro-batch that counts for "
            "nothing (no tokens left after masking) is skipped by not running it"
        )
    return value


def check_positive(name: str, value: object) -> float:
    """Validate a positive number."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not number > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return number


def check_positive_or_none(name: str, value: object) -> float | None:
    """Validate a positive number that may be left out."""
    return None if value is None else check_positive(name, value)


def calls_closure(optimizer: Optimizer) -> bool:
    """Whether its step() must be given a closure, which it evaluates several times (LBFGS)."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def check_closure_optimizer(
    optimizer: Optimizer, steps: int | None, max_grad_norm: float | None
) -> None:
    """What an optimizer that evaluates the closure itself cannot be combined with.

    Raises:
        ValueError: naming the combination.
    """
    name = type(optimizer).__name__
    if steps is not None:
        raise ValueError(
            f"{name} evaluates its closure several times per step, so a window of "
            f"gradient_accumulation_steps={steps} cannot be counted; use None and accumulate the "
            "micro-batches inside the closure"
        )
    if any(p.dtype != torch.float32 for g in optimizer.param_groups for p in g["params"]):
        raise ValueError(
            f"{name} evaluates its closure between updates of the parameters, which must then be "
            "float32; got other dtypes"
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm cannot be applied between the evaluations of {name}; clip inside the "
            "closure"
        )
