"""From full accumulators to new weights: the fused step, or the wrapped optimizer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import Correction, Finalize, Keep, Step, StepTensor, UpdateScalars
from ..backends.rounding import tensor_key
from ..rules import builtin as rules
from ..rules import packages as foreign
from ..window.collector import Collector
from ..window.slots import Slot
from .skips import SkipWatch
from .swap import Swap

Group = dict[str, Any]
# What is still to do of an update, given what makes the accumulated sum the mean.
Apply = Callable[[Correction], None]


def _zero(_: Group) -> float:
    return 0.0


class Updater:
    """Applies updates of one optimizer.

    Args:
        optimizer: the wrapped one; its `state` and `param_groups` are read and written.
        collector: where the accumulators are.
        seed: of stochastic rounding.
    """

    def __init__(self, optimizer: Optimizer, collector: Collector, seed: int = 0) -> None:
        self.optimizer = optimizer
        self.collector = collector
        self.seed = seed
        self.swap = Swap(optimizer)
        self._watch = SkipWatch()
        self.scalars: UpdateScalars | None = None
        self.grad_norm: Tensor | None = None
        self._native_masters: dict[Slot, torch.nn.Parameter] = {}
        self.has_own_states: set[Slot] = set()  # whose native states were made for fp32
        # Whether states are there for their names and shapes only, made with a learning rate of 0,
        # from which some start.
        self.is_provisional = False

    @property
    def is_fused(self) -> bool:
        """Whether every param group has a fused rule; one without takes all to the native step."""
        return rules.serve(self.optimizer)

    def refuse_native(self, what: str) -> None:
        """Raise if the optimizer takes its native step.

        Raises:
            ValueError: saying that `what` needs a fused rule, and why there is none.
        """
        if not self.is_fused:
            raise ValueError(f"{what} needs a fused rule: {rules.reason(self.optimizer)}")

    def prepared_scalars(self) -> UpdateScalars:
        """The device tables, grown when parameters were added."""
        n = len(self.collector.slots)
        old = self.scalars
        if old is None or len(old.steps) < n:
            rule = rules.select(self.optimizer, self.optimizer.param_groups[0])
            n_scalars = rule.family.n_scalars if rule else 0
            n_memory = len(rule.family.memory) if rule else 0
            new = UpdateScalars(n, n_scalars, self.collector.device, n_memory)
            if old is not None:
                new.memory[: len(old.memory)] = old.memory
                new.steps[: len(old.steps)] = old.steps
                new.norm, new.skipped = old.norm, old.skipped
                for slot in self.collector.slots.values():
                    slot.step = None  # what `state` shows is in the old tables
            self.scalars = new
        assert self.scalars is not None
        return self.scalars

    @torch.no_grad()
    def prepare(self, max_norm: float | None, skip_nonfinite: bool, is_scaled: bool) -> Apply:
        """Make one update with what the window holds ready. Weights and states do not change.

        Args:
            max_norm: clip to it, or None.
            skip_nonfinite: leave everything as it was where the norm is not finite.
            is_scaled: whether a GradScaler takes part, so that the factor is a tensor.

        Returns:
            What applies it. Until that is called, all of this may be given up and done again.
        """
        if not any(slot.fill for slot in self.collector.slots.values()):
            return lambda correction: None  # torch's step() without a gradient does nothing either
        if self.is_provisional:
            self._forget_states()
        skip = skip_nonfinite or is_scaled
        needs_norm = max_norm is not None or skip
        partials = self.collector.sums_of_squares() if needs_norm else None
        make = self._fused if self.is_fused else self._native
        return make(max_norm, partials, skip)

    def update_as_is(self) -> None:
        """Update with the sum that the window holds: no norm, no clipping, no skip."""
        self.prepare(None, False, False)(Correction())

    def _forget_states(self) -> None:
        """Let the states start as if there had been none."""
        self.is_provisional = False
        self.optimizer.state.clear()
        self.prepared_scalars().steps.zero_()
        for slot in self.collector.slots.values():
            slot.states, slot.step = (), None

    @torch.no_grad()
    def release_states(self) -> None:
        """Give the wrapped optimizer states of its own, in the dtypes plain torch would have."""
        if self.is_provisional:
            self.optimizer.state.clear()
        for param, slot in self.collector.slots.items():
            entry = self.optimizer.state.get(param, {})
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                if value.dim() == 0:
                    entry[name] = value.detach().clone().cpu()
                elif value.is_floating_point():
                    entry[name] = value.to(slot.dtype, copy=True)

    # --- the fused step ---

    def _fused(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply:
        scalars = self.prepared_scalars()
        groups = self.optimizer.param_groups
        by_kind: dict[tuple[str, torch.dtype, Keep], Step] = {}
        updated: list[Slot] = []
        position = -1  # among all parameters, frozen ones too: a resumed run draws the same bits
        for group_index, group in enumerate(groups):
            rule = rules.select(self.optimizer, group)
            assert rule is not None
            for param in group["params"]:
                position += 1
                slot = self.collector.slots.get(param)
                if slot is None or not slot.fill:
                    continue
                self.bind(slot, rule, group)
                keep = Keep(slot.kind)
                step = by_kind.get((rule.name, slot.dtype, keep))
                if step is None:
                    step = Step(rule, keep, [], scalars)
                    by_kind[rule.name, slot.dtype, keep] = step
                key = tensor_key(self.seed, position) if keep is Keep.STOCHASTIC else 0
                own = slot.master if slot.has_master else None
                tensor = StepTensor(param, slot.acc, slot.states, slot.row, group_index, own, key)
                step.tensors.append(tensor)
                updated.append(slot)
        if not updated:
            return lambda correction: None
        steps = list(by_kind.values())
        hyper = [(rules.sign(group), *steps[0].rule.family.hyper(group)) for group in groups]
        backend = self.collector.backend

        @torch.no_grad()
        def apply(correction: Correction) -> None:
            backend.finalize(Finalize(steps, hyper, correction, partials, max_norm, skip))
            for step in steps:
                backend.step(step)
            self.grad_norm = None if partials is None else scalars.norm
            # The kernels write behind autograd's back: a backward through the old weights must
            # notice.
            torch.autograd.graph.increment_version([s.param for s in updated])
            if skip:
                self._watch.updated(scalars.skipped)

        return apply

    def bind(self, slot: Slot, rule: rules.Rule, group: Group) -> None:
        """Make `state[param]` show the flat buffers, taking over what somebody put there.

        It shows all of them or none: what raises before leaves `state` as it was.
        """
        scalars = self.prepared_scalars()
        state = self.optimizer.state[slot.param]
        slot.refresh_master()
        if slot.step is not None and len(slot.states) == len(rule.states):
            own = dict(zip(rule.states, slot.states, strict=True)) | slot.numbers
            if all(state.get(name) is tensor for name, tensor in own.items()):
                self._start_later(slot, rule, group)
                return
        is_foreign = False  # whether it comes from a plain run, or from a checkpoint
        shown: dict[str, Tensor] = {}
        for name in rule.states:
            shown[name] = view = slot.view(name)
            existing = state.get(name)
            if not isinstance(existing, Tensor):
                view.fill_(rule.start(name, group))
            elif existing.data_ptr() != view.data_ptr():
                is_foreign = True
                view.copy_(existing)
        views = tuple(shown.values())
        step = scalars.steps[slot.row]
        if views and not any(isinstance(state.get(name), Tensor) for name in rule.states):
            step.zero_()  # history begins anew, also where somebody cleared the states
        memory = rule.family.memory
        numbers = [(scalars.memory[slot.row, i], *m) for i, m in enumerate(memory)]
        if rule.family.step_key is not None:
            numbers.append((step, rule.family.step_key, _zero))
        elif is_foreign and not slot.knows_step:
            step.clamp_(min=1.0)  # a momentum buffer from before: this is not the first update
        for number, name, start in numbers:
            shown[name] = number
            existing = state.get(name, start(group))
            if not isinstance(existing, Tensor):
                number.fill_(existing)
            elif existing.data_ptr() != number.data_ptr():
                number.copy_(existing)
        state.update(shown)
        slot.starts = rule.starts(group)
        slot.states = views
        slot.numbers = {name: number for number, name, _ in numbers}
        slot.step = step

    def _start_later(self, slot: Slot, rule: rules.Rule, group: Group) -> None:
        """Let what starts as a hyper-parameter start as what that is now (ASGD's and Rprop's rate),
        where every update so far was skipped. That shows on the device alone."""
        starts = rule.starts(group)
        if starts == slot.starts:
            return
        assert slot.step is not None
        for name, start in starts.items():
            value = self.optimizer.state[slot.param][name]
            value.copy_(torch.where(slot.step == 0, start, value))
        slot.starts = starts

    # --- the wrapped optimizer's own step ---

    def _native(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply:
        filled = self.collector.filled()
        if any(slot.kind == "stochastic" for slot in filled):
            self.refuse_native("stochastic_rounding=True")
        scalars = self.prepared_scalars()
        masters = {s: self._native_master(s) for s in filled if s.has_master}

        @torch.no_grad()
        def apply(correction: Correction) -> None:
            factor = float(correction.product())
            coef: Tensor | float = factor
            self.grad_norm = None
            if partials is not None:
                norm = partials.double().sum().sqrt() * factor
                self.grad_norm = scalars.norm.copy_(norm)
                # The one wait of this library, and only here: a foreign step() cannot be skipped
                # on the device.
                if skip and not bool(norm.isfinite()):
                    scalars.skipped += 1
                    self._watch.updated(scalars.skipped)
                    return
                if max_norm is not None:
                    coef = (factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)).float()
            grads = [slot.acc for slot in filled]
            if max_norm is not None or factor != 1.0:
                if self.collector.window.steps is None:
                    grads = list(torch._foreach_mul(grads, coef))  # the loop may go on adding
                else:
                    torch._foreach_mul_(grads, coef)
                    for slot in filled:
                        slot.sums_version = None  # the sums are of the gradient before this
            with self._substituted(dict(zip(filled, grads, strict=True)), masters):
                self.optimizer.step()
            for slot, master in masters.items():
                slot.param.copy_(master)
            if skip:
                self._watch.updated(scalars.skipped)

        return apply

    @torch.no_grad()
    def on_masters(self, method: Callable[[], Any]) -> Any:
        """Call a method that rewrites parameters (schedule-free optimizers' train() and eval())."""
        kept = [] if self.is_fused else [s for s in self.collector.slots.values() if s.has_master]
        masters = {s: self._native_master(s) for s in kept}
        with self._substituted({s: s.acc for s in masters if s.fill}, masters):
            result = method()
        for slot, master in masters.items():
            slot.param.copy_(master)
        return result

    @contextmanager
    def _substituted(
        self, grads: dict[Slot, Tensor], masters: dict[Slot, torch.nn.Parameter]
    ) -> Iterator[None]:
        """Let the wrapped optimizer see fp32 masters instead of bf16 and fp16 parameters.

        Its states are then fp32 too. For the time of the step the masters stand in `param_groups`
        and `state`; afterwards the parameters do again. Parameters without a gradient in this
        window show none.
        """
        state = self.optimizer.state
        slots = self.collector.slots.values()
        shown = [(s.param, s.param.grad) for s in slots if s not in masters]
        try:
            for slot in slots:
                if slot not in masters:
                    grad = grads.get(slot)
                    slot.param.grad = None if grad is None else self._native_grad(slot, grad)
            with self.swap.of({s.param: master for s, master in masters.items()}, True):
                for slot, master in masters.items():
                    grad = grads.get(slot)
                    master.grad = None if grad is None else self._native_grad(slot, grad)
                    # Made in the parameter's dtype, by a constructor (Adagrad) or by a plain run.
                    # What it made, or loaded, for fp32 parameters is in the dtype that it wants.
                    entry = {} if slot in self.has_own_states else state.get(master, {})
                    for name, value in entry.items():
                        is_tensor = isinstance(value, Tensor) and value.dim() > 0
                        if is_tensor and value.dtype == slot.dtype:
                            entry[name] = value.float()
                self.has_own_states.update(grads)
                yield
        finally:
            for param, grad in shown:
                param.grad = grad
            for master in masters.values():
                master.grad = None

    def _native_grad(self, slot: Slot, grad: Tensor) -> Tensor:
        """A gradient in the form that the wrapped optimizer takes."""
        if isinstance(self.optimizer, torch.optim.SparseAdam):
            # It takes nothing else, and touches only these rows: those with a gradient.
            return grad.to_sparse(1)
        converts = not foreign.reads_fp32_gradients(self.optimizer)
        if not slot.has_master and slot.dtype != torch.float32 and converts:
            return grad.to(slot.dtype)
        return grad

    def _native_master(self, slot: Slot) -> torch.nn.Parameter:
        kept = slot.use_fp32_master()
        master = self._native_masters.get(slot)
        if master is None or master.data_ptr() != kept.data_ptr():
            master = self._native_masters[slot] = torch.nn.Parameter(kept)
        return master
