"""From the backward to the accumulators: autograd hooks and a bounded queue.

One hook per parameter, before its AccumulateGrad node: it takes `param.grad` (the accumulator)
away, so that autograd keeps the fresh gradient without a copy. The parameter is queued; when the
queue would exceed the bucket, and when the backward ends, one launch adds the whole queue, the
fresh gradients are freed and `param.grad` shows the accumulator again.

The hook is on the node and not on the tensor: a tensor's hook also fires in `autograd.grad`.
Autograd holds that node weakly, so the segment holds it. A backward is known by its graph task, so
reentrant checkpoints and a parameter that arrives twice come out right, and a backward that raised
half-way is remembered.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakTensorKeyDictionary

from .backends import Backend
from .buffers import Block, laid_out_like
from .segments import Segment, check_param, master_kind
from .window import Window

# Which live collector has hooks on a parameter: two would take each other's accumulators for
# gradients.
_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Collector:
    """The accumulators of one optimizer and the hooks that fill them.

    Args:
        backend: runs the launches.
        window: gives each micro-batch its scale.
        bucket_bytes: fresh gradients take no more than this, with the one that autograd is making
            (or half of it and one gradient, where that is more).
        wants_norm: whether updates need the norm, so that the last accumulation leaves its sums.
        master_weights: see `FusedAccumOptimizer`.
    """

    def __init__(
        self,
        backend: Backend,
        window: Window,
        *,
        bucket_bytes: int,
        wants_norm: bool,
        master_weights: str | None,
    ) -> None:
        self.backend = backend
        self.window = window
        self.wants_norm = wants_norm
        self.segments: dict[Tensor, Segment] = {}
        self.partials: Tensor | None = None
        self.failed: str | None = None  # why the open window cannot be used
        self.n_cells = 0
        self._bucket_bytes = bucket_bytes
        self._queue_bytes = bucket_bytes
        self._master_weights = master_weights
        self._open: set[int] = set()  # graph tasks of backwards that have not ended
        self._queue: list[Segment] = []
        self._queued_bytes = 0

    # --- parameters ---

    def attach(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        """Give each named parameter a segment and a hook. All of them, or none if one is wrong."""
        named = list(named_params)
        if not named:
            return
        device = next(iter(self.segments.values())).device if self.segments else named[0][1].device
        for name, param in named:
            check_param(name, param)
            master_kind(self._master_weights, param.dtype)
            owner = _owners.get(param, lambda: None)()
            if owner is not None and owner is not self:
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} already belongs to another "
                    "FusedAccumOptimizer; call its detach(), or delete it, first"
                )
            if param.device != device:
                raise ValueError(
                    f"{name} is on {param.device} but others are on {device}; one wrapper serves "
                    "one device: make an optimizer, and wrap it, for each device"
                )
        for dtype in dict.fromkeys(param.dtype for _, param in named):
            kind = master_kind(self._master_weights, dtype)
            params = [param for _, param in named if param.dtype is dtype]
            block = Block(params)
            for position, param in enumerate(params):
                segment = Segment(param, block, position, len(self.segments), self.n_cells, kind)
                self.n_cells += segment.n_cells
                self.segments[param] = segment
                self._hook(segment)
        self.partials = None  # made again, larger, when first needed
        largest = max(s.nbytes for s in self.segments.values())
        self._queue_bytes = self._bucket_bytes - min(largest, self._bucket_bytes // 2)

    def _hook(self, segment: Segment) -> None:
        param = segment.param
        if segment.dtype != torch.float32:
            # Since torch 2.10 this lets `grad` have another dtype than the parameter.
            param.grad_dtype = None
        segment.node = torch.autograd.graph.get_gradient_edge(param).node
        # The node holds the hook and the segment the node: a strong reference back would be a
        # cycle that Python's collector cannot see.
        segment_ref, collector_ref = weakref.ref(segment), weakref.ref(self)

        def prehook(_: tuple[Tensor, ...]) -> None:
            arriving, collector = segment_ref(), collector_ref()
            if arriving is not None and collector is not None:
                collector._arrive(arriving)

        segment.hook = segment.node.register_prehook(prehook)
        _owners[param] = collector_ref

    def detach(self) -> None:
        """Remove every hook and give `grad` its usual dtype again."""
        for segment in self.segments.values():
            segment.hook.remove()
            segment.node = None
            _owners.pop(segment.param, None)
            segment.param.grad = None
            if segment.dtype != torch.float32:
                segment.param.grad_dtype = segment.dtype
        self.segments.clear()

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
            self.adopt(segment, grad)
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
        self.window.check_arrival()
        self._open.add(task)

        def finish() -> None:
            self.flush()
            self._open.discard(task)

        Variable._execution_engine.queue_callback(finish)

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

    def adopt(self, segment: Segment, grad: Tensor) -> None:
        """Take a gradient that did not come through the hook: somebody assigned `param.grad`.

        It replaces the accumulator where it stands in for it (the loop owns the window, or this
        micro-batch has arrived already: `p.grad = p.grad * 0.5`); else it is this micro-batch's
        gradient and is added.
        """
        replaces = self.window.steps is None or segment.arrived
        if replaces:
            segment.filled = False
        self._add([(segment, grad)], 1.0 if replaces else self.window.scale())

    @torch.no_grad()
    def _add(self, fresh: list[tuple[Segment, Tensor]], scale: float) -> None:
        """Accumulate gradients: the tensors that start a window, then the others."""
        with_sums = self.wants_norm and (self.window.steps is None or self.window.is_last)
        cells = self.cells() if with_sums else None
        starting: list[tuple[Segment, Tensor]] = []
        adding: list[tuple[Segment, Tensor]] = []
        for segment, grad in fresh:
            if segment.grad is None:
                segment.allocate()
            if not (segment.is_contiguous and grad.is_contiguous()):
                grad = laid_out_like(grad, segment.acc)
            if grad.dtype is not segment.dtype and grad.dtype is not torch.float32:
                grad = grad.float()
            (adding if segment.filled else starting).append((segment, grad))
        for members, first in ((starting, True), (adding, False)):
            if members:
                self.backend.accumulate(
                    [s.acc for s, _ in members],
                    [g for _, g in members],
                    scale,
                    first,
                    cells,
                    [s.cell for s, _ in members],
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

    def adopt_assigned(self) -> None:
        """Take gradients that somebody assigned, and notice those that somebody removed."""
        loop_owned = self.window.steps is None
        for segment in self.segments.values():
            grad = segment.param.grad
            if grad is None:
                if loop_owned:
                    segment.filled = False
            elif grad is not segment.grad:
                self.adopt(segment, grad)

    def filled(self) -> list[Segment]:
        """The parameters that the open window holds a gradient for."""
        return [s for s in self.segments.values() if s.filled]

    def close_micro_batch(self) -> None:
        """The open micro-batch is over."""
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
        self.window.reset()

    def discard(self) -> None:
        """Forget the window. The accumulators' next use stores, so nothing is written."""
        self._open.clear()
        self._queue.clear()
        self._queued_bytes = 0
        self.failed = None
        for segment in self.segments.values():
            segment.filled = segment.arrived = segment.pending = False
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
        stale = [s for s in self.filled() if not s.sums_are_current]
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
