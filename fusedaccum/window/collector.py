"""From the backward to the accumulators: autograd hooks and a bounded queue.

One hook per parameter, before its AccumulateGrad node: it takes `param.grad` (the accumulator)
away, so that autograd keeps the fresh gradient without a copy. The parameter is queued; when the
queue would exceed the bucket, and when the backward ends, one launch adds the whole queue, the
fresh gradients are freed and `param.grad` shows the accumulator again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.private import current_task, queue_callback
from ..backends.untraced import untraced
from .adding import Adder
from .backwards import Backwards, refuse_kind
from .by_hand import ByHand
from .deal import Deal
from .grad_scaler import Scaling
from .hooks import Attached, Waiting
from .reducing import Parts, Reducing
from .slots import Fill, Slot, Slots
from .sums import Sums
from .trouble import BACKWARD_RAISED, PART, Trouble
from .watch import Serve, Watch, may_reduce
from .weights import Window


class Collector:
    """The accumulators of one optimizer and the hooks that fill them.

    Args:
        backend: runs the launches.
        window: gives each micro-batch its scale.
        bucket_bytes: fresh gradients take no more than this, with the one that autograd is making
            (or half of it and one gradient, where that is more).
        wants_norm: whether updates need the norm, so that the last accumulation leaves its sums.
        scaling: what a GradScaler does to the gradients.
        device: where the parameters are.
        check: raises for a dtype that cannot be served.
        serve, deal: see `Watch` and `Deal`.

    Attributes:
        attached: the parameters with their hooks.
        slots: by parameter, those of `attached`.
        trouble: why the open window cannot be used, if it cannot.
        backwards: those that are running, and how many there were in the open micro-batch.
        by_hand: what somebody does to gradients in between.
        engines: those that would write or replace what is ours, and what averages over processes.
        sums: their sums of squares.
        adder: adds to the accumulators.
    """

    def __init__(
        self,
        backend: Backend,
        window: Window,
        *,
        bucket_bytes: int,
        wants_norm: bool,
        scaling: Scaling,
        device: torch.device,
        check: Callable[[torch.dtype], None],
        serve: Serve,
        deal: Deal,
    ) -> None:
        self.backwards = Backwards()
        self._waiting = Waiting(self.backwards.threads, bucket_bytes)
        self.attached = Attached(self, self._waiting, device, check, deal)
        self.slots: Slots = self.attached.slots
        self.backend = backend
        self.window = window
        self.scaling = scaling
        self.sums = Sums(backend, self.attached)
        self.adder = Adder(backend, window, scaling, self.sums, wants_norm, self.attached.queues)
        self.trouble = Trouble()
        self.by_hand = ByHand(self.slots, window, self.backwards)
        arrive = WeakMethod(self.arrive_together)
        parts = Parts(self.slots, window, scaling, self.trouble, device, arrive)
        self.engines = Watch(self.attached, parts, serve)
        self._bucket_bytes = self._queue_bytes = bucket_bytes
        self._n_fitted = 0

    @property
    def reduction(self) -> Reducing:
        """What averages over processes."""
        return self.engines.reduction

    def attach(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        """See `Attached.attach`."""
        self.attached.attach(named_params)
        self._fit()

    def attach_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """See `Attached.attach_groups`."""
        self.attached.attach_groups(groups)
        self._fit()

    def _fit(self) -> None:
        """Let the sums and the queue fit the parameters, where there are more than before."""
        if len(self.slots) > self._n_fitted:
            self.sums.forget()
            largest = max(slot.nbytes for slot in self.slots.values())
            self._queue_bytes = self._bucket_bytes - min(largest, self._bucket_bytes // 2)
            self._n_fitted = len(self.slots)
            self.engines.meet()

    # --- the backward ---

    def make_room(self, slot: Slot) -> None:  # see `hooks.Owner`
        self.make_ready(slot)
        if self._waiting.nbytes + slot.nbytes > self._waiting.limit:
            self.flush()

    def make_ready(self, slot: Slot) -> None:
        """A gradient comes in this backward: have the accumulator hold what counts of before."""
        if (task := current_task()) not in self.backwards.threads:
            self._begin(task)
        grad = slot.param.grad
        if slot.pending:
            self.flush()  # it arrives twice in one backward: add the first gradient first
        elif grad is not None and grad is not slot.grad:
            self.adopt([(slot, grad)])
        elif grad is None and (self.window.steps is None or slot.fill is Fill.CURRENT):
            slot.fill = Fill.EMPTY  # somebody took it away: zero_grad(), or `p.grad = None`

    def arrive_together(self, slots: Sequence[Slot]) -> None:
        """An engine is about to assign `param.grad` of all or some of these, at once."""
        if (task := current_task()) not in self.backwards.threads:
            self._begin(task)
        waiting = self._waiting
        n_bytes = waiting.nbytes + sum(s.nbytes for s in slots)
        if n_bytes > waiting.limit or any(s.pending for s in slots):
            self.flush()
        limit, waiting.limit = waiting.limit, math.inf  # nothing is there yet that could be added
        try:
            for slot in slots:
                self.make_room(slot)
                waiting.put(slot, False)
        finally:
            waiting.limit = limit
        if self.engines.is_ending:  # another root of FSDP2, whose callback runs after ours
            self.engines.let_come(slots)
            queue_callback(self.flush)

    # Not traced: compiled autograd would stop at the code below the error, and not say why.
    @untraced
    def _begin(self, task: int) -> None:
        """A backward reaches its first parameter.

        Raises:
            RuntimeError: for a backward that cannot come out right. Nothing has changed then.
        """
        refuse_kind()
        self.engines.begin()
        is_nested = self.backwards.enter(task)
        try:
            if is_nested or self.trouble.reason is not None:
                self._recover()
            elif self.by_hand.is_emptied():
                self._discard_emptied()
            if not self.backwards.count and not self.window.micro_batches:
                self.attach_groups(self.attached.groups)  # some may be unfrozen since
            self._refuse_zeroed()
            self.window.check_arrival()
            self.scaling.begin(self.attached.device)
            if len(self.backwards.threads) == 1:
                self.reduction.begin()
                self._waiting.limit = min(self._queue_bytes, self.reduction.queue_bytes)
        except BaseException:
            self.backwards.end(task)
            raise
        self.backwards.begin(task)
        queue_callback(self._finish)
        self.engines.end(lambda: self.backwards.end(task))

    def _finish(self) -> None:
        """A backward has brought everything."""
        self.flush()
        if len(self.backwards.threads) == 1:
            self.reduction.end()

    @property
    def is_broken(self) -> bool:
        """Whether the window holds part of something."""
        return self.trouble.reason is not None or self.backwards.is_any_open

    def _recover(self) -> None:
        """Start afresh after model.zero_grad(), where the loop owns the window.

        That is all that the Trainer calls before it tries again with smaller batches. Since its
        first parameter arrived, a backward that goes on shows a gradient.
        """
        if self.window.steps is None and all(param.grad is None for param in self.slots):
            self.discard()

    def _discard_emptied(self) -> None:
        if self.window.steps is not None:
            self.window.warn_discarded("model.zero_grad() (or p.grad = None) after a backward()")
        self.discard()

    def flush(self) -> None:
        """Add what is queued, free it, and let `param.grad` show the accumulators."""
        queue = self._waiting.take()
        if not queue:
            return
        reduction, scale, again = self.reduction, self.window.scale(), self.adder.add_again
        if not reduction.comes_averaged and again(queue, scale, reduction.is_running):
            reduction.added(queue)
        else:
            self._add(queue, scale)

    @torch.no_grad()
    def _add(self, queue: list[Slot], scale: float) -> None:
        """The same for whatever there may be in the queue."""
        fresh: list[tuple[Slot, Tensor]] = []
        for slot in queue:
            slot.pending = False
            grad = slot.param.grad
            if grad is None:  # a function gave None for its gradient: what was there stays
                if len(self.backwards.threads) == 1:  # else it may be of one that raised before
                    self.engines.refuse_taken(slot)
                elif slot.is_due:
                    self.trouble.note(BACKWARD_RAISED)
                slot.param.grad = slot.grad if slot.fill else None
                continue
            if slot.shard is not None:
                grad = self.reduction.precise(slot, slot.part(grad))
            if grad.shape != slot.shape:
                raise RuntimeError(
                    f"a parameter changed after it was wrapped ({slot.difference()}): call "
                    "zero_grad() after changing the model, or wrap after it"
                )
            fresh.append((slot, grad))
        for part, factor in self.reduction.weighed(fresh, scale):
            self.adder.add(part, factor, is_averaged=self.reduction.is_running)
        self.reduction.added(slot for slot, _ in fresh)

    def adopt(self, assigned: list[tuple[Slot, Tensor]]) -> None:
        """Take gradients that did not come through the hook: somebody assigned `param.grad`.

        One replaces the accumulator where it stands in for it (the loop owns the window, or this
        micro-batch has arrived already: `p.grad = p.grad * 0.5`); else it is this micro-batch's
        gradient and is added.
        """
        loop_owned = self.window.steps is None
        # The pairs stay: thousands of new ones have Python's garbage collector run.
        if any(slot.shard is not None for slot, _ in assigned):
            assigned = [(slot, slot.part(grad)) for slot, grad in assigned]
        replacing = [pair for pair in assigned if loop_owned or pair[0].fill is Fill.CURRENT]
        adding = [] if loop_owned else [p for p in assigned if p[0].fill is not Fill.CURRENT]
        if adding:
            # Of a parameter that was unfrozen since, autograd kept it, and no hook saw a backward.
            self.window.check_arrival()
            self.scaling.begin(self.attached.device)
            self.backwards.count = max(self.backwards.count, 1)  # so that its removal is seen
        with self.trouble.unless_done("taking over gradients that were assigned to p.grad"):
            for slot, _ in replacing:
                slot.fill = Fill.EMPTY
            if replacing:
                self.adder.add(replacing, 1.0, is_scaled=False)
            if adding:
                self.adder.add(adding, self.window.scale())
                self.reduction.changed()

    # --- between backwards ---

    @property
    def is_open(self) -> bool:  # see `hooks.Owner`
        return bool(self.window.micro_batches) or self.unclosed() is not None

    def unclosed(self) -> str | None:
        """What the open micro-batch was left by, in words; None where none is open."""
        if self.is_broken:
            return "a failed backward()" if self.backwards.is_any_open else "what step() refuses"
        return "backward() without step()" if self.slots.has_arrivals else None

    def fail_block(self) -> None:
        """A micro_batch() block raised."""
        if self.slots.has_arrivals:
            self.trouble.note("a micro_batch() block raised after its backward()" + PART)

    def check(self) -> None:
        """Raise if the open window cannot be used, naming what happened and the way out."""
        self.attached.refuse_gone()
        self.engines.note_ending()
        self.reduction.watch_hooks()
        if self.backwards.is_any_open:
            self.trouble.note(BACKWARD_RAISED)
        if self.trouble.reason is not None:
            self._recover()
        self.trouble.refuse(self.window.micro_batches)

    def look(self) -> list[tuple[Slot, Tensor]]:
        """Notice what somebody did to `p.grad`: took gradients away, zeroed them, assigned others.

        Returns:
            Those that were assigned.

        Raises:
            RuntimeError: for what cannot be made good.
        """
        if self.is_broken:
            self._recover()
        seen = self.by_hand.look()
        self._refuse_zeroed()
        if seen.is_emptied and not seen.assigned:
            self._discard_emptied()
            return []
        for slot in seen.earlier:  # the model's zero_grad() after step() keeps a window too
            if slot.param.grad is None:
                slot.param.grad = slot.grad
        return seen.assigned

    def _refuse_zeroed(self) -> None:
        """Raise if closed micro-batches were zeroed in place before the open one brought anything;
        where the loop owns the window, that starts it afresh, as torch has it."""
        if self.backwards.count or self.trouble.reason is not None or not self.by_hand.is_zeroed():
            return
        if self.window.steps is None:
            self.window.reset()
            return
        self.trouble.note(
            "the accumulators of the open window were zeroed in place, as "
            "model.zero_grad(set_to_none=False) does, and what its closed micro-batches had "
            "brought is lost; nothing was updated. The optimizer's zero_grad() knows the window, "
            "the model's does not"
        )
        self.check()

    def adopt_assigned(self) -> None:
        """`look`, and take over what was assigned."""
        if assigned := self.look():
            self.adopt(assigned)

    def close_micro_batch(self) -> None:
        """The open micro-batch is over."""
        self.reduction.refuse_kept(is_over=False)
        with self.trouble.unless_done("closing a micro-batch"):
            self.scaling.close_micro_batch()
            self.window.close_micro_batch()
            self.backwards.count = 0
            self.slots.close_micro_batch()

    def end_window(self) -> None:
        """The window has been used. `param.grad` still shows it.

        A loop that owns the window and does not zero it goes on adding, as in torch. A mean (the
        wrapper counts, or the loop gives weights) starts afresh with the next gradient.
        """
        self.backwards.count = 0
        self.slots.end_window(keeps=not self.window.is_weighted)
        self.scaling.end_window()
        self.window.reset()
        self.reduction.reset()

    def start_counting(self) -> None:
        """The wrapper counts from now on, or to another number: sums of a loop are over."""
        for slot in self.slots.values():
            if not slot.is_zero:
                slot.fill = Fill.EMPTY
        self.window.reset()

    def discard(self, zeroes: bool = False) -> None:
        """Forget the window. The accumulators' next use stores, so nothing is written.

        Args:
            zeroes: gradients that are shown become zeros, which the next update uses, as torch's
                `zero_grad(set_to_none=False)` has it.
        """
        self.engines.forget(is_sure=not self.backwards.is_any_open)
        self.trouble.note("zero_grad() was interrupted")
        self._waiting.take()
        self.slots.empty()
        for slot in self.slots.showing_others():
            slot.show_again()
        for slot in self.slots.values() if zeroes else ():
            if slot.param.grad is not None:
                slot.show_zeros()
        self.scaling.reset()
        self.window.reset()
        self.reduction.reset()
        self.backwards.forget()
        self.trouble.reason = None

    def sums_of_squares(self) -> Tensor:
        """Partial sums of squares of all filled accumulators; collective where there are shards."""
        unsure = self.scaling.may_have_divided or may_reduce()
        return self.reduction.whole(self.sums.of_filled(unsure))
