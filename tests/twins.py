"""A model trained by the wrapper, and beside it the plain optimizer on the exact mean gradient.

A twin model, never wrapped, takes the weights of ours at each window's start and gives the
micro-gradients of the same batches. Their weighted mean, in float64, goes to the plain optimizer on
float64 copies of the parameters. Both sides so see the same micro-gradients, however the forward
rounds, and the difference is bounded by what fp32 accumulation and the step round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.tolerances import STEP_ROUNDINGS, TINY, U, mean_bound

LR = 0.01
Loss = Callable[[Any, Any], Tensor]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9)


def adamw(params: Any) -> torch.optim.Optimizer:
    # A large eps: a gradient of almost nothing, where rounding is everything, moves little.
    return torch.optim.AdamW(params, lr=LR, eps=1e-3)


# By how much a gradient's error e can move the parameter, from that update to the end of the run.
# Momentum repeats it, lr / (1 - 0.9) e in all. Adam's step m / (sqrt(v) + eps) changes by no more
# than e / eps (1 + |m| / sqrt(v)), where |m| < 4 sqrt(v) in runs as short as these; the steps after
# it see that error again with weights that sum to no more than one.
SENSITIVITY = {sgd: 10 * LR, adamw: 2 * 5 * LR / 1e-3}


class Twins:
    """Both sides.

    Args:
        model: becomes ours; only parameters that require a gradient are trained.
        loss: of a model and a micro-batch.
        make: the optimizer, on either side.
        n: micro-batches per window, None where the loop owns it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Loss,
        make: Callable[[Any], torch.optim.Optimizer] = sgd,
        n: int | None = 4,
    ) -> None:
        self.ours, self.twin, self.loss, self.make = model, copy.deepcopy(model), loss, make
        self.exact: dict[str, Tensor] = {}
        self.bound: dict[str, Tensor] = {}
        self.updates = 0
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.opt = FusedAccumOptimizer(make(self.parameters(names)), n)
        self.plain = make(self.follow(names))

    def parameters(self, names: Iterable[str]) -> list[Tensor]:
        known = dict(self.ours.named_parameters())
        return [known[name] for name in names]

    def follow(self, names: Sequence[str]) -> list[Tensor]:
        """Float64 copies of our parameters."""
        made = []
        for name, p in zip(names, self.parameters(names), strict=True):
            self.exact[name] = torch.nn.Parameter(p.detach().double())
            self.bound[name] = torch.zeros_like(self.exact[name])
            made.append(self.exact[name])
        return made

    def add(self, change: Callable[[torch.nn.Module], None]) -> list[str]:
        """Change both models; train what is new in a param group of its own."""
        for model in (self.ours, self.twin):
            change(model)
        names = [
            name
            for name, p in self.ours.named_parameters()
            if p.requires_grad and name not in self.exact
        ]
        if names:
            self.opt.add_param_group({"params": self.parameters(names)})
            self.plain.add_param_group({"params": self.follow(names)})
        return names

    def window(self, batches: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        """One update on both sides; a window shorter than N is flushed."""
        self._follow(batches, weights or [1.0] * len(batches))
        loop_owned = self.opt.gradient_accumulation_steps is None
        for i, batch in enumerate(batches):
            if weights is None:
                share = len(batches) if loop_owned else 1
                (self.loss(self.ours, batch) / share).backward()
            else:
                with self.opt.micro_batch(weight=weights[i]):
                    self.loss(self.ours, batch).backward()
            if not loop_owned:
                self.opt.step()
                self.opt.zero_grad()
        if loop_owned:
            self.opt.step()
            self.opt.zero_grad()
        elif not self.opt.window_closed:
            self.opt.flush()
            self.opt.zero_grad()
        assert self.opt.window_closed and self.opt.micro_batches == 0

    def _follow(self, batches: Sequence[Any], weights: Sequence[float]) -> None:
        theirs = dict(self.twin.named_parameters())
        with torch.no_grad():
            for name, p in self.ours.named_parameters():
                theirs[name].copy_(p)
        terms: dict[str, list[Tensor]] = {name: [] for name in self.exact}
        for weight, batch in zip(weights, batches, strict=True):
            self.twin.zero_grad()
            self.loss(self.twin, batch).backward()
            for name, seen in terms.items():
                grad = theirs[name].grad
                if grad is not None:
                    seen.append(grad.double() * (weight / sum(weights)))
        self.updates += 1
        before = {name: p.detach().clone() for name, p in self.exact.items()}
        for name, seen in terms.items():
            self.exact[name].grad = torch.stack(seen).sum(0) if seen else None
        self.plain.step()
        for name, seen in terms.items():
            moved = (self.exact[name].detach() - before[name]).abs()
            self.bound[name] += STEP_ROUNDINGS * U * (before[name].abs() + 2 * moved)
            if seen:
                magnitudes = torch.stack([t.abs() for t in seen]).sum(0)
                error = mean_bound(magnitudes, len(batches))
                self.bound[name] += SENSITIVITY[self.make] * error + TINY

    def violation(self) -> float:
        """Largest error in units of the bound: at most 1 where the law holds."""
        entries = self.opt.state_dict()["state"]
        params = [p for group in self.opt.param_groups for p in group["params"]]
        masters = {p: entries.get(i, {}).get("master_param", p) for i, p in enumerate(params)}
        worst = 0.0
        for name, p in self.ours.named_parameters():
            if name in self.exact:
                error = (masters[p].detach().double() - self.exact[name].detach()).abs()
                worst = max(worst, float((error / (self.bound[name] + TINY)).max()))
        return worst
