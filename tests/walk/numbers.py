"""The optimizers of a walk, and how far fp32 arithmetic may take them from float64.

u = 2**-24. A gradient that is summed from k terms is off by gamma(k + 4) times the sum of their
magnitudes (`tests/tolerances.py`). An update carries that on times the rule's sensitivity, the
largest derivative of its step by the gradient, summed over the updates that still feel it; and it
rounds 32 times at most, each time relative to the parameter or to what it moved by. Options are
chosen so that sensitivities are small: a large eps, betas with few digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import NORM_RTOL, TINY, U, gamma
from tests.walk.helpers import Sub

__all__ = ["NORM_RTOL", "OPTIMIZERS", "TINY", "Kind", "U", "gamma", "half_step"]

ROUNDINGS = 32
Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Args:
        code: its class, as the script writes it.
        cls: its class.
        options: sets of options to draw from.
        sensitivity: largest change of all steps to come per change of one gradient, from a group.
        is_fused: whether it has a fused rule.
        changes: hyper-parameters that a walk may set in mid-run, with the values to draw from.
        is_2d: whether it takes matrices only.
        takes_empty: whether it takes parameters without elements.
    """

    code: str
    cls: type[torch.optim.Optimizer]
    options: tuple[Options, ...]
    sensitivity: Callable[[Options], float]
    is_fused: bool = True
    changes: Options = field(default_factory=dict)
    is_2d: bool = False
    takes_empty: bool = True


def _sgd(group: Options) -> float:
    return group["lr"] / (1 - max(group["momentum"], 0.9))


def _adam(group: Options) -> float:
    # m / (sqrt(v) + eps): e / eps, and e |m| / sqrt(v) / eps with |m| < 4 sqrt(v).
    return 10 * group["lr"] / group["eps"]


_LR = {"lr": (0.5, 0.25, 0.125, 0.0)}
_SMALL_LR = {"lr": (0.125, 0.0625, 0.03125, 0.0)}
# CUDA graphs take the rate as a tensor.
_SGD_LR = {"lr": (*_LR["lr"], torch.tensor(0.25))}
_ADAM_LR = {"lr": (*_SMALL_LR["lr"], torch.tensor(0.0625))}
_DECAY = {"weight_decay": (0.0, 0.25)}
_ADAM_CHANGES = {
    **_ADAM_LR,
    **_DECAY,
    "betas": ((0.75, 0.9), (0.5, 0.75)),
    "maximize": (False, True),
}
_SGD_CHANGES = {**_SGD_LR, **_DECAY, "momentum": (0.0, 0.5, 0.9), "maximize": (False, True)}
_ADAM = {"lr": 0.0625, "betas": (0.75, 0.9), "eps": 2.0**-8}


