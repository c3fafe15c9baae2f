"""`fusedaccum` as `Form`s: its operations alone, and the optimizer wrapper fed in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer, backends
from fusedaccum.backends import Add, Finalize, Keep, Step, StepTensor, UpdateScalars
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
        self.keep = Keep.of(None, params[0].dtype)
        family = chosen.family
        self.scalars = UpdateScalars(n_tensors, family.n_scalars, device, len(family.memory))
        self.request = Step(chosen, self.keep, [], self.scalars)
        for row, (param, acc) in enumerate(zip(self.params, self.accs, strict=True)):
            dtype = self.keep.master_dtype
            master = torch.zeros_like(param, dtype=dtype) if dtype else None
            states = tuple(
                torch.full_like(acc, chosen.start(name, self.group)) for name in chosen.states
            )
            self.request.tensors.append(StepTensor(param, acc, states, row, 0, master))
        for column, (_, start) in enumerate(family.memory):
            self.scalars.memory[:, column] = start(self.group)

    @torch.no_grad()
    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        sums = self.partials if index == self.plan.n - 1 else None
        pairs = list(zip(self.accs, grads, strict=True))
        self.backend.accumulate(Add(pairs, 1 / self.plan.n, index == 0, sums, self.cells))

    def norm(self) -> Tensor:
        return self.partials.double().sum().sqrt().float()

    @torch.no_grad()
    def finalize(self) -> None:
        """Norm, clip coefficient, skip flag, step counts and the rule's scalars."""
        max_norm = self.plan.max_norm
        request = Finalize(
            [self.request],
            hyper=[(1.0, *self.request.rule.family.hyper(self.group))],
            sums=None if max_norm is None else self.partials,
            max_norm=max_norm,
            skip_nonfinite=True,
        )
        self.backend.finalize(request)

    @torch.no_grad()
    def update(self) -> None:
        self.finalize()
        self.backend.step(self.request)

    def mean_grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        if self.keep is Keep.PARAM:
            return [p.detach() for p in self.params]
        # join_master of backends/reference.py, spelled out: this file must not grade itself.
        bits = (
            (t.param.detach().view(torch.int16).int() << 16) + t.master.int()
            for t in self.request.tensors
            if t.master is not None
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
