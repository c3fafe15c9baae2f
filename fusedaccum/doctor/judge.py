"""torch.optim in float64, beside something that accumulates and steps in its own way.

What trains is run next to it, window by window, and judged: `doctor` judges the wrapper, `bench`
and the repository's benchmarks judge each form before they time it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .checks import U, host, require_close

Make = Callable[[Any], torch.optim.Optimizer]


class Judge:
    """The exact parameters.

    Args:
        params: where they start.
        make: makes the optimizer.
        max_norm: of the mean gradient; None: it is not clipped.

    Attributes:
        exact: the parameters, float64, on the CPU.
        moved: the sum of the magnitudes of each parameter's updates.
        grad_error: relative L2 error of the mean gradient, the largest of all windows.
    """

    def __init__(self, params: Sequence[Tensor], make: Make, max_norm: float | None) -> None:
        self.exact = [host(p).requires_grad_() for p in params]
        self.start = [p.detach().clone() for p in self.exact]
        self.moved = [torch.zeros_like(p) for p in self.start]
        self.optimizer, self.max_norm = make(self.exact), max_norm
        self.grad_error = 0.0

    def zeros(self) -> list[Tensor]:
        """For the mean gradient of a window."""
        return [torch.zeros_like(p) for p in self.start]

    def update(self, means: Sequence[Tensor], own: Sequence[Tensor] | None = None) -> float:
        """Clip and step.

        Args:
            means: the mean gradient of the window.
            own: the same as it was accumulated. It is judged here, and the step is made by it, so
                that no cancellation in it is held against the step; None: by `means`.

        Returns:
            The norm.
        """
        grads = means if own is None else [host(grad) for grad in own]
        self.grad_error = max(self.grad_error, relative(grads, means, means))
        before = [p.detach().clone() for p in self.exact]
        for param, grad in zip(self.exact, grads, strict=True):
            param.grad = grad
        limit = torch.inf if self.max_norm is None else self.max_norm
        norm = float(clip_grad_norm_(self.exact, limit))
        self.optimizer.step()
        for total, new, old in zip(self.moved, self.exact, before, strict=True):
            total += (new.detach() - old).abs()
        return norm

    def changes(self) -> list[Tensor]:
        """What all updates changed."""
        return [p.detach() - old for p, old in zip(self.exact, self.start, strict=True)]

    def update_error(self, values: Sequence[Tensor]) -> float:
        """Relative L2 error of what all updates changed."""
        exact = [p.detach() for p in self.exact]
        return relative([host(value) for value in values], exact, self.changes())

    def require(
        self, params: Sequence[Tensor], values: Sequence[Tensor], allowed: Sequence[Tensor]
    ) -> None:
        """Raise unless `values`, the parameters as precisely as they are kept, are right, and the
        parameters are these rounded.

        Args:
            allowed: errors of the values, in roundings of fp32.
        """
        for param, value, right, bound in zip(params, values, self.exact, allowed, strict=True):
            require_close("precise parameter", host(value), right.detach(), bound * U)
            # A split master's parameter is the nearest too, but a tie goes up and not to even.
            half = torch.finfo(param.dtype).eps / 2 * 1.01 * host(value).abs() + 2.0**-25
            require_close("parameter", host(param), host(value), half)


def relative(got: Sequence[Tensor], right: Sequence[Tensor], of: Sequence[Tensor]) -> float:
    """L2 norm of got - right, relative to that of `of`."""
    differences = [a - b for a, b in zip(got, right, strict=True)]
    return _norm(differences) / _norm(of)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())
