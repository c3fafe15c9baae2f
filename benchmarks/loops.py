"""Training loops around the forms of `fusedaccum.bench`: a real forward and backward.

A loop makes a window of N micro-batches in the two calls that a `Form` has too: `micro_batch` for
each, then `update`. `Loop` itself is the forward and backward alone, which every loop pays for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fusedaccum.bench import forms
from fusedaccum.bench.forms import Form, Plan
from fusedaccum.bench.ours import Wrapper

from . import decoder


class Loop:
    """Forward and backward; gradients are freed, nothing is accumulated.

    Attributes:
        is_exact: whether it sums in fp32 and steps fp32-precise weights.
        precision: the same in words.
        loss_is_divided: whether it divides the loss by N.
    """

    is_exact: ClassVar[bool] = False
    precision: ClassVar[str] = "no accumulation, no update"
    loss_is_divided: ClassVar[bool] = False

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = copy.deepcopy(model), plan
        self.params: list[Tensor] = list(self.model.parameters())

    def micro_batch(self, ids: Tensor, index: int) -> Tensor:
        """Forward, backward and accumulation of the index-th of N; returns the loss."""
        self.before(index)
        loss = decoder.loss(self.model, ids)
        (loss / self.plan.n if self.loss_is_divided else loss).backward()
        self.after()
        return loss.detach()

    def before(self, index: int) -> None:
        """What comes before a forward."""

    def after(self) -> None:
        """What comes after a backward."""
        for param in self.params:
            param.grad = None

    def update(self) -> None:
        """Clip and step."""

    def grads(self) -> list[Tensor]:
        """The mean gradient, after the last micro-batch and before `update()`."""
        return [p.grad for p in self.params if p.grad is not None]

    def values(self) -> list[Tensor]:
        """The parameters as precisely as they are kept."""
        return [p.detach() for p in self.params]

    def window(self, batches: Sequence[Tensor]) -> Tensor:
        """A whole window; returns the mean loss."""
        losses = [self.micro_batch(ids, index) for index, ids in enumerate(batches)]
        self.update()
        return torch.stack(losses).mean()


class Plain(Loop):
    """What most people run: everything in bf16."""

    precision = forms.Plain.precision
    loss_is_divided = True

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(model, plan)
        self.optimizer = plan.best(self.params)

    def after(self) -> None:
        """The gradients stay."""

    def update(self) -> None:
        if self.plan.max_norm is not None:
            clip_grad_norm_(self.params, self.plan.max_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


class FormLoop(Loop):
    """A loop whose model has a form's parameters, and whose update is the form's."""

    is_exact = True
    make: ClassVar[type[Form]]

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(model, plan)
        self.form = self.make(self.params, plan)  # type: ignore[call-arg]
        self.params = self.form.params
        decoder.adopt(self.model, self.params)

    def update(self) -> None:
        self.form.update()

    def grads(self) -> list[Tensor]:
        return self.form.grads()

    def values(self) -> list[Tensor]:
        return self.form.values()


class Native(FormLoop):
    """Stock torch in fp32: autograd adds bf16 into an fp32 `.grad`, AdamW steps fp32 masters."""

    make = forms.Native
    precision = forms.Native.precision
    loss_is_divided = True
    form: forms.Native

    def before(self, index: int) -> None:
        if index == 0:
            torch._foreach_zero_(self.form.accs)

    def after(self) -> None:
        """Autograd has added it."""


class Fused(FormLoop):
    """The wrapper, as its README says."""

    make = Wrapper
    precision = Wrapper.precision
    form: Wrapper

    def before(self, index: int) -> None:
        # First, and not last, so that `p.grad` shows the mean when the window is over.
        self.form.optimizer.zero_grad()

    def after(self) -> None:
        self.form.optimizer.step()


FLOOR = "floor"
LOOPS: dict[str, type[Loop]] = {
    FLOOR: Loop,
    "plain_bf16": Plain,
    "native_fp32": Native,
    "fused_hooks": Fused,
}
