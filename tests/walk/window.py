"""The specification, first half: backward, step and flush. See `oracle.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.walk.slots import DISCARDED, EMPTY, Expected, Grad, Slot, Unspecified
from tests.walk.update import Update


class Window:
    """The window that is open, and through `update` the parameters.

    Args:
        update: parameters and the plain optimizer, in float64.
        steps: N, or None where the loop owns the window.
        max_norm, skip: max_grad_norm and skip_nonfinite.
    """

    def __init__(self, update: Update, steps: int | None, max_norm: float | None, skip: bool):
        self.update = update
        self.slots = [Slot(p.needs_grad, is_attached=p.needs_grad) for p in update.params]
        self.max_norm, self.skip = max_norm, skip
        self.window_closed: bool | None = False  # None: not promised
        self.warned: set[str] = set()  # what this wrapper has said, each thing once
        self.expected = Expected()
        self.scaled = False  # whether a GradScaler is linked
        self.is_whole = True  # whether all that p.grad shows is in what was loaded
        self.steps = steps
        self._start()

    def _start(self) -> None:
        """A new window."""
        self.micro_batches, self.total = 0, 0.0
        self.reference: float | None = None
        self.weighted: bool | None = None
        self.weight: float | None = None
        self.clip: float | None = None
        self.broken = False  # a backward raised half-way
        self.overflow = False  # of a scaled gradient, in a closed micro-batch
        self.destroyed = False  # model.zero_grad(set_to_none=False) zeroed the accumulators
        self.removed = False  # somebody removed all that the open micro-batch had brought
        self.used = False  # the loop's sum has been used and goes on
        self.by_model = False  # model.zero_grad() discarded weights or a clip, unseen by any call
        for slot in self.slots:
            slot.arrived = False

    # --- parts ---

    @property
    def counts(self) -> bool:
        return self.steps is not None

    @property
    def has_arrivals(self) -> bool:
        return any(slot.arrived for slot in self.slots)

    @property
    def has_assigned(self) -> bool:
        return any(slot.is_assigned for slot in self.slots)

    @property
    def in_window(self) -> bool:
        return self.micro_batches > 0 or self.has_arrivals

    def _scale(self) -> float:
        weight = 1.0 if self.weight is None else self.weight
        if not self.counts and self.weight is None:
            return 1.0
        if self.reference is None:
            self.reference = weight * (self.steps or 1)
        return weight / self.reference

    def _close(self) -> None:
        self._scale()
        if self.scaled and any(s.acc and not s.acc.value.isfinite().all() for s in self.slots):
            self.overflow = True
        self.total += 1.0 if self.weight is None else self.weight
        self.micro_batches += 1
        self.weight = None
        for slot in self.slots:
            slot.arrived = False

    def _forget(self) -> None:
        """The window is discarded."""
        self._start()
        for slot in self.slots:
            slot.acc = None

    def _refuse_broken(self) -> bool:
        self.broken |= self.destroyed
        if self.broken:
            self.expected.error = RuntimeError
        return self.broken

    def _discard_removed(self) -> None:
        """The wrapper misses all that the open micro-batch had brought."""
        if self.removed:
            if self.counts and self.micro_batches:
                self.expected.warnings.append(DISCARDED)
            self._forget()

    def _notice(self) -> None:
        """The wrapper looks at p.grad: takes what was assigned, misses what was removed."""
        self.by_model = False
        self._discard_removed()
        for slot in self.slots:
            slot.is_attached |= slot.needs_grad
            self._take_up(slot)
            slot.is_pending = False

    # --- calls ---

    def backward(self, grads: dict[int, Tensor], weight: float | None = None) -> None:
        """Backward of some parameters, in micro_batch(weight=) if there is one."""
        self.backwards([grads], weight)

    def backwards(self, many: list[dict[int, Tensor]], weight: float | None) -> None:
        """Several backwards of one micro-batch."""
        many = [{i: g for i, g in grads.items() if self.slots[i].needs_grad} for grads in many]
        self._check_specified([self.slots[i] for grads in many for i in grads], weight)
        if weight is not None:  # entering micro_batch() looks at p.grad
            for slot in self.slots:
                slot.is_attached |= slot.needs_grad
            self._discard_removed()
            if self.has_arrivals or self.weight is not None:
                self.expected.error = RuntimeError  # the one before is open
                return
        seen = any(self.slots[i].is_attached for grads in many for i in grads)
        if (seen or weight is not None) and self._refuse_broken():
            return
        if seen:
            self._discard_removed()
            is_weighted = weight is not None or self.weight is not None
            if self.weighted is not None and self.weighted != is_weighted:
                self.expected.error = RuntimeError  # some with weights, some without
                return
            self.weighted, self.by_model = is_weighted, False
        if weight is not None:
            self.weight = weight
            if not self.counts:
                self.weighted = True
        for grads in many:
            for i, grad in grads.items():
                self._arrive(self.slots[i], grad)
        if self.counts and seen:
            for slot in self.slots:
                # What the last window used, or what was hidden, may show or not.
                if not slot.arrived and slot.grad is not slot.acc and not slot.is_pending:
                    slot.is_known = False
        if weight is not None and not self.counts:
            self._close()

    def _check_specified(self, used: list[Slot], weight: float | None) -> None:
        if self.broken:
            raise Unspecified("a backward after one that raised")
        unseen = [slot for slot in used if not slot.is_attached]
        is_weighted = weight is not None or self.weight is not None
        unsure = unseen or any(slot.by_save for slot in used)
        if unsure and self.weighted not in (None, is_weighted):
            raise Unspecified("whether a resumed wrapper has a hook on what was frozen")
        if unseen and weight is None and any(slot.acc is not None for slot in unseen):
            raise Unspecified("what autograd itself adds to an accumulator")
        if self.removed and not all(s.is_attached for s in self.slots if s.needs_grad):
            raise Unspecified("assigned after everything was removed")
        if weight is None:
            return
        if not self.counts and (self.used or self.weighted is False):
            raise Unspecified("weights on top of a sum without weights")
        if self.has_assigned:
            raise Unspecified("a gradient that was assigned before a weighted micro-batch")
        if not used and self.weighted is False:
            raise Unspecified("an empty weighted micro-batch among others")

    def _take_up(self, slot: Slot) -> None:
        """An assigned p.grad: it replaces the accumulator where it stands for it, where the loop
        owns the window or this micro-batch has arrived; else it is this micro-batch's gradient."""
        if not slot.is_assigned:
            return
        assert slot.grad is not None
        replaces = not self.counts or slot.arrived
        if not replaces and self.weighted is None:
            self.weighted = self.weight is not None
        if replaces or slot.acc is None:
            zero = torch.zeros_like(slot.grad.value)
            slot.acc = Grad(zero, slot.grad.error)
        slot.acc = slot.acc.plus(slot.grad.value, 1.0 if replaces else self._scale())
        slot.arrived, slot.is_pending = True, False
        slot.show(slot.acc)

    def _arrive(self, slot: Slot, grad: Tensor) -> None:
        """A backward brings `grad`."""
        zero = torch.zeros_like(grad)
        if not slot.is_attached:  # frozen when the wrapper looked: torch accumulates, as ever
            before = slot.grad if slot.is_assigned and slot.grad is not None else Grad(zero, zero)
            slot.show(before.plus(grad, 1.0))
            slot.is_pending, slot.is_known = True, False  # a resumed wrapper may know it
            return
        self._take_up(slot)
        if not self.counts and slot.grad is None:
            slot.acc = None
        base = Grad(zero, zero) if slot.acc is None else slot.acc
        slot.acc = base.plus(grad, self._scale())
        slot.arrived = True
        slot.show(slot.acc)
        slot.is_known = not self.overflow  # of a window that will be skipped

    def broken_backward(self, grads: dict[int, Tensor]) -> None:
        """A backward that raises after these gradients."""
        if self.removed or self.destroyed or self.has_assigned or self.weight is not None:
            raise Unspecified("broken twice")
        is_seen = all(slot.is_attached for slot in self.slots)
        if not is_seen or any(self.slots[i].by_save for i in grads):
            raise Unspecified("what the wrapper has not seen yet, or only because of a save")
        if self.weighted and grads:
            self.expected.error = RuntimeError
            return
        if grads:
            self.broken = True
            for slot in self.slots:
                slot.is_known = False

    def step(self) -> None:
        """step()"""
        if self._refuse_broken():
            return
        self._notice()
        if not self.counts:
            for slot in self.slots:
                if slot.grad is None:
                    slot.acc = None
            self._update()
            return
        if not self.has_arrivals and EMPTY not in self.warned:
            self.expected.warnings.append(EMPTY)
        self._close()
        self.window_closed = False
        if self.micro_batches == self.steps:
            self._update()

    def flush(self) -> None:
        """flush()"""
        if not self.counts:
            self.expected.error = RuntimeError
            return
        if self._refuse_broken():
            return
        self._notice()
        if self.has_arrivals:
            self._close()
        self.window_closed = False
        if self.micro_batches:
            self._update()

    def _update(self) -> None:
        """The window is over."""
        mean = 1.0
        if self.reference is not None and self.total:
            mean = self.reference / self.total
        grads = [
            None if s.acc is None else (s.acc.value * mean, s.acc.error * mean) for s in self.slots
        ]
        clip = self.max_norm if self.clip is None else self.clip
        self.update.run(grads, clip, self.skip or self.scaled, self.overflow)
        self.window_closed = True
        goes_on = not self.counts and not self.weighted
        self._start()
        if goes_on:
            self.used = any(slot.acc is not None for slot in self.slots)
            return
        for slot in self.slots:  # p.grad goes on showing what was used; the optimizer's own step()
            # is shown the clipped mean, in the same memory.
            is_shown = slot.grad is slot.acc and self.update.is_fused
            slot.is_known &= slot.acc is None or is_shown
            slot.acc = None
