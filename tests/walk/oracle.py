"""The specification: what each call of the public API does to the open window, in float64.

Nothing here comes from fusedaccum; it is what the README and the docstrings promise. A method
changes the oracle as the call must change the optimizer, and leaves in `expected` the error and
the warnings that the call must give. `Unspecified` is raised, before anything changes, where
nothing is promised; a walk does not go there.

    shown p.grad   = sum over the window's micro-batches of (w_i / W_ref) g_i
    update         = shown * W_ref / sum w_i

W_ref is N w_1 where the wrapper counts N micro-batches, w_1 where the loop owns a weighted window,
and where the loop owns one without weights the update is the plain sum.
"""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor

from tests.walk.slots import DISCARDED, EMPTY, Expected, Grad, Slot, Unspecified
from tests.walk.update import Update


class Oracle:
    """The window, and through `update` the parameters.

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
        self.destroyed = False  # model.zero_grad(set_to_none=False) zeroed the accumulators
        self.removed = False  # somebody removed all that the open micro-batch had brought
        self.used = False  # the loop's sum has been used and goes on
        self.by_model = False  # model.zero_grad() discarded weights, which no call has seen yet
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

    def _notice(self) -> None:
        """The wrapper looks at p.grad: takes what was assigned, misses what was removed."""
        self.by_model = False
        if self.removed:
            if self.counts and self.micro_batches:
                self.expected.warnings.append(DISCARDED)
            self._forget()
        for slot in self.slots:
            slot.is_attached |= slot.needs_grad
            if slot.is_assigned:
                assert slot.grad is not None
                if slot.acc is None:
                    slot.acc = Grad(torch.zeros_like(slot.grad.value), slot.grad.error)
                    slot.arrived |= not self.counts
                elif not self.counts or slot.arrived:
                    slot.acc = Grad(torch.zeros_like(slot.grad.value), slot.grad.error)
                replaces = not self.counts or slot.arrived
                slot.acc = slot.acc.plus(slot.grad.value, 1.0 if replaces else self._scale())
                slot.arrived = True
                slot.show(slot.acc)
            slot.is_pending = False

    # --- calls ---

    def backward(self, grads: dict[int, Tensor], weight: float | None = None) -> None:
        """Backward of some parameters, in micro_batch(weight=) if there is one."""
        self.backwards([grads], weight)

    def backwards(self, many: list[dict[int, Tensor]], weight: float | None) -> None:
        many = [{i: g for i, g in grads.items() if self.slots[i].needs_grad} for grads in many]
        seen = [i for grads in many for i in grads if self.slots[i].is_attached]
        if self.broken:
            raise Unspecified("a backward after one that raised")
        if weight is not None:
            if not self.counts and (self.used or self.weighted is False):
                raise Unspecified("weights on top of a sum without weights")
            if self.has_assigned:
                raise Unspecified("a gradient that was assigned before a weighted micro-batch")
            if self.has_arrivals or self.weight is not None:
                self.expected.error = RuntimeError  # the one before is open
                return
        elif not self.counts and self.used and self.weighted:
            raise Unspecified("a sum on top of a weighted mean that has been used")
        if seen and self._refuse_broken():
            return
        if self.removed and seen:
            self._notice_removed_only()
        is_weighted = weight is not None or self.weight is not None
        if seen:
            if self.weighted is not None and self.weighted != is_weighted:
                if any(not self.slots[i].is_attached for grads in many for i in grads):
                    raise Unspecified("a gradient that no hook refuses")
                self.expected.error = RuntimeError  # some with weights, some without
                return
            self.weighted = is_weighted
        elif weight is not None and self.weighted is not None and not self.weighted:
            raise Unspecified("an empty weighted micro-batch among others")
        if weight is not None:
            self.weight = weight
            if not seen and not self.counts and self.weighted is None:
                self.weighted = True
        self.by_model &= not seen
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

    def _notice_removed_only(self) -> None:
        pending = [slot for slot in self.slots if slot.is_assigned]
        if pending:
            raise Unspecified("assigned after everything was removed")
        self._notice()

    def _arrive(self, slot: Slot, grad: Tensor) -> None:
        zero = torch.zeros_like(grad)
        if not slot.is_attached:  # frozen when the wrapper looked: torch accumulates, as ever
            before = slot.grad if slot.is_assigned and slot.grad is not None else Grad(zero, zero)
            slot.show(before.plus(grad, 1.0))
            slot.is_pending = True
            return
        if slot.is_assigned:
            assert slot.grad is not None
            assigned = slot.grad
            replaces = not self.counts or slot.arrived
            base = Grad(zero, zero) if replaces or slot.acc is None else slot.acc
            slot.acc = base.plus(assigned.value, 1.0 if replaces else self._scale())
            slot.is_pending = False
        elif not self.counts and slot.grad is None:
            slot.acc = None
        base = Grad(zero, zero) if slot.acc is None else slot.acc
        slot.acc = base.plus(grad, self._scale())
        slot.arrived = True
        slot.show(slot.acc)

    def broken_backward(self, grads: dict[int, Tensor]) -> None:
        """A backward that raises after these gradients."""
        if self.removed or self.destroyed or self.has_assigned or self.weight is not None:
            raise Unspecified("broken twice")
        if not all(slot.is_attached for slot in self.slots):
            raise Unspecified("what the wrapper has not seen yet")
        if self.used and self.weighted:
            raise Unspecified("a sum on top of a weighted mean that has been used")
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
        if self.used and self.weighted:
            raise Unspecified("a weighted window that is used twice")
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
        self.update.run(grads, self.max_norm if self.clip is None else self.clip, self.skip)
        self.window_closed = True
        weighted = self.weighted
        self._start()
        if self.counts:
            for slot in self.slots:
                slot.is_known &= slot.acc is None or slot.grad is slot.acc
                slot.acc = None
        else:
            if "native" in os.environ.get("WALK_LENIENT", "") and not self.update.is_fused:
                weighted = True
            self.used, self.weighted = any(s.acc is not None for s in self.slots), weighted
            if not (self.used and weighted):
                self.weighted = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """opt.zero_grad()"""
        for slot in self.slots:
            slot.is_attached |= slot.needs_grad
        if self.counts and self.micro_batches:
            if not (self.has_arrivals or self.removed or self.broken or self.destroyed):
                if self.has_assigned:
                    raise Unspecified("zero_grad() before an assigned gradient was taken up")
                return
            self.expected.warnings.append(DISCARDED)
        if self.broken and not set_to_none:
            raise Unspecified("which gradients showed when the backward raised")
        if not set_to_none and any(not slot.is_known for slot in self.slots):
            raise Unspecified("which gradients showed")
        self._forget()
        for slot in self.slots:
            slot.is_pending = False
            if set_to_none or slot.grad is None:
                slot.show(None)
            else:
                zero = torch.zeros_like(slot.grad.value)
                slot.acc = Grad(zero, zero)
                slot.show(slot.acc)

    def model_zero_grad(self, set_to_none: bool = True) -> None:
        """model.zero_grad()"""
        if self.broken:
            if self.counts and set_to_none:
                return  # does not recover
            if not set_to_none:
                raise Unspecified("which gradients showed when the backward raised")
        if set_to_none:
            if self.counts and self.has_arrivals and self.has_assigned:
                raise Unspecified("removed and assigned in one micro-batch")
            if not self.counts:
                weighted = self.weighted
                self._forget()
                self.by_model = bool(weighted)
            elif self.has_arrivals:
                self._remove([slot for slot in self.slots if slot.arrived])
            for slot in self.slots:
                slot.show(None)
                slot.is_pending = False
            return
        if any(not slot.is_known for slot in self.slots) or self.removed or self.has_assigned:
            raise Unspecified("which gradients showed")
        shown = [slot for slot in self.slots if slot.grad is not None]
        if self.counts and shown:
            accs = [s for s in shown if s.grad is s.acc and bool(s.grad.value.any())]
            if self.has_arrivals or not self.micro_batches or not accs:
                raise Unspecified("zeros written over what an open micro-batch brought")
            self.destroyed = True
        zeros = [torch.zeros_like(slot.grad.value) for slot in shown]
        if not self.counts:
            self._forget()
        for slot, zero in zip(shown, zeros, strict=True):
            grad = Grad(zero, zero)
            slot.acc = grad if not self.counts or slot.acc is not None else None
            slot.show(grad)

    def _remove(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.acc, slot.arrived = None, False
        if not self.has_arrivals:
            self.removed = True

    def set_none(self, index: int) -> None:
        """p.grad = None"""
        slot = self.slots[index]
        if self.broken or self.destroyed:
            raise Unspecified("after a failure")
        if self.counts:
            if self.has_assigned and not slot.is_assigned:
                raise Unspecified("removed and assigned in one micro-batch")
            if slot.is_assigned and (self.has_arrivals or self.removed):
                raise Unspecified("assigned and removed again")
            if not slot.arrived and self.has_arrivals:
                raise Unspecified("removed what only earlier micro-batches brought")
            if slot.acc is not None and not slot.arrived and not self.micro_batches:
                raise Unspecified("removed a zero")
            if slot.arrived:
                self._remove([slot])
        else:
            slot.acc, slot.arrived = None, False
            if all(s.acc is None and s.grad is None for s in self.slots if s is not slot):
                self._forget()
        slot.show(None)
        slot.is_pending = False

    def assign(self, index: int, grad: Tensor) -> None:
        """p.grad = tensor"""
        slot = self.slots[index]
        if self.broken or self.destroyed or self.removed or self.by_model:
            raise Unspecified("after a failure")
        if not slot.is_attached or not slot.needs_grad:
            raise Unspecified("of what the wrapper has not seen")
        if self.weighted and not slot.arrived and self.counts:
            raise Unspecified("an assigned gradient among weighted ones")
        slot.show(Grad(grad, torch.zeros_like(grad)))
        slot.is_pending = True

    def scale(self, index: int, factor: float) -> None:
        """p.grad.mul_(factor)"""
        slot = self.slots[index]
        if self.broken or self.destroyed or slot.grad is None or not slot.is_known:
            raise Unspecified("nothing to scale")
        slot.grad.value, slot.grad.error = slot.grad.value * factor, slot.grad.error * abs(factor)

    def clip_grad_norm(self, max_norm: float) -> None:
        """opt.clip_grad_norm_(); the norm it returns is in `update.returned`."""
        if self.used and self.weighted:
            raise Unspecified("a weighted window that is used twice")
        if self._refuse_broken():
            return
        self._notice()
        self.clip = max_norm
        if not self.counts:
            for slot in self.slots:
                if slot.grad is None:
                    slot.acc = None
        mean = 1.0
        if self.counts or self.weighted:
            is_open = self.counts and self.has_arrivals
            total = self.total + ((self.weight or 1.0) if is_open else 0.0)
            if self.reference is not None and total:
                mean = self.reference / total
        accs = [s.acc for s in self.slots if s.acc is not None]
        self.update.set_returned([(a.value * mean, a.error * mean) for a in accs])

    def torch_clip(self, max_norm: float) -> None:
        """torch.nn.utils.clip_grad_norm_() on everything that shows."""
        if self.broken or self.destroyed or any(not s.is_known for s in self.slots):
            raise Unspecified("what shows")
        grads = [s.grad for s in self.slots if s.grad is not None]
        if any(not slot.is_attached and slot.grad is not None for slot in self.slots):
            raise Unspecified("in the parameter's dtype")
        coef, relative = self.update.torch_clip([(g.value, g.error) for g in grads], max_norm)
        for grad in grads:
            grad.error = grad.error * coef + (grad.value * coef).abs() * relative
            grad.value = grad.value * coef

    def set_steps(self, steps: int | None) -> None:
        """opt.gradient_accumulation_steps = steps"""
        if self.broken or self.removed or self.destroyed or self.has_assigned or self.weight:
            raise Unspecified("in the middle of something")
        if steps == self.steps:
            raise Unspecified("no change")
        if self.in_window:
            self.expected.error = RuntimeError
            return
        if None in (steps, self.steps) and any(slot.grad is not None for slot in self.slots):
            raise Unspecified("whose sum it is that p.grad still shows")
        self.steps = steps

    # --- checkpoints ---

    def saved(self) -> Oracle:
        """What state_dict() holds now."""
        if self.removed or self.destroyed:
            raise Unspecified("what is left of the window")
        if self.used:
            raise Unspecified("whether p.grad of a window that was used is kept")
        snapshot = copy.deepcopy(self)
        snapshot._notice()
        for slot in snapshot.slots:
            slot.is_known = slot.is_known and slot.grad is slot.acc
            if slot.acc is None:
                slot.show(None)
            elif slot.grad is not slot.acc:
                slot.is_known = False
        for slot in self.slots:  # it may take up what was assigned
            if slot.is_assigned:
                slot.is_known = False
        return snapshot

    def resumed(self, snapshot: Oracle) -> Oracle:
        """This, after loading that."""
        result = copy.deepcopy(snapshot)
        for slot, mine in zip(result.slots, self.slots, strict=True):
            slot.needs_grad = mine.needs_grad
            slot.is_attached = slot.is_attached or mine.is_attached or mine.needs_grad
        result.steps, result.max_norm, result.skip = self.steps, self.max_norm, self.skip
        result.warned, result.window_closed = self.warned, None
        result.update.norm_is_known = False
        for param in result.update.params:
            param.moved = True
        result.expected = self.expected
        return result

    def holds_window(self) -> bool:
        return self.micro_batches > 0 or any(slot.acc is not None for slot in self.slots)

    def add_params(self, needs_grad: list[bool]) -> None:
        """New slots for parameters that `update` has already."""
        self.slots += [Slot(needs, is_attached=needs) for needs in needs_grad]
        if any(needs_grad):
            for slot in self.slots:
                slot.is_attached |= slot.needs_grad

    def detach(self) -> bool:
        """detach(); whether it goes through."""
        if self.broken or self.destroyed or self.has_assigned or self.weight is not None:
            raise Unspecified("in the middle of something")
        if self.in_window and not self.removed:
            self.expected.error = RuntimeError
            return False
        return True