OPTIMIZERS = {
    "sgd": Kind(
        "torch.optim.SGD",
        torch.optim.SGD,
        (
            {"lr": 0.5},
            {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25},
            {"lr": 0.25, "momentum": 0.75, "dampening": 0.25},
            {"lr": 0.25, "momentum": 0.5, "nesterov": True},
        ),
        _sgd,
        changes=_SGD_CHANGES,
    ),
    "adamw": Kind(
        "torch.optim.AdamW",
        torch.optim.AdamW,
        ({**_ADAM, "weight_decay": 0.25}, {**_ADAM, "amsgrad": True}),
        _adam,
        changes=_ADAM_CHANGES,
    ),
    "adam": Kind(
        "torch.optim.Adam",
        torch.optim.Adam,
        ({**_ADAM, "amsgrad": True}, {**_ADAM, "weight_decay": 0.25}),
        _adam,
        changes=_ADAM_CHANGES,
    ),
    "nadam": Kind("torch.optim.NAdam", torch.optim.NAdam, (_ADAM,), _adam, changes=_SMALL_LR),
    "asgd": Kind(
        "torch.optim.ASGD",
        torch.optim.ASGD,
        ({"lr": 0.25, "t0": 2.0, "lambd": 0.125}, {"lr": 0.25, "weight_decay": 0.25}),
        lambda group: 2 * group["lr"],
        changes={**_LR, **_DECAY},
    ),
    "adagrad": Kind(
        "torch.optim.Adagrad",
        torch.optim.Adagrad,
        ({"lr": 0.25, "eps": 2.0**-4, "initial_accumulator_value": 0.5, "lr_decay": 0.25},),
        _adam,
        changes={**_SMALL_LR, **_DECAY},
    ),
    "adamax": Kind(
        "torch.optim.Adamax",
        torch.optim.Adamax,
        ({**_ADAM, "weight_decay": 0.25},),
        _adam,
        changes={**_SMALL_LR, **_DECAY},
    ),
    "radam": Kind("torch.optim.RAdam", torch.optim.RAdam, (_ADAM,), _adam, changes=_SMALL_LR),
    "rmsprop": Kind(
        "torch.optim.RMSprop",
        torch.optim.RMSprop,
        ({"lr": 0.0625, "alpha": 0.75, "eps": 2.0**-6, "momentum": 0.5},),
        _adam,
        changes=_SMALL_LR,
    ),
    "adafactor": Kind(
        "torch.optim.Adafactor",
        torch.optim.Adafactor,
        ({"lr": 0.125, "eps": (2.0**-6, 2.0**-8), "weight_decay": 0.25},),
        # The step is relative to the parameter's norm, which is less than 16 here.
        lambda group: 100 * group["lr"] * 16 / group["eps"][0],
        is_fused=False,
        changes=_SMALL_LR,
        takes_empty=False,
    ),
    "muon": Kind(
        "torch.optim.Muon",
        torch.optim.Muon,
        ({"lr": 0.125, "weight_decay": 0.25, "momentum": 0.5},),
        lambda group: 10 * group["lr"],
        is_fused=False,
        changes=_SMALL_LR,
        is_2d=True,
    ),
    "sub": Kind(
        "Sub",
        Sub,
        ({"lr": 0.5}, {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.25}),
        _sgd,
        is_fused=False,
        changes=_SGD_CHANGES,
    ),
}
try:
    import lion_pytorch
except ImportError:  # on a GPU machine that is taken as it is
    pass
else:
    OPTIMIZERS["lion"] = Kind(
        "lion_pytorch.Lion",
        lion_pytorch.Lion,
        ({"lr": 0.125, "betas": (0.75, 0.5), "weight_decay": 0.25},),
        lambda group: 0.0,
        changes={**_SMALL_LR, **_DECAY},
    )


def half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of rounding `values` to `dtype`."""
    if dtype == torch.float32:
        return torch.zeros_like(values)
    info = torch.finfo(dtype)
    return (values.abs() * (1 + info.eps)).clamp(min=info.tiny) * (info.eps / 2)


def unsure(
    kind: str, group: Options, state: Options, grad: Tensor, errors: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Where a rule is not continuous (Lion's sign, Muon's bf16), and by how much it may jump.

    Args:
        kind, group, state, grad: the update that is to come.
        errors: the largest of `grad`, and of the momentum before.

    Returns:
        The jumps, and the largest error of the momentum afterwards.
    """
    zero = torch.zeros_like(grad, dtype=torch.float64)
    if kind == "lion":
        momentum = state.get("exp_avg", zero)

        def mixed(beta: float) -> tuple[Tensor, Tensor]:
            parts = momentum * beta, grad * (1 - beta)
            rounded = ROUNDINGS * U * (parts[0].abs() + parts[1].abs()) + TINY
            return parts[0] + parts[1], errors[1] * beta + errors[0] * (1 - beta) + rounded

        value, error = mixed(group["betas"][0])
        # A sign that may be another one, or that of zero.
        return torch.where(value.abs() <= error, 2 * group["lr"], zero), mixed(group["betas"][1])[1]
    if kind == "muon":
        # Its Newton-Schulz steps run in bf16, whatever the gradient is.
        rows, columns = grad.shape
        return zero + 0.15 * group["lr"] * max(1.0, rows / columns) ** 0.5, zero
    return zero, zero
