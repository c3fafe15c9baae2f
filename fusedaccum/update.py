"""From full accumulators to new weights: the fused step, or the wrapped optimizer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import foreign, rules
from .backends import StepBatch, UpdateRequest, UpdateScalars
from .collect import Collector
from .rounding import tensor_key
from .segments import Segment

Group = dict[str, Any]


def _zero(_: Group) -> float:
    return 0.0


class Updater:
    """Applies updates of one optimizer.

    Args:
        optimizer: the wrapped one; its `state` and `param_groups` are read and written.
        collector: where the accumulators are.
        skip_nonfinite: leave everything as it was where the norm is not finite.
        seed: of stochastic rounding.
    """

    def __init__(
        self, optimizer: Optimizer, collector: Collector, skip_nonfinite: bool, seed: int = 0
    ) -> None:
        self.optimizer = optimizer
        self.collector = collector
        self.skip_nonfinite = skip_nonfinite
        self.seed = seed
        self.scalars: UpdateScalars | None = None
        self.grad_norm: Tensor | None = None
        self._native_masters: dict[Segment, torch.nn.Parameter] = {}
        self.has_own_states: set[Segment] = set()  # whose native states were made for fp32
        # Whether states are there for their names and shapes only, made with a learning rate of 0,
        # from which some start.
        self.is_provisional = False

    @property
    def is_fused(self) -> bool:
        """Whether every param group has a fused rule; one without takes all to the native step."""
        groups = self.optimizer.param_groups
        return all(rules.select(self.optimizer, group) is not None for group in groups)

    def refuse_native(self, what: str) -> None:
        """Raise if the optimizer takes its native step.

        Raises:
            ValueError: saying that `what` needs a fused rule, and why there is none.
        """
        if not self.is_fused:
            raise ValueError(f"{what} needs a fused rule: {rules.reason(self.optimizer)}")

    def prepared_scalars(self) -> UpdateScalars:
        """The device tables, grown when parameters were added."""
        n = len(self.collector.segments)
        old = self.scalars
        if old is None or len(old.steps) < n:
            rule = rules.select(self.optimizer, self.optimizer.param_groups[0])
            n_scalars = rule.family.n_scalars if rule else 0
            device = next(iter(self.collector.segments.values())).device
            n_memory = len(rule.family.memory) if rule else 0
            self.scalars = UpdateScalars(n, n_scalars, device, n_memory)
            if old is not None:
                self.scalars.memory[: len(old.memory)] = old.memory
                self.scalars.steps[: len(old.steps)] = old.steps
                self.scalars.norm, self.scalars.skipped = old.norm, old.skipped
                for segment in self.collector.segments.values():
                    segment.step = None  # what `state` shows is in the old tables
        assert self.scalars is not None
        return self.scalars

    @torch.no_grad()
    def run(self, correction: float | Tensor, max_norm: float | None) -> None:
        """One update with what the window holds.

        Args:
            correction: makes the accumulated sum the mean; a tensor where a GradScaler takes part,
                NaN after an overflow: the update is skipped then in any case.
            max_norm: clip to it, or None.
        """
        if not self.collector.segments:
            return
        if self.is_provisional:
            self._forget_states()
        skip = self.skip_nonfinite or isinstance(correction, Tensor)
        needs_norm = max_norm is not None or skip
        partials = self.collector.sums_of_squares() if needs_norm else None
        if self.is_fused:
            self._fused(correction, max_norm, partials, skip)
        else:
            self._native(float(correction), max_norm, partials, skip)

    def _forget_states(self) -> None:
        """Let the states start as if there had been none."""
        self.is_provisional = False
        self.optimizer.state.clear()
        self.prepared_scalars().steps.zero_()
        for segment in self.collector.segments.values():
            segment.states, segment.step = (), None

    # --- the fused step ---

    def _fused(
        self,
        correction: float | Tensor,
        max_norm: float | None,
        partials: Tensor | None,
        skip: bool,
    ) -> None:
        scalars = self.prepared_scalars()
        groups = self.optimizer.param_groups
        batches: dict[tuple[str, torch.dtype, str], StepBatch] = {}
        updated: list[Segment] = []
        for group_index, group in enumerate(groups):
            rule = rules.select(self.optimizer, group)
            assert rule is not None
            for param in group["params"]:
                segment = self.collector.segments.get(param)
                if segment is None or not segment.filled:
                    continue
                self.bind(segment, rule, group)
                key = (rule.name, segment.dtype, segment.kind)
                batch = batches.setdefault(key, StepBatch(rule, segment.kind))
                batch.params.append(param)
                batch.accs.append(segment.acc)
                batch.states.append(segment.states)
                batch.rows.append(segment.row)
                batch.groups.append(group_index)
                if segment.has_master:
                    assert segment.master is not None
                    batch.masters.append(segment.master)
                elif segment.kind == "stochastic":
                    batch.keys.append(tensor_key(self.seed, segment.row))
                updated.append(segment)
        if not updated:
            return  # torch's step() without a gradient does nothing either
        first = next(iter(batches.values())).rule.family
        hyper = [(rules.sign(group), *first.hyper(group)) for group in groups]
        request = UpdateRequest(first, hyper, partials, correction, max_norm, skip)
        backend = self.collector.backend
        backend.finalize(request, list(batches.values()), scalars)
        for batch in batches.values():
            backend.step(batch, scalars)
        if partials is not None:
            self.grad_norm = scalars.norm
        # The kernels write behind autograd's back: a backward through the old weights must notice.
        torch.autograd.graph.increment_version([s.param for s in updated])

    def bind(self, segment: Segment, rule: rules.Rule, group: Group) -> None:
        """Make `state[param]` show the flat buffers, taking over what somebody put there."""
        scalars = self.prepared_scalars()
        state = self.optimizer.state[segment.param]
        segment.refresh_master()
        family = rule.family
        numbers = [(scalars.memory[segment.row, i], *m) for i, m in enumerate(family.memory)]
        own = dict(zip(rule.states, segment.states, strict=False))
        if segment.step is not None and len(segment.states) == len(rule.states):
            own |= segment.numbers
            if all(state.get(name) is tensor for name, tensor in own.items()):
                return
        had_states = False
        views = []
        for name in rule.states:
            view, existing = segment.view(name), state.get(name)
            if not isinstance(existing, Tensor):
                view.fill_(rule.start(name, group))
            else:
                had_states = True
                if existing.data_ptr() != view.data_ptr():
                    view.copy_(existing)
            state[name] = view
            views.append(view)
        segment.states = tuple(views)
        step = scalars.steps[segment.row]
        if family.step_key is not None:
            numbers.append((step, family.step_key, _zero))
        elif segment.step is None and had_states:
            step.clamp_(min=1.0)  # a momentum buffer from before: this is not the first update
        segment.step = step
        segment.numbers = {}
        for number, name, start in numbers:
            existing = state.get(name, start(group))
            if not isinstance(existing, Tensor):
                number.fill_(existing)
            elif existing.data_ptr() != number.data_ptr():
                number.copy_(existing)
            state[name] = segment.numbers[name] = number

    # --- the wrapped optimizer's own step ---

    def _native(
        self, correction: float, max_norm: float | None, partials: Tensor | None, skip: bool
    ) -> None:
        filled = self.collector.filled()
        if any(segment.kind == "stochastic" for segment in filled):
            self.refuse_native("stochastic_rounding=True")
        scalars = self.prepared_scalars()
        if partials is not None:
            norm = partials.double().sum().sqrt() * correction
            self.grad_norm = scalars.norm.copy_(norm)
            # The one wait of this library, and only here: a foreign step() cannot be skipped on
            # the device.
            if skip and not bool(norm.isfinite()):
                scalars.skipped += 1
                return
            coef = torch.full_like(norm, correction)
            if max_norm is not None:
                coef *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
            if filled and (max_norm is not None or correction != 1.0):
                torch._foreach_mul_([s.acc for s in filled], coef.float())
        elif filled and correction != 1.0:
            torch._foreach_mul_([s.acc for s in filled], correction)
        for segment in filled:
            # The sums and the norm are of the gradient before this.
            segment.sums_version = None
        with self.substituted_masters(filled):
            self.optimizer.step()

    @torch.no_grad()
    def on_masters(self, method: Callable[[], Any]) -> Any:
        """Call a method that rewrites parameters (schedule-free optimizers' train() and eval())."""
        segments = [s for s in self.collector.segments.values() if s.has_master]
        with self.substituted_masters([] if self.is_fused else segments):
            return method()

    @contextmanager
    def substituted_masters(self, filled: list[Segment]) -> Iterator[None]:
        """Let the wrapped optimizer step fp32 masters instead of bf16 and fp16 parameters.

        Its states are then fp32 too. For the time of the step the masters stand in `param_groups`
        and `state`; afterwards the parameters do again, rounded from them.
        """
        new = {s.param for s in filled if s not in self.has_own_states}
        masters = {s.param: self._native_master(s) for s in filled if s.has_master}
        plain = [s for s in filled if not s.has_master]
        for segment in plain:
            segment.param.grad = self._native_grad(segment)
        state, groups = self.optimizer.state, self.optimizer.param_groups
        originals = [group["params"] for group in groups]
        for param, master in masters.items():
            if param in state:
                state[master] = state.pop(param)
                # Made in the parameter's dtype, by a constructor (Adagrad) or by a plain run. What
                # it made, or loaded, for fp32 parameters is in the dtype that it wants.
                for name, value in state[master].items() if param in new else ():
                    if isinstance(value, Tensor) and value.dim() and value.dtype == param.dtype:
                        state[master][name] = value.float()
        self.has_own_states.update(filled)
        for group in groups:
            group["params"] = [masters.get(p, p) for p in group["params"]]
        try:
            yield
        finally:
            for group, params in zip(groups, originals, strict=True):
                group["params"] = params
            for param, master in masters.items():
                if master in state:
                    state[param] = state.pop(master)
                master.grad = None
            for segment in plain:
                segment.param.grad = segment.grad
        for param, master in masters.items():
            param.copy_(master)

    def _native_grad(self, segment: Segment) -> Tensor | None:
        """The accumulator in the form that the wrapped optimizer takes."""
        grad = segment.grad
        converts = not foreign.reads_fp32_gradients(self.optimizer)
        if not segment.has_master and segment.dtype != torch.float32 and converts:
            grad = segment.acc.to(segment.dtype)
        if isinstance(self.optimizer, torch.optim.SparseAdam):
            # It takes nothing else, and touches only these rows: those with a gradient.
            grad = segment.acc.to_sparse(1)
        return grad

    def _native_master(self, segment: Segment) -> torch.nn.Parameter:
        kept = segment.use_fp32_master()
        master = self._native_masters.get(segment)
        if master is None or master.data_ptr() != kept.data_ptr():
            master = self._native_masters[segment] = torch.nn.Parameter(kept)
        master.grad = self._native_grad(segment)
        return master
