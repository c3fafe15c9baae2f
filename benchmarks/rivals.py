"""Other packages' optimizers as `Form`s, where they are installed: each at a precision of its own.

They sum micro-gradients as autograd leaves them, in bf16, so none is exact; their rows carry their
error and say in words what they keep. `Missing` is raised where one cannot run: a run says that it
was skipped, and why.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .baselines import Form, Moved, PlainBF16, Plan


class Missing(RuntimeError):
    """A rival that this machine cannot run: not installed, or for another device."""


def imported(package: str) -> Any:
    """The package.

    Raises:
        Missing: where it is not installed, or does not import.
    """
    try:
        with warnings.catch_warnings():  # deprecations of theirs
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except Exception as error:
        raise Missing(f"{package} cannot be imported ({error})") from error


class OptimiKahan(PlainBF16):
    """torch-optimi's AdamW: bf16 states, and what rounding lost in a third (Kahan summation)."""

    precision = "bf16 sum, bf16 states, bf16 parameters with Kahan compensation"
    held = 12
    moved = Moved(first=4, later=6, norm=2, step=18, clip=4)

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = imported("optimi").AdamW(
            self.params, kahan_sum=True, **plan.adamw()
        )
        return optimizer

    def values(self) -> list[Tensor]:
        lost = (self.optimizer.state[p]["kahan_comp"] for p in self.params)
        return [p.detach().float() + c.float() for p, c in zip(self.params, lost, strict=True)]


class FlashOptim24(PlainBF16):
    """flashoptim's FlashAdamW as it comes: 24-bit masters, 8-bit states."""

    precision = "bf16 sum, 8-bit states, 24-bit masters"
    held = 8
    moved = Moved(first=4, later=6, norm=2, step=12, clip=4)

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        if not params[0].is_cuda:
            raise Missing("flashoptim's 24-bit masters and 8-bit states need a CUDA GPU")
        super().__init__(params, plan)

    def make(self, plan: Plan) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = imported("flashoptim").FlashAdamW(
            self.params, **plan.adamw()
        )
        return optimizer

    def values(self) -> list[Tensor]:
        join = imported("flashoptim").reconstruct_fp32_param
        state = self.optimizer.state
        return [join(p.detach(), state[p]["error_bits"]) for p in self.params]


RIVALS: dict[str, type[Form]] = {"optimi_kahan": OptimiKahan, "flashoptim_24": FlashOptim24}
