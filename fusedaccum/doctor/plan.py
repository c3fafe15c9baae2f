"""What is trained, and how: the optimizer, its windows, clipping and the rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from ..rules import registry
from ..rules.rule import Rule

# The optimizers of torch.optim that have a rule here.
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adamw": (optim.AdamW, {"weight_decay": 0.1}),
    "adam": (optim.Adam, {}),
    "adadelta": (optim.Adadelta, {}),
    "adagrad": (optim.Adagrad, {}),
    "adamax": (optim.Adamax, {}),
    "asgd": (optim.ASGD, {}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {}),
    "rmsprop": (optim.RMSprop, {}),
    "rprop": (optim.Rprop, {}),
    "sgd": (optim.SGD, {"momentum": 0.9}),
}
# Where torch has one kernel for the whole step.
FUSED = {"cuda": ("adamw", "adam", "sgd"), "cpu": ("adamw", "adam", "sgd", "adagrad")}


@dataclass(frozen=True)
class Plan:
    """The optimizer, N micro-batches per window, clipping, the rate.

    Attributes:
        max_norm: of a whole window; None: it does not clip.
        backend: fusedaccum's.
    """

    optimizer: str = "adamw"
    n: int = 8
    max_norm: float | None = 1.0
    lr: float = 1e-3
    backend: str | None = None

    def plain(self, params: Iterable[Tensor], **how: Any) -> optim.Optimizer:
        """The optimizer with torch's defaults, to be wrapped, or as the float64 reference."""
        kind, options = OPTIMIZERS[self.optimizer]
        return kind(params, lr=self.lr, **options, **how)  # type: ignore[call-arg]

    def best(self, params: list[Tensor]) -> optim.Optimizer:
        """The fastest of torch's implementations of it."""
        return self.plain(params, **{"fused" if self.is_fused(params[0]) else "foreach": True})

    def is_fused(self, like: Tensor) -> bool:
        """Whether torch has a fused step there, which reads and writes everything once."""
        return self.optimizer in FUSED.get(like.device.type, ())

    def group(self) -> dict[str, Any]:
        """A param group of the optimizer."""
        nothing = torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)
        return self.plain([nothing]).param_groups[0]

    def rule(self) -> Rule:
        """Our rule for it."""
        group = self.group()
        rule = registry.select(self.plain(group["params"]), group)
        assert rule is not None
        return rule

    def n_states(self) -> int:
        """Tensors of state per parameter."""
        return len(self.rule().states)
