"""The settings of a `FusedAccumOptimizer`: checked once, and again where one is changed."""

from __future__ import annotations

import inspect
import math
import operator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from .rules import packages
from .rules.number import number

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

# What of a GradScaler the linked way reads and replaces.
OF_SCALER = "_scale _growth_tracker _unscale_grads_"
# Of a micro-batch: two of a window are then no further apart than fp32 reaches.
LEAST_WEIGHT = 1e-18


@dataclass(frozen=True)
class Options:
    """What `FusedAccumOptimizer` documents, under the same names."""

    gradient_accumulation_steps: int | None = None
    max_grad_norm: float | None = None
    master_weights: str | None = None
    skip_nonfinite: bool = True
    backend: str | None = None
    bucket_cap_mb: float | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    grad_scaler: torch.amp.GradScaler | None = None
    fused_unscale: bool = False
    process_group: ProcessGroup | None = None
    shard_states: bool = False

    def checked(self, optimizer: object, wrapper: type[Optimizer]) -> Options:
        """The same settings, validated for an optimizer to wrap.

        Raises:
            TypeError, ValueError: naming what was received and what is allowed.
        """
        steps = check_steps(self.gradient_accumulation_steps)
        max_norm = check_positive_or_none("max_grad_norm", self.max_grad_norm)
        check_optimizer(optimizer, wrapper, steps, max_norm)
        check_bool("skip_nonfinite", self.skip_nonfinite)
        bucket = self.bucket_cap_mb
        if bucket is not None:
            bucket = check_bucket(bucket)
        check_rounding(self.stochastic_rounding, self.seed, self.master_weights)
        check_scaler(self.grad_scaler, self.fused_unscale, steps)
        check_group(self.process_group)
        check_shards(self.shard_states, optimizer)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {"gradient_accumulation_steps": steps, "max_grad_norm": max_norm}
        return Options(**{**given, **own, "bucket_cap_mb": bucket})

    @property
    def wants_norm(self) -> bool:
        """Whether updates need the gradient's norm."""
        return self.skip_nonfinite or self.max_grad_norm is not None

    def as_arguments(self) -> dict[str, Any]:
        """What the constructor takes to make another one with the same settings."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def check_optimizer(
    optimizer: object, wrapper: type[Optimizer], steps: int | None, max_grad_norm: float | None
) -> None:
    """Refuse what is no optimizer, and what cannot come out right, with the reason.

    Args:
        optimizer: what somebody wants to wrap.
        wrapper: the wrapping class.
        steps, max_grad_norm: how.

    Raises:
        TypeError: for a wrapped wrapper and for something else than an optimizer.
        ValueError: for `differentiable=True` and for what `rules.packages` refuses.
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
    if reason := packages.refusal(optimizer):
        raise ValueError(f"{kind.__module__}.{kind.__name__} cannot be wrapped: {reason}")
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError(
            f"{kind.__name__} has no parameters: each of its {len(optimizer.param_groups)} param "
            "groups is empty; wrap it when it has some"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind.__name__}(differentiable=True) cannot be wrapped: the update is made in place "
            "behind autograd's back. Construct it with differentiable=False"
        )
    if calls_closure(optimizer):
        check_closure_optimizer(optimizer, steps, max_grad_norm)


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
    value = number(weight)
    if value is None:
        raise TypeError(
            f"weight must be a positive number (the micro-batch's token count, say), "
            f"got {weight!r} of type {type(weight).__name__}"
        )
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"weight must be positive and finite, got {value!r}; a micro-batch that counts for "
            "nothing (no tokens left after masking) is skipped by not running it. Where other "
            "processes would wait for it (FSDP2), run it with a loss of zero (0 * output.sum()) "
            "and a weight of 1e-6"
        )
    if not LEAST_WEIGHT <= value <= 1 / LEAST_WEIGHT:
        raise ValueError(
            f"weight must be from {LEAST_WEIGHT} to {1 / LEAST_WEIGHT}, got {value!r}: sums in "
            "fp32 hold no more. Only what weights are to each other counts, so multiply all of "
            "them by one number"
        )
    return value


def check_positive(name: str, value: object) -> float:
    """Validate a positive number."""
    found = number(value)
    if found is None or not found > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return found


def check_bool(name: str, value: object) -> bool:
    """Validate a flag."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_bucket(value: object) -> float:
    """Validate `bucket_cap_mb`."""
    size = check_positive("bucket_cap_mb", value)
    if not math.isfinite(size):
        raise ValueError(
            f"bucket_cap_mb must be a finite number of MiB, got {value!r}; leave it None for the "
            "default, or give what may wait beside the accumulators"
        )
    return size


def check_rounding(stochastic_rounding: object, seed: object, master_weights: str | None) -> None:
    """Validate `stochastic_rounding` and `seed`."""
    if check_bool("stochastic_rounding", stochastic_rounding) and master_weights != "none":
        raise ValueError(
            'stochastic_rounding=True is for master_weights="none" (with a master nothing is lost '
            f"in rounding), got master_weights={master_weights!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an int from 0 to 2**64 - 1, got {seed!r}")


def check_scaler(grad_scaler: object, fused_unscale: object, steps: int | None) -> None:
    """Validate `grad_scaler` and `fused_unscale`."""
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(
            f"grad_scaler must be a torch.amp.GradScaler or None, got {type(grad_scaler).__name__}"
        )
    # One that is not enabled has no scale, and nothing is asked of it.
    is_asked = grad_scaler is not None and grad_scaler.is_enabled()
    for name in OF_SCALER.split() if is_asked else ():
        if not hasattr(grad_scaler, name):
            raise TypeError(
                f"{type(grad_scaler).__name__} has no {name} in torch {torch.__version__}, by "
                "which grad_scaler= would reach its scale. Use gradient_accumulation_steps=None "
                "without grad_scaler=, divide the loss by N, and call scaler.step() once per window"
            )
    if check_bool("fused_unscale", fused_unscale) and (
        grad_scaler is not None or steps is not None
    ):
        raise ValueError(
            "fused_unscale=True is for gradient_accumulation_steps=None and a GradScaler that a "
            "framework keeps; with grad_scaler=scaler gradients are unscaled as they are added "
            f"already; got gradient_accumulation_steps={steps} and "
            f"grad_scaler={type(grad_scaler).__name__}"
        )


def check_group(group: object) -> None:
    """Validate `process_group`."""
    if group is None:
        return
    advice = (
        "process_group must be a torch.distributed.ProcessGroup that this process belongs to "
        "(torch.distributed.group.WORLD, after init_process_group()), or None"
    )
    if not torch.distributed.is_available():
        raise ValueError(f"{advice}; this build of torch has no torch.distributed")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{advice}, got {group!r} of type {type(group).__name__}")
    if torch.distributed.get_rank(group) < 0:
        raise ValueError(f"{advice}; got a group without this process")


def check_shards(shard_states: object, optimizer: Any) -> None:
    """Validate `shard_states`."""
    check_bool("shard_states", shard_states)
    if not shard_states:
        return
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "shard_states=True shares optimizer states out over processes, and there are none: "
            "call torch.distributed.init_process_group() first (torchrun starts processes), or "
            "leave shard_states out"
        )
    if calls_closure(optimizer) or callable(getattr(optimizer, "train", None)):
        raise ValueError(
            f"shard_states=True cannot serve {type(optimizer).__name__}, which looks at all "
            "parameters at once (a closure, or train() and eval()): leave shard_states out"
        )


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
