"""From the backward to the accumulators: autograd hooks and a bounded queue.

One hook per parameter, before its AccumulateGrad node: it takes `param.grad` (the accumulator)
away, so that autograd keeps the fresh gradient without a copy. The parameter is queued; when the
queue would exceed the bucket, and when the backward ends, one launch adds the whole queue, the
fresh gradients are freed and `param.grad` shows the accumulator again.

A backward is known by its graph task, so reentrant checkpoints and a parameter that arrives twice
come out right, and a backward that raised half-way is remembered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import Variable

from .attached import Attached
from .backends import Backend
from .buffers import laid_out_like
from .engines import Watch, may_reduce
from .scaling import Scaling
from .segments import Segment
from .window import Window


class Collector(Attached):
    """The accumulators of one optimizer and the hooks that fill them.

    Args:
        backend: runs the launches.
        window: gives each micro-batch its scale.
        bucket_bytes: fresh gradients take no more than this, with the one that autograd is making
            (or half of it and one gradient, where that is more).
        wants_norm: whether updates need the norm, so that the last accumulation leaves its sums.
        master_weights: see `FusedAccumOptimizer`, or "stochastic".
        scaling: what a GradScaler does to the gradients.
    """

    def __init__(
        self,
        backend: Backend,
        window: Window,
        *,
        bucket_bytes: int,
        wants_norm: bool,
        master_weights: str | None,
        scaling: Scaling,
    ) -> None:
        super().__init__(master_weights)
        self.backend = backend
        self.window = window
        self.wants_norm = wants_norm or scaling.needs_norm
        self.scaling = scaling
        self.engines = Watch()
        self.partials: Tensor | None = None
        self.failed: str | None = None  # why the open window cannot be used
        self._bucket_bytes = bucket_bytes
        self._queue_bytes = bucket_bytes
        self._open: set[int] = set()  # graph tasks of backwards that have not ended
        self._queue: list[Segment] = []
        self._queued_bytes = 0

    def attach(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        """See `Attached.attach`."""
        before = len(self.segments)
        super().attach(named_params)
        if len(self.segments) > before:
            self.partials = None  # made again, larger, when first needed
            largest = max(s.nbytes for s in self.segments.values())
            self._queue_bytes = self._bucket_bytes - min(largest, self._bucket_bytes // 2)

    # --- the backward ---

    def _arrive(self, segment: Segment) -> None:
        """A gradient of `segment` is about to be accumulated by autograd."""
        task = torch._C._current_graph_task_id()
        if task not in self._open:
            self._begin(task)
        param = segment.param
        grad = param.grad
        if segment.pending:
            self.flush()  # it arrives twice in one backward: add the first gradient first
        elif grad is not None and grad is not segment.grad:
            self.adopt([(segment, grad)])
        elif grad is None and self.window.steps is None:
            segment.filled = False  # zero_grad(), the optimizer's or the model's
        param.grad = None
        if self._queue and self._queued_bytes + segment.nbytes > self._queue_bytes:
            self.flush()
        segment.pending = True
        self._queue.append(segment)
        self._queued_bytes += segment.nbytes

    # Not traced: compiled autograd would stop at the code below the error, and not say why.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _begin(self, task: int) -> None:
        compiled = sys.modules.get("torch._dynamo.compiled_autograd")
        if getattr(compiled, "in_compiled_autograd_region", False):
            raise RuntimeError(
                "compiled autograd makes one graph of the backward, in which no gradient can be "
                "taken as it arrives; it is not supported. Compile the model "
                "(torch.compile(model)) and leave torch._dynamo.config.compiled_autograd off"
            )
        self.engines.begin(self)
        is_broken = bool(self._open) or self.failed is not None
        if is_broken and self.window.steps is None and not self._shows_grads():
            # model.zero_grad() after a backward that raised: all that the Trainer calls before it
            # tries again with smaller batches.
            self.discard()
        elif not self._open and self._is_discarded():
            self.window.restart()
        self.window.check_arrival()
        self.scaling.begin(next(iter(self.segments.values())).device)
        self._open.add(task)

        def finish() -> None:
            self.flush()
            self._open.discard(task)

        Variable._execution_engine.queue_callback(finish)
        self.engines.end(self)

    def _shows_grads(self) -> bool:
        """Whether any parameter has a gradient, as it does since the first one arrived."""
        return any(param.grad is not None for param in self.segments)

    def _is_discarded(self) -> bool:
        """Whether model.zero_grad() took away all that a loop's weighted window had gathered."""
        if self.window.steps is not None or not self.window.micro_batches:
            return False
        filled = (s.param.grad for s in self.segments.values() if s.filled)
        return next(filled, self) is None and all(grad is None for grad in filled)

    @torch.no_grad()
    def flush(self) -> None:
        """Add what is queued, free it, and let `param.grad` show the accumulators."""
        queue, self._queue, self._queued_bytes = self._queue, [], 0
        fresh: list[tuple[Segment, Tensor]] = []
        for segment in queue:
            segment.pending = False
            grad = segment.param.grad
            if grad is None:  # a function gave None for its gradient: what was there stays
                segment.param.grad = segment.grad if segment.filled else None
            elif grad.shape != segment.shape:
                raise RuntimeError(
                    f"a parameter changed after it was wrapped ({segment.difference()}): call "
                    "zero_grad() after changing the model, or wrap after it"
                )
            else:
                fresh.append((segment, grad))
        self._add(fresh, self.window.scale())

    def adopt(self, assigned: list[tuple[Segment, Tensor]]) -> None:
        """Take gradients that did not come through the hook: somebody assigned `param.grad`.

        One replaces the accumulator where it stands in for it (the loop owns the window, or this
        micro-batch has arrived already: `p.grad = p.grad * 0.5`); else it is this micro-batch's
        gradient and is added.
        """
        loop_owned = self.window.steps is None
        replacing = [(s, grad) for s, grad in assigned if loop_owned or s.arrived]
        adding = [(s, grad) for s, grad in assigned if not (loop_owned or s.arrived)]
        for segment, _ in replacing:
            segment.filled = False
        self._add(replacing, 1.0, is_scaled=False)
        if adding:
            self._add(adding, self.window.scale())

    @torch.no_grad()
    def _add(
        self, fresh: list[tuple[Segment, Tensor]], scale: float, is_scaled: bool = True
    ) -> None:
        """Accumulate gradients: the tensors that start a window, then the others.

        `is_scaled`: whether they hold the scale of a GradScaler, if there is one.
        """
        window, scaling = self.window, self.scaling
        is_last = window.steps is None or window.is_last or scaling.is_linked
        with_sums = self.wants_norm and is_last
        cells = self.cells() if with_sums else None
        # What starts the window, what starts the micro-batch, what has arrived in it already.
        parts: tuple[list[tuple[Segment, Tensor]], ...] = ([], [], [])
        for segment, grad in fresh:
            if segment.grad is None:
                segment.allocate()
            if not (segment.is_contiguous and grad.is_contiguous()):
                grad = laid_out_like(grad, segment.acc)
            if grad.dtype is not segment.dtype and grad.dtype is not torch.float32:
                grad = grad.float()
            parts[int(segment.filled) + int(segment.filled and segment.arrived)].append(
                (segment, grad)
            )
        if not scaling.is_linked:  # the last two differ in what a GradScaler has to say
            parts = (parts[0], parts[1] + parts[2], [])
        for i, members in enumerate(parts):
            if members:
                self.backend.accumulate(
                    [s.acc for s, _ in members],
                    [g for _, g in members],
                    scale,
                    i == 0,
                    cells,
                    [s.cell for s, _ in members],
                    scaling.control(i < 2) if is_scaled else None,
                )
        for segment, _ in fresh:
            segment.filled = segment.arrived = True
            segment.param.grad = shown = segment.grad
            segment.has_sums |= with_sums
            segment.sums_version = shown._version if with_sums and shown is not None else None

    # --- between backwards ---

    @property
    def has_arrivals(self) -> bool:
        """Whether the open micro-batch has contributed anything."""
        return any(s.arrived for s in self.segments.values())

    def unclosed(self) -> str | None:
        """What the open micro-batch was left by, in words; None where none is open."""
        if self._open or self.failed is not None:
            return "a failed backward()"
        return "backward() without step()" if self.has_arrivals else None

    def check(self) -> None:
        """Raise if the open window holds half a micro-batch.

        Raises:
            RuntimeError: naming what happened and the way out.
        """
        if self._open and self.failed is None:
            self.failed = "a backward() raised before it reached all parameters"
        if self.failed is not None:
            raise RuntimeError(
                f"{self.failed}, so this window holds part of a micro-batch; nothing was updated. "
                f"Call zero_grad() to discard the window ({self.window.micro_batches} closed "
                "micro-batches) and go on with the next one"
            )

    def check_step(self) -> None:
        """`check`, and raise if an engine has taken the parameters over."""
        self.check()
        self.engines.at_step(self)

    def adopt_assigned(self) -> None:
        """Take gradients that somebody assigned, and notice those that somebody removed."""
        loop_owned = self.window.steps is None
        assigned: list[tuple[Segment, Tensor]] = []
        for segment in self.segments.values():
            grad = segment.param.grad
            if grad is None:
                if loop_owned:
                    segment.filled = False
            elif grad is not segment.grad:
                assigned.append((segment, grad))
        if assigned:
            self.adopt(assigned)

    def filled(self) -> list[Segment]:
        """The parameters that the open window holds a gradient for."""
        return [s for s in self.segments.values() if s.filled]

    def close_micro_batch(self) -> None:
        """The open micro-batch is over."""
        self.scaling.close_micro_batch()
        self.window.close_micro_batch()
        for segment in self.segments.values():
            segment.arrived = False

    def end_window(self) -> None:
        """The window has been used. `param.grad` still shows it.

        A loop that owns the window and does not zero it goes on adding, as in torch; where the
        wrapper counts, the next gradient starts afresh.
        """
        for segment in self.segments.values():
            segment.arrived = False
            if self.window.steps is not None:
                segment.filled = False
        self.scaling.end_window()
        self.window.reset()

    def discard(self) -> None:
        """Forget the window. The accumulators' next use stores, so nothing is written."""
        self._open.clear()
        self._queue.clear()
        self._queued_bytes = 0
        self.failed = None
        for segment in self.segments.values():
            segment.filled = segment.arrived = segment.pending = False
        self.scaling.reset()
        self.window.reset()

    def cells(self) -> Tensor:
        """fp32 partial sums of squares, a range per parameter."""
        if self.partials is None:
            device = next(iter(self.segments.values())).device
            self.partials = torch.zeros(self.n_cells, dtype=torch.float32, device=device)
            for segment in self.segments.values():
                segment.sums_version, segment.has_sums = None, False
        return self.partials

    @torch.no_grad()
    def sums_of_squares(self) -> Tensor:
        """Partial sums of all filled accumulators, zero elsewhere; reads only what changed."""
        cells = self.cells()
        unsure = self.scaling.may_have_divided or may_reduce()
        stale = [s for s in self.filled() if unsure or not s.sums_are_current]
        if stale:
            self.backend.sum_of_squares([s.acc for s in stale], cells, [s.cell for s in stale])
            for segment in stale:
                assert segment.grad is not None
                segment.sums_version, segment.has_sums = segment.grad._version, True
        for segment in self.segments.values():
            if segment.has_sums and not segment.filled:
                cells[segment.cell : segment.cell + segment.n_cells].zero_()
                segment.sums_version, segment.has_sums = None, False
        return cells
