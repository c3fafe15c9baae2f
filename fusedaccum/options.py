"""The settings of a `FusedAccumOptimizer`: checked once, and again where one is changed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer

from . import arguments


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

    def checked(self, optimizer: object, wrapper: type[Optimizer]) -> Options:
        """The same settings, validated for an optimizer to wrap.

        Raises:
            TypeError, ValueError: naming what was received and what is allowed.
        """
        steps = arguments.check_steps(self.gradient_accumulation_steps)
        max_norm = arguments.check_positive_or_none("max_grad_norm", self.max_grad_norm)
        arguments.check_optimizer(optimizer, wrapper, steps, max_norm)
        arguments.check_bool("skip_nonfinite", self.skip_nonfinite)
        bucket = self.bucket_cap_mb
        if bucket is not None:
            bucket = arguments.check_bucket(bucket)
        arguments.check_rounding(self.stochastic_rounding, self.seed, self.master_weights)
        arguments.check_scaler(self.grad_scaler, self.fused_unscale, steps)
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
