"""fusedaccum's operations without its wrapper, and the wrapper fed in another way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedaccum import backends
from fusedaccum.backends import Add, Correction, Finalize, Keep, Step, StepTensor, UpdateScalars
from fusedaccum.doctor.forms import Bytes, Stepwise, Wrapper
from fusedaccum.doctor.plan import Plan
from fusedaccum.doctor.steps import precise
from fusedaccum.doctor.sums import sums_for


class Operations(Stepwise):
    """The launches alone, without hooks and bookkeeping."""

    name = "fused_backend"
    precision = Wrapper.precision

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, plan)
        device, rule, group = params[0].device, plan.rule(), plan.group()
        self.backend = backends.get(plan.backend, device)
        self.accs = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.sums, self.cells = sums_for(params)
        memory = rule.family.memory
        scalars = UpdateScalars(len(params), rule.family.n_scalars, device, len(memory))
        for column, (_, start) in enumerate(memory):
            scalars.memory[:, column] = start(group)
        self.hyper = [(1.0, *rule.family.hyper(group))]
        self.request = Step(rule, Keep.of(None, params[0].dtype), [], scalars)
        for row, (param, acc) in enumerate(zip(self.params, self.accs, strict=True)):
            states = tuple(torch.full_like(acc, rule.start(name, group)) for name in rule.states)
            master = None
            if self.request.keep is Keep.SPLIT:
                master = torch.zeros_like(param, dtype=torch.int16)
            elif self.request.keep is Keep.FP32:
                master = param.detach().float()
            self.request.tensors.append(StepTensor(param, acc, states, row, 0, master))

    @classmethod
    def bytes(cls, plan: Plan, like: Tensor) -> Bytes:
        return Wrapper.bytes(plan, like)

    @torch.no_grad()
    def _accumulate(self, grads: Sequence[Tensor], index: int, sums: Tensor | None) -> None:
        pairs = list(zip(self.accs, grads, strict=True))
        self.backend.accumulate(Add(pairs, 1 / self.plan.n, index == 0, sums, self.cells))

    def add(self, grads: Sequence[Tensor], index: int) -> None:
        self._accumulate(grads, index, None)

    def add_last(self, grads: Sequence[Tensor]) -> None:
        self._accumulate(grads, 1, self.sums)
        self.sums.double().sum().sqrt().float()

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self._accumulate(grads, index, self.sums if index == self.plan.n - 1 else None)

    @torch.no_grad()
    def finalize(self, max_norm: float | None) -> None:
        """Norm, clip coefficient, skip flag, step counts and the rule's scalars."""
        sums = None if max_norm is None else self.sums
        self.backend.finalize(
            Finalize([self.request], self.hyper, Correction(), sums, max_norm, skip_nonfinite=True)
        )

    @torch.no_grad()
    def step(self) -> None:
        self.finalize(None)
        self.backend.step(self.request)

    @torch.no_grad()
    def update(self) -> None:
        self.finalize(self.plan.max_norm)
        self.backend.step(self.request)

    def grads(self) -> list[Tensor]:
        return self.accs

    def values(self) -> list[Tensor]:
        return [precise(tensor) for tensor in self.request.tensors]


class Assigned(Wrapper):
    """The wrapper, gradients assigned: `p.grad = g`, then `step()`."""

    name = "fused_assigned"

    def deliver(self, grads: Sequence[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
