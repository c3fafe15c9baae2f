"""fusedaccum as `Form`s: its operations alone, and the optimizer wrapper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import FusedAccumOptimizer, backends
from ..backends import Add, Finalize, Keep, Step, StepTensor, UpdateScalars
from ..doctor.sums import cells_of
from ..doctor.windows import deliver
from .forms import Form, Moved, Plan, leaves, nbytes


class Ours(Form):
    """What ours share: the last micro-batch leaves the norm, the step clips in registers."""

    name = "fusedaccum"
    precision = "fp32 sum, fp32 states, fp32-precise split masters"

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        self.plan, self.params = plan, leaves(params)
        size = params[0].element_size()
        master = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}[params[0].dtype]
        step = 2 * (size + master) + 4 + 8 * plan.n_states()
        self.moved = Moved(size + 4, size + 8, 0, 0, step)
        self.master_bytes = master * sum(p.numel() for p in params)


class Operations(Ours):
    """The launches alone, without hooks and bookkeeping."""

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, plan)
        device, n_tensors = params[0].device, len(params)
        rule, self.group = plan.rule(), plan.group()
        self.backend = backends.get(plan.backend, device)
        self.accs = [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self.cells, n_chunks = cells_of(params)
        self.partials = torch.zeros(n_chunks, dtype=torch.float32, device=device)
        keep = Keep.of(None, params[0].dtype)
        if keep is Keep.SPLIT:
            self.masters = [torch.zeros_like(p, dtype=torch.int16) for p in params]
        else:
            self.masters = [p.float() for p in params if keep is Keep.FP32]
        family = rule.family
        self.scalars = UpdateScalars(n_tensors, family.n_scalars, device, len(family.memory))
        self.request = Step(rule, keep, [], self.scalars)
        for row, (param, acc) in enumerate(zip(self.params, self.accs, strict=True)):
            states = tuple(
                torch.full_like(acc, rule.start(name, self.group)) for name in rule.states
            )
            master = self.masters[row] if self.masters else None
            self.request.tensors.append(StepTensor(param, acc, states, row, 0, master))
        for column, (_, start) in enumerate(family.memory):
            self.scalars.memory[:, column] = start(self.group)

    @torch.no_grad()
    def _accumulate(self, grads: Sequence[Tensor], index: int, sums: Tensor | None) -> None:
        pairs = list(zip(self.accs, grads, strict=True))
        self.backend.accumulate(Add(pairs, 1 / self.plan.n, index == 0, sums, self.cells))

    def add(self, grads: Sequence[Tensor], index: int) -> None:
        self._accumulate(grads, index, None)

    def add_last(self, grads: Sequence[Tensor]) -> None:
        self._accumulate(grads, 1, self.partials)
        self.partials.double().sum().sqrt().float()

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self._accumulate(grads, index, self.partials if index == self.plan.n - 1 else None)

    @torch.no_grad()
    def finalize(self, max_norm: float | None) -> None:
        """Norm, clip coefficient, skip flag, step counts and the rule's scalars."""
        request = Finalize(
            [self.request],
            hyper=[(1.0, *self.request.rule.family.hyper(self.group))],
            sums=None if max_norm is None else self.partials,
            max_norm=max_norm,
            skip_nonfinite=True,
        )
        self.backend.finalize(request)

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
        if self.request.keep is not Keep.SPLIT:
            return self.masters or super().values()
        # join_master of backends/reference.py, spelled out: this file must not grade itself.
        bits = (
            (p.detach().view(torch.int16).int() << 16) + remainder.int()
            for p, remainder in zip(self.params, self.masters, strict=True)
        )
        return [b.view(torch.float32) for b in bits]

    def held(self) -> int:
        states = [t for tensor in self.request.tensors for t in tensor.states]
        return nbytes([*self.params, *self.masters, *self.accs, *states])


class Wrapper(Ours):
    """FusedAccumOptimizer in the training loop of its README, gradients through its hooks."""

    has_operations = False

    def __init__(self, params: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(params, plan)
        self.optimizer = FusedAccumOptimizer(
            plan.plain(self.params),
            plan.n,
            max_grad_norm=plan.max_norm,
            backend=plan.backend,
        )

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        self.optimizer.zero_grad()
        self.deliver(grads)
        self.optimizer.step()

    def deliver(self, grads: Sequence[Tensor]) -> None:
        """Bring the gradients of a micro-batch to the parameters."""
        deliver(self.params, grads)

    def update(self) -> None:
        """The last micro-batch has done it."""

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def values(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return [state[i].get("master_param", p.detach()) for i, p in enumerate(self.params)]

    def held(self) -> int:
        # state_dict() makes whole masters; what is kept of one is its other bytes.
        entries = self.optimizer.state_dict()["state"].values()
        states = [t for entry in entries for name, t in entry.items() if name != "master_param"]
        return nbytes([*self.params, *self.grads(), *states]) + self.master_bytes
