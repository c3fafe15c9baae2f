"""From full accumulators to new weights: the fused step, or the wrapped optimizer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import StepBatch, UpdateRequest, UpdateScalars
from ..backends.rounding import tensor_key
from ..kernels.layout import CLIP_EPS
from ..rules import builtin as rules
from ..rules import packages as foreign
from ..window.collector import Collector
from ..window.slots import Segment
from .skips import SkipWatch
from .swap import Swap

Group = dict[str, Any]
# What is still to do of an update, given the factor that makes the accumulated sum the mean: a
# tensor where a GradScaler takes part, NaN after an overflow, which skips the update in any case.
Apply = Callable[[float | Tensor], None]


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
        self._native_masters: dict[Segment, torch.nn.Parameter] = {}
        self.has_own_states: set[Segment] = set()  # whose native states were made for fp32
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
        n = len(self.collector.segments)
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
                for segment in self.collector.segments.values():
                    segment.step = None  # what `state` shows is in the old tables
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
        if not any(segment.fill for segment in self.collector.segments.values()):
            return lambda correction: None  # torch's step() without a gradient does nothing either
        if self.is_provisional:
            self._forget_states()
        skip = skip_nonfinite or is_scaled
        needs_norm = max_norm is not None or skip
        partials = self.collector.sums_of_squares() if needs_norm else None
        make = self._fused if self.is_fused else self._native
        return make(max_norm, partials, skip)

    def _forget_states(self) -> None:
        """Let the states start as if there had been none."""
        self.is_provisional = False
        self.optimizer.state.clear()
        self.prepared_scalars().steps.zero_()
        for segment in self.collector.segments.values():
            segment.states, segment.step = (), None

    @torch.no_grad()
    def release_states(self) -> None:
        """Give the wrapped optimizer states of its own, in the dtypes plain torch would have."""
        if self.is_provisional:
            self.optimizer.state.clear()
        for param, segment in self.collector.segments.items():
            entry = self.optimizer.state.get(param, {})
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                if value.dim() == 0:
                    entry[name] = value.detach().clone().cpu()
                elif value.is_floating_point():
                    entry[name] = value.to(segment.dtype, copy=True)

    # --- the fused step ---

    def _fused(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply:
        scalars = self.prepared_scalars()
        groups = self.optimizer.param_groups
        batches: dict[tuple[str, torch.dtype, str], StepBatch] = {}
        updated: list[Segment] = []
        position = -1  # among all parameters, frozen ones too: a resumed run draws the same bits
        for group_index, group in enumerate(groups):
            rule = rules.select(self.optimizer, group)
            assert rule is not None
            for param in group["params"]:
                position += 1
                segment = self.collector.segments.get(param)
                if segment is None or not segment.fill:
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
                    batch.keys.append(tensor_key(self.seed, position))
                updated.append(segment)
        if not updated:
            return lambda correction: None
        first = next(iter(batches.values())).rule.family
        hyper = [(rules.sign(group), *first.hyper(group)) for group in groups]
        backend = self.collector.backend

        @torch.no_grad()
        def apply(correction: float | Tensor) -> None:
            request = UpdateRequest(first, hyper, partials, correction, max_norm, skip)
            backend.finalize(request, list(batches.values()), scalars)
            for batch in batches.values():
                backend.step(batch, scalars)
            self.grad_norm = None if partials is None else scalars.norm
            # The kernels write behind autograd's back: a backward through the old weights must
            # notice.
            torch.autograd.graph.increment_version([s.param for s in updated])
            if skip:
                self._watch.updated(scalars.skipped)

        return apply

    def bind(self, segment: Segment, rule: rules.Rule, group: Group) -> None:
        """Make `state[param]` show the flat buffers, taking over what somebody put there.

        It shows all of them or none: what raises before leaves `state` as it was.
        """
        scalars = self.prepared_scalars()
        state = self.optimizer.state[segment.param]
        segment.refresh_master()
        if segment.step is not None and len(segment.states) == len(rule.states):
            own = dict(zip(rule.states, segment.states, strict=True)) | segment.numbers
            if all(state.get(name) is tensor for name, tensor in own.items()):
                self._start_later(segment, rule, group)
                return
        is_foreign = False  # whether it comes from a plain run, or from a checkpoint
        shown: dict[str, Tensor] = {}
        for name in rule.states:
            shown[name] = view = segment.view(name)
            existing = state.get(name)
            if not isinstance(existing, Tensor):
                view.fill_(rule.start(name, group))
            elif existing.data_ptr() != view.data_ptr():
                is_foreign = True
                view.copy_(existing)
        views = tuple(shown.values())
        step = scalars.steps[segment.row]
        if views and not any(isinstance(state.get(name), Tensor) for name in rule.states):
            step.zero_()  # history begins anew, also where somebody cleared the states
        memory = rule.family.memory
        numbers = [(scalars.memory[segment.row, i], *m) for i, m in enumerate(memory)]
        if rule.family.step_key is not None:
            numbers.append((step, rule.family.step_key, _zero))
        elif is_foreign and not segment.knows_step:
            step.clamp_(min=1.0)  # a momentum buffer from before: this is not the first update
        for number, name, start in numbers:
            shown[name] = number
            existing = state.get(name, start(group))
            if not isinstance(existing, Tensor):
                number.fill_(existing)
            elif existing.data_ptr() != number.data_ptr():
                number.copy_(existing)
        state.update(shown)
        segment.starts = rule.starts(group)
        segment.states = views
        segment.numbers = {name: number for number, name, _ in numbers}
        segment.step = step

    def _start_later(self, segment: Segment, rule: rules.Rule, group: Group) -> None:
        """Let what starts as a hyper-parameter start as what that is now (ASGD's and Rprop's rate),
        where every update so far was skipped. That shows on the device alone."""
        starts = rule.starts(group)
        if starts == segment.starts:
            return
        assert segment.step is not None
        for name, start in starts.items():
            value = self.optimizer.state[segment.param][name]
            value.copy_(torch.where(segment.step == 0, start, value))
        segment.starts = starts

    # --- the wrapped optimizer's own step ---

    def _native(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply:
        filled = self.collector.filled()
        if any(segment.kind == "stochastic" for segment in filled):
            self.refuse_native("stochastic_rounding=True")
        scalars = self.prepared_scalars()
        masters = {s: self._native_master(s) for s in filled if s.has_master}

        @torch.no_grad()
        def apply(correction: float | Tensor) -> None:
            factor = float(correction)
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
                    coef = (factor * (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)).float()
            grads = [segment.acc for segment in filled]
            if max_norm is not None or factor != 1.0:
                if self.collector.window.steps is None:
                    grads = list(torch._foreach_mul(grads, coef))  # the loop may go on adding
                else:
                    torch._foreach_mul_(grads, coef)
                    for segment in filled:
                        segment.sums_version = None  # the sums are of the gradient before this
            with self._substituted(dict(zip(filled, grads, strict=True)), masters):
                self.optimizer.step()
            for segment, master in masters.items():
                segment.param.copy_(master)
            if skip:
                self._watch.updated(scalars.skipped)

        return apply

    @torch.no_grad()
    def on_masters(self, method: Callable[[], Any]) -> Any:
        """Call a method that rewrites parameters (schedule-free optimizers' train() and eval())."""
        kept = (
            [] if self.is_fused else [s for s in self.collector.segments.values() if s.has_master]
        )
        masters = {s: self._native_master(s) for s in kept}
        with self._substituted({s: s.acc for s in masters if s.fill}, masters):
            result = method()
        for segment, master in masters.items():
            segment.param.copy_(master)
        return result

    @contextmanager
    def _substituted(
        self, grads: dict[Segment, Tensor], masters: dict[Segment, torch.nn.Parameter]
    ) -> Iterator[None]:
        """Let the wrapped optimizer see fp32 masters instead of bf16 and fp16 parameters.

        Its states are then fp32 too. For the time of the step the masters stand in `param_groups`
        and `state`; afterwards the parameters do again. Parameters without a gradient in this
        window show none.
        """
        state = self.optimizer.state
        segments = self.collector.segments.values()
        shown = [(s.param, s.param.grad) for s in segments if s not in masters]
        try:
            for segment in segments:
                if segment not in masters:
                    grad = grads.get(segment)
                    segment.param.grad = None if grad is None else self._native_grad(segment, grad)
            with self.swap.of({s.param: master for s, master in masters.items()}, True):
                for segment, master in masters.items():
                    grad = grads.get(segment)
                    master.grad = None if grad is None else self._native_grad(segment, grad)
                    # Made in the parameter's dtype, by a constructor (Adagrad) or by a plain run.
                    # What it made, or loaded, for fp32 parameters is in the dtype that it wants.
                    entry = {} if segment in self.has_own_states else state.get(master, {})
                    for name, value in entry.items():
                        is_tensor = isinstance(value, Tensor) and value.dim() > 0
                        if is_tensor and value.dtype == segment.dtype:
                            entry[name] = value.float()
                self.has_own_states.update(grads)
                yield
        finally:
            for param, grad in shown:
                param.grad = grad
            for master in masters.values():
                master.grad = None

    def _native_grad(self, segment: Segment, grad: Tensor) -> Tensor:
        """A gradient in the form that the wrapped optimizer takes."""
        if isinstance(self.optimizer, torch.optim.SparseAdam):
            # It takes nothing else, and touches only these rows: those with a gradient.
            return grad.to_sparse(1)
        converts = not foreign.reads_fp32_gradients(self.optimizer)
        if not segment.has_master and segment.dtype != torch.float32 and converts:
            return grad.to(segment.dtype)
        return grad

    def _native_master(self, segment: Segment) -> torch.nn.Parameter:
        kept = segment.use_fp32_master()
        master = self._native_masters.get(segment)
        if master is None or master.data_ptr() != kept.data_ptr():
            master = self._native_masters[segment] = torch.nn.Parameter(kept)
        return master
