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

import torch
from torch import Tensor

from tests.walk.slots import DISCARDED, Grad, Slot, Unspecified
from tests.walk.window import Window


class Oracle(Window):
    """The second half: what takes gradients away, changes them, saves them."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """opt.zero_grad()"""
        is_lost = self.has_arrivals or self.removed or self.broken or self.destroyed
        is_kept = self.counts and self.micro_batches > 0 and not is_lost
        if is_kept and self.has_assigned:
            raise Unspecified("zero_grad() before an assigned gradient was taken up")
        is_unsure = self.broken or any(not slot.is_known for slot in self.slots)
        if not is_kept and not set_to_none and is_unsure:
            raise Unspecified("which gradients showed")
        for slot in self.slots:
            slot.is_attached |= slot.needs_grad
        if is_kept:
            self.weight = None  # of a micro-batch that brought nothing
            return
        if self.counts and self.micro_batches:
            self.expected.warnings.append(DISCARDED)
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
            if any(slot.is_assigned and not slot.is_known for slot in self.slots):
                raise Unspecified("whether it was taken up")
            if not self.counts:
                self._forget_by_model()
            elif self.has_arrivals:
                self._remove([slot for slot in self.slots if slot.arrived])
            for slot in self.slots:
                slot.hide()
            return
        if any(not slot.is_known for slot in self.slots) or self.removed or self.has_assigned:
            raise Unspecified("which gradients showed")
        shown = [slot for slot in self.slots if slot.grad is not None]
        if self.counts and shown:
            accs = [s for s in shown if s.grad is s.acc and bool(s.grad.value.any())]
            if self.has_arrivals or not self.micro_batches or not accs:
                raise Unspecified("zeros written over what an open micro-batch brought")
            self.destroyed = True
        if not self.counts and any(s.acc is None or not s.acc.value.any() for s in shown):
            raise Unspecified("zeros written over what was used, or was zero")
        if not self.counts and any(slot.arrived for slot in shown):
            raise Unspecified("zeros written over what an open micro-batch brought")
        zeros = [torch.zeros_like(slot.grad.value) for slot in shown]
        if not self.counts:
            self._forget_by_model()
        for slot, zero in zip(shown, zeros, strict=True):
            grad = Grad(zero, zero)
            slot.acc = grad if not self.counts or slot.acc is not None else None
            slot.show(grad)

    def _forget_by_model(self) -> None:
        """The loop's window is discarded, if there is a gradient whose end can be seen."""
        is_begun = self.weighted is not None or self.clip is not None
        if is_begun and not self.broken and all(slot.acc is None for slot in self.slots):
            raise Unspecified("a window without gradients, after one whose gradients still showed")
        has_more = self.weighted or self.broken or self.clip is not None
        if self.broken or any(slot.acc or slot.grad for slot in self.slots):
            self._forget()
            self.by_model = bool(has_more)

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
            if slot.is_assigned and not slot.is_known:
                raise Unspecified("whether it was taken up")
            self._check_not_zero(without=slot)
            if slot.arrived:
                self._remove([slot])
        else:
            others = [s for s in self.slots if s is not slot]
            if all(s.acc is None and s.grad is None for s in others):
                self._forget_by_model()
            elif all(s.acc is None for s in others) and (self.weighted or self.clip is not None):
                raise Unspecified("all of a window removed, beside what another one left to show")
            slot.acc, slot.arrived = None, False
        slot.hide()

    def assign(self, index: int, grad: Tensor) -> None:
        """p.grad = tensor"""
        slot = self.slots[index]
        if self.broken or self.destroyed or self.removed or self.by_model or self.scaled:
            raise Unspecified("after a failure, or whether it is scaled")
        if not slot.is_attached or not slot.needs_grad or slot.by_save:
            raise Unspecified("of what the wrapper has not seen, or only because of a save")
        if slot.is_assigned and not slot.is_known:
            raise Unspecified("whether the one before was taken up")
        if self.counts and slot.grad is None and self.has_arrivals:
            raise Unspecified("whether it replaces what was taken away")
        if self.weighted and not slot.arrived and self.counts:
            raise Unspecified("an assigned gradient among weighted ones")
        slot.show(Grad(grad, torch.zeros_like(grad)))
        slot.is_pending = True

    def scale(self, index: int, factor: float) -> None:
        """p.grad.mul_(factor)"""
        slot = self.slots[index]
        if self.broken or self.destroyed or slot.grad is None or not slot.is_known:
            raise Unspecified("nothing to scale")
        self._check_not_zero()
        slot.grad.value, slot.grad.error = slot.grad.value * factor, slot.grad.error * abs(factor)

    def _check_not_zero(self, without: Slot | None = None) -> None:
        """Zeros that are written as zeros cannot be told from a window that was zeroed (the page
        of messages says so), which ends a clip too that a loop has asked for."""
        shown = [s for s in self.slots if s.grad is not None and s is not without]
        accs = [s.acc for s in shown if s.acc is not None]
        is_begun = self.micro_batches or (not self.counts and self.clip is not None)
        if without is not None and not accs:
            return  # nothing is shown any more
        if is_begun and not self.has_arrivals and not any(a.value.any() for a in accs):
            raise Unspecified("zeros written over zeros in the middle of a window")

    def clip_grad_norm(self, max_norm: float) -> None:
        """opt.clip_grad_norm_(); the norm it returns is in `update.returned`."""
        if self.overflow:
            raise Unspecified("of a window that will be skipped")
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
        self._check_not_zero()
        if self.micro_batches and not all(bool(g.value.isfinite().all()) for g in grads):
            raise Unspecified("an infinite norm makes zeros of what closed micro-batches brought")
        coef, relative = self.update.torch_clip([(g.value, g.error) for g in grads], max_norm)
        for grad in grads:
            grad.error = grad.error * coef + (grad.value * coef).abs() * relative
            grad.value = grad.value * coef

    def set_steps(self, steps: int | None) -> None:
        """opt.gradient_accumulation_steps = steps"""
        if self.broken or self.removed or self.destroyed or self.has_assigned or self.weight:
            raise Unspecified("in the middle of something")
        if steps == self.steps or (self.scaled and steps is None):
            raise Unspecified("no change, or not with a GradScaler that is linked")
        if self.in_window:
            self.expected.error = RuntimeError
            return
        if self.clip is not None:
            raise Unspecified("whether the next update is clipped")
        if None in (steps, self.steps) and any(slot.grad or slot.acc for slot in self.slots):
            raise Unspecified("whose sum it is that p.grad still shows, or hides")
        self.steps = steps

    # --- checkpoints ---

    def saved(self) -> Oracle:
        """What state_dict() holds now."""
        if self.removed or self.destroyed:
            raise Unspecified("what is left of the window")
        if self.used:
            raise Unspecified("whether p.grad of a window that was used is kept")
        snapshot = copy.deepcopy(self)
        snapshot.is_whole &= not self.has_assigned and not any(
            slot.grad is not None and slot.acc is None for slot in self.slots
        )
        snapshot._notice()
        snapshot.is_whole &= not any(param.hides_remainder for param in self.update.params)
        if not snapshot.micro_batches and not snapshot.has_arrivals:
            for slot in snapshot.slots:  # only zeros of zero_grad(set_to_none=False) are saved
                if slot.acc is not None and bool(slot.acc.value.any()):
                    snapshot.is_whole, slot.acc = False, None
        for slot in snapshot.slots:
            slot.is_known = slot.is_known and slot.grad is slot.acc
            if slot.acc is None:
                slot.show(None)
            elif slot.grad is not slot.acc:
                slot.is_known = False
        for slot in self.slots:  # it may take up what was assigned
            slot.by_save |= slot.needs_grad and not slot.is_attached
            slot.is_attached |= slot.needs_grad
            if slot.is_assigned:
                slot.is_known = False
        return snapshot

    def resumed(self, snapshot: Oracle) -> Oracle:
        """This, after loading that."""
        result = copy.deepcopy(snapshot)
        for slot, mine in zip(result.slots, self.slots, strict=True):
            slot.needs_grad = mine.needs_grad
            slot.is_known &= slot.needs_grad or slot.acc is None
            slot.is_attached = mine.is_attached or mine.needs_grad
            slot.by_save |= mine.by_save
        if snapshot.steps != self.steps:
            result._start()  # it holds nothing, and what it was to weigh by or clip to is forgotten
        result.is_whole &= self.is_whole
        result.steps, result.max_norm, result.skip = self.steps, self.max_norm, self.skip
        result.warned, result.window_closed = self.warned, None
        result.update.norm_is_known = False
        result.update.forget_origins()
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
        if self.removed and self.micro_batches:
            self.expected.warnings.append(DISCARDED)
        return True
