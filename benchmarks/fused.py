"""`fusedaccum` as `Form`s: its operations alone, and the optimizer wrapper fed in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer, backends
from fusedaccum.backends.tables import count_chunks
from fusedaccum.doctor.windows import deliver
from fusedaccum.rules.builtin import RULES

from .baselines import NATIVE, Form, Moved, Plan, leaves
from .rivals import RIVALS


class FusedForm(Form):
    """What ours share: the last micro-batch leaves the norm, the step clips in registers."""

    precision = "fp32 sum, fp32 states, fp32-precise split masters"
    moved = Moved(first=6, later=10, norm=0, step=28, clip=0)
    held = 16


class FusedBackend(FusedForm):
    """The launches alone, without hooks and bookkeeping.

    Args:
        params, plan: as of every form.
        rule: the update; the others than AdamW are for single steps (`test_micro.py`).
        group: that rule's hyper-parameters, named as in a param group.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        plan: Plan,
        rule: str = "adam",
        group: dict[str, Any] | None = None,
    ) -> None:
        self.plan, self.params = plan, leaves(params)
        self.group = group or {**plan.adamw(), "decoupled_weight_decay": True}
        device, n_tensors = params[0].device, len(params)
        self.backend = backends.get(plan.backend, device)
        self.accs = [torch.empty_like(p, dtype=torch.float32) for p in params]
        counts = [count_chunks(p.numel()) for p in params]
        self.cells = [sum(counts[:i]) for i in range(n_tensors)]
        self.partials = torch.zeros(sum(counts), device=device)
        chosen = RULES[rule]
        self.kind = "none" if params[0].dtype == torch.float32 else "split"
        is_split = self.kind == "split"
        self.masters = [torch.zeros_like(p, dtype=torch.int16) for p in params if is_split]
        self.batch = backends.StepBatch(
            chosen,
            self.kind,
            params=self.params,
            masters=self.masters,
            accs=self.accs,
            states=[
                tuple(torch.full_like(a, chosen.start(name, self.group)) for name in chosen.states)
                for a in self.accs
            ],
            rows=list(range(n_tensors)),
            groups=[0] * n_tensors,
        )
        family = chosen.family
        self.scalars = backends.UpdateScalars(
            n_tensors, family.n_scalars, device, len(family.memory)
        )
        for column, (_, start) in enumerate(family.memory):
            self.scalars.memory[:, column] = start(self.group)

    @torch.no_grad()
    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        partials = self.partials if index == self.plan.n - 1 else None
        self.backend.accumulate(self.accs, grads, 1 / self.plan.n, index == 0, partials, self.cells)

    def norm(self) -> Tensor:
        return self.partials.double().sum().sqrt().float()

    @torch.no_grad()
    def finalize(self) -> None:
        """Norm, clip coefficient, skip flag, step counts and the rule's scalars."""
        family, max_norm = self.batch.rule.family, self.plan.max_norm
        request = backends.UpdateRequest(
            family,
            hyper=[(1.0, *family.hyper(self.group))],
            partials=None if max_norm is None else self.partials,
            correction=1.0,
            max_norm=max_norm,
            skip_nonfinite=True,
        )
        self.backend.finalize(request, [self.batch], self.scalars)

    @torch.no_grad()
    def update(self) -> None:
        self.finalize()
        self.backend.step(self.batch, self.scalars)

    def mean_grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        if self.kind == "none":
            return [p.detach() for p in self.params]
        # join_master of backends/reference.py, spelled out: this file must not grade itself.
        bits = (
            (p.detach().view(torch.int16).int() << 16) + remainder.int()
            for p, remainder in zip(self.params, self.masters, strict=True)
        )
        return [b.view(torch.float32) for b in bits]


class FusedWrapper(FusedForm):
    """FusedAccumOptimizer in the training loop of its README, gradients through its hooks."""

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)
        self.optimizer = FusedAccumOptimizer(
            torch.optim.AdamW(self.params, **plan.adamw()),
            gradient_accumulation_steps=plan.n,
            max_grad_norm=plan.max_norm,
            backend=plan.backend,
        )

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self.optimizer.zero_grad()
        self.deliver(grads)
        self.optimizer.step()

    def deliver(self, grads: Sequence[Tensor]) -> None:
        """Bring a micro-batch's gradients to the parameters."""
        deliver(self.params, grads)

    def update(self) -> None:
        """The last micro-batch has done it."""

    def mean_grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def values(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return [state[i]["master_param"] for i in range(len(self.params))]


class FusedAssigned(FusedWrapper):
    """The wrapper, gradients assigned: `p.grad = g`, then `step()`."""

    def deliver(self, grads: Sequence[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad


FUSED: dict[str, type[Form]] = {
    "fused_backend": FusedBackend,
    "fused_hooks": FusedWrapper,
    "fused_assigned": FusedAssigned,
}
FORMS = {**FUSED, **NATIVE, **RIVALS}
