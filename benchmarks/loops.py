"""Training loops around the forms: a real forward and backward.

A loop makes a window of N micro-batches in the two calls that a `Form` has too: `micro_batch` for
each, then `update`. Without a form it is the forward and backward alone, which all loops pay for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusedaccum.bench.forms import Native, Plain
from fusedaccum.doctor.forms import Form, Wrapper
from fusedaccum.doctor.plan import Plan

from . import decoder

FLOOR = "floor"
LOOPS: dict[str, type[Form] | None] = {
    FLOOR: None,
    **{kind.name: kind for kind in (Plain, Native, Wrapper)},
}


class Loop:
    """A copy of a model, trained by a form.

    Args:
        kind: the form, which gets its parameters from the model; None: gradients are freed, nothing
            is accumulated.
    """

    def __init__(self, kind: type[Form] | None, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan, self.form = copy.deepcopy(model), plan, None
        self.params: list[Tensor] = list(self.model.parameters())
        if kind is not None:
            self.form = kind(self.params, plan)
            self.params = self.form.params
            decoder.adopt(self.model, self.params)

    @property
    def precision(self) -> str:
        """What it sums in and what it steps, in words."""
        return self.form.precision if self.form else "no accumulation, no update"

    def micro_batch(self, ids: Tensor, index: int) -> Tensor:
        """Forward, backward and accumulation of the index-th of N; returns the loss."""
        if self.form is None:
            loss = decoder.loss(self.model, ids)
            loss.backward()
            for param in self.params:
                param.grad = None
            return loss.detach()
        self.form.begin(index)
        loss = decoder.loss(self.model, ids)
        (loss / self.plan.n if self.form.loss_is_divided else loss).backward()
        self.form.end()
        return loss.detach()

    def update(self) -> None:
        """Clip and step."""
        if self.form is not None:
            self.form.update()

    def grads(self) -> list[Tensor]:
        """The mean gradient, after the last micro-batch and before `update()`."""
        return self.form.grads() if self.form else []

    def values(self) -> list[Tensor]:
        """The parameters as precisely as they are kept."""
        return self.form.values() if self.form else [p.detach() for p in self.params]

    def window(self, batches: Sequence[Tensor]) -> Tensor:
        """A whole window; returns the mean loss."""
        losses = [self.micro_batch(ids, index) for index, ids in enumerate(batches)]
        self.update()
        return torch.stack(losses).mean()
