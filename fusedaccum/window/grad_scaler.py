"""torch.amp.GradScaler and a window of micro-batches.

GradScaler multiplies the loss by a scale that it lowers after an overflow and raises after a while
without one, so the micro-batches of a window may have different scales. Three ways to serve it:

linked (`grad_scaler=`)
    Gradients are divided by the scale of their own micro-batch as they are added: no pass, and
    `p.grad` is unscaled at all times. What GradScaler asks of the gradients (`unscale_`, the inf
    check of `step`) is answered from the sums of squares that the accumulation leaves. An
    overflowed micro-batch lowers the scale once; the next one starts the accumulators afresh, and
    the window is skipped when it ends. All of it on the device. Where processes average, each does
    so by itself, and at the end of the window all take the lowest scale.
handed over (`fused_unscale=True`, the loop owns the window)
    GradScaler hands its scale to `step()`, which divides in registers, as torch's fused optimizers
    do. Its own check for inf stays.
stock (neither, the loop owns the window)
    GradScaler unscales `p.grad` in a pass and does not call `step()` after an overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..backends import Correction
from ..backends.devices import with_float64


class Scaling:
    """What one optimizer knows of GradScaler.

    Args:
        steps: micro-batches per window, or None where the loop owns it.
        scaler: the linked GradScaler, or None.
        fused_unscale: whether `step()` takes the scale over.
        device: of the gradients.

    Attributes:
        overflow: 0-d fp32 on the device, above 0 once a micro-batch of the open window overflowed;
            None without a linked scaler.
        is_behind: whether only other processes go on, so that the scale is theirs.
    """

    def __init__(
        self,
        steps: int | None,
        scaler: torch.amp.GradScaler | None,
        fused_unscale: bool,
        device: torch.device,
    ) -> None:
        self._steps = steps
        self._scaler = scaler
        self._fused_unscale = fused_unscale
        self._control: Tensor | None = None
        self._divisor: Tensor | None = None  # the scale that step() was handed
        self._found_inf: Tensor | None = None
        # Whether a GradScaler asked about the coming step, and whether one did about the last.
        self._was_asked, self._is_likely = False, True
        self.overflow: Tensor | None = None
        self.is_behind = False
        if scaler is not None and scaler.is_enabled():
            _link(scaler)
            # By whether a parameter has arrived in the open micro-batch before: what 1 / scale is,
            # and whether its accumulator is kept.
            self._control = torch.ones(2, 2, dtype=torch.float32, device=device)
            self.overflow = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def is_linked(self) -> bool:
        """Whether gradients are unscaled as they are added. A disabled scaler scales nothing."""
        return self._scaler is not None and self._scaler.is_enabled()

    @property
    def scale(self) -> Tensor | None:
        """Of the linked scaler, on the device; None without one, and before its first loss."""
        return self._scaler._scale if self.is_linked else None  # type: ignore[union-attr]

    def asked(self) -> bool:
        """What `_step_supports_amp_scaling` says: True has GradScaler hand its scale to step().

        Where the wrapper counts the window without a linked scaler, that is how a GradScaler is
        noticed: it would unscale the whole sum at every micro-batch. To be asked tells that one
        takes part.
        """
        self._was_asked = True
        return self._steps is not None or self._scaler is not None or self._fused_unscale

    def count_to(self, steps: int | None) -> None:
        """The window has another length from now on."""
        self._steps = steps

    @property
    def takes_part(self) -> bool:
        """Whether `correction` may say that the update is skipped."""
        received = self._found_inf is not None or self._divisor is not None
        return received or self.overflow is not None

    @property
    def needs_norm(self) -> bool:
        """Whether every accumulation leaves its sums of squares."""
        return self._scaler is not None or self._fused_unscale

    @property
    def may_have_divided(self) -> bool:
        """Whether a GradScaler may have divided `p.grad` unseen.

        Its `unscale_` moves no version counter, so sums of squares from before may be those of the
        scaled gradient.
        """
        if self._steps is not None or self._scaler is not None or self._divisor is not None:
            return False
        return self._was_asked or self._is_likely

    # --- the backward ---

    def begin(self, device: torch.device) -> None:
        """A backward begins: read the scale, on the device.

        Raises:
            RuntimeError: if nothing was scaled yet.
        """
        if not self.is_linked:
            return
        scale = self._scaler._scale  # type: ignore[union-attr]
        if scale is None:
            raise RuntimeError(
                "grad_scaler was given, but backward() ran on a loss that it did not scale: call "
                "scaler.scale(loss).backward()"
            )
        assert self._control is not None
        self._control[:, 0] = scale.to(device, non_blocking=True).reciprocal()

    def control(self, is_first: bool) -> Tensor | None:
        """What an accumulation reads on the device: fp32 [2], a factor, and 0 to start afresh.

        Args:
            is_first: whether these tensors have not been added to in the open micro-batch.
        """
        if self._control is None or not self.is_linked:
            return None
        return self._control[0 if is_first else 1]

    def found_inf(self, sums: Tensor) -> Tensor:
        """1 where the sums of squares of all accumulators are not finite, else 0; 0-d fp32."""
        return (~sums.isfinite().all()).float()

    # --- several processes ---

    def state(self) -> Tensor | None:
        """The linked scaler's scale, and how many updates it has had; float64 [2], or None."""
        if not self.is_linked or self._control is None:
            return None
        scaler: Any = self._scaler
        if scaler._scale is None:
            scaler.scale(self._control)  # makes it
        state = torch.stack([scaler._scale.double(), scaler._growth_tracker.double()]).flatten()
        return torch.full_like(state, torch.inf) if self.is_behind else state

    def agree(self, states: Tensor) -> None:
        """Go on from the lowest scale of all processes, and from the fewest updates it has had.

        A process lowers its scale in the micro-batch that overflows, which others do not see, and
        one that ends a window early has fewer updates. Nothing is read on the host.

        Args:
            states: `state` of each, [n, 2].
        """
        scaler: Any = self._scaler
        scale, updates = states.amin(0)
        scaler._scale.copy_(scale)
        scaler._growth_tracker.copy_(updates)

    # --- the step ---

    @contextmanager
    def received(self, handed_over: dict[str, Any]) -> Iterator[None]:
        """Run a step() with what GradScaler has set on the optimizer for it.

        GradScaler takes it off again after a step that returned; after one that raised it would
        multiply its next scale with the old one.

        Raises:
            RuntimeError: for a GradScaler that cannot come out right, and for a missing one.
        """
        try:
            self._receive(handed_over)
            yield
        except BaseException:
            handed_over.pop("found_inf", None)
            handed_over.pop("grad_scale", None)
            raise

    def _receive(self, handed_over: dict[str, Any]) -> None:
        """See who calls, and refuse what is wrong."""
        self._found_inf = self._divisor = None
        if "found_inf" not in handed_over:
            if self.is_linked:
                raise RuntimeError(
                    "step() was called directly, but the gradients belong to the grad_scaler that "
                    "was given; nothing was updated. Call scaler.step(optimizer)"
                )
            return
        found_inf, scale = handed_over["found_inf"], handed_over["grad_scale"]
        if self._scaler is None and not self._fused_unscale:
            raise RuntimeError(
                "GradScaler.step() is called at every micro-batch and does not know of the window "
                "that gradient_accumulation_steps=N counts; nothing was updated. Wrap with "
                "FusedAccumOptimizer(..., grad_scaler=scaler), or use "
                "gradient_accumulation_steps=None, divide the loss by N, and call scaler.step() "
                "once per window. bf16 needs no GradScaler"
            )
        self._found_inf = found_inf
        if self._scaler is None:
            self._divisor = scale  # None after unscale_()

    def close_micro_batch(self) -> None:
        """Remember whether it overflowed; the next one then starts the accumulators afresh."""
        if self._control is not None and self.overflow is not None and self._found_inf is not None:
            found_inf = self._found_inf.to(self._control.device, non_blocking=True)
            self.overflow.add_(found_inf)
            self._control[0, 1] = found_inf == 0
            self._found_inf = None

    def correction(self, correction: float | Tensor) -> Correction:
        """The factor on the accumulated sum, and the overflow. Nothing is read on the host."""
        self.close_micro_batch()  # where the loop owns the window it was not
        factor = correction
        if self._divisor is not None:
            factor = correction * with_float64(self._divisor).double().reciprocal()
        overflow = self._found_inf if self.overflow is None else self.overflow
        self._found_inf = None
        return Correction(factor, overflow)

    def restore(self, overflow: float) -> None:
        """Go on with a window of a checkpoint."""
        if overflow and self._control is not None and self.overflow is not None:
            self.overflow.fill_(overflow)
            self._control[0, 1] = 0.0  # what overflowed is not added to
        elif overflow:
            self.overflow = torch.tensor(overflow, dtype=torch.float32, device="cpu")

    def end_window(self) -> None:
        """The window has been used."""
        self._was_asked, self._is_likely = False, self._was_asked
        self.reset()

    def reset(self) -> None:
        """The window is over, or was discarded."""
        if self._control is not None and self.overflow is not None:
            self._control[0, 1] = 1.0
            self.overflow.zero_()
        else:
            self.overflow = None


def _link(scaler: torch.amp.GradScaler) -> None:
    """Have `scaler` ask linked optimizers whether they found inf, instead of unscaling `p.grad`.

    `_unscale_grads_` is what GradScaler's subclasses override for this (torch's ShardedGradScaler,
    say). A bound method on the instance: other optimizers of the same scaler stay with the stock
    one, and a pickled scaler comes back stock.
    """
    scaler._unscale_grads_ = MethodType(_unscale_grads_, scaler)  # type: ignore[method-assign]


def _unscale_grads_(
    scaler: torch.amp.GradScaler,
    optimizer: Any,
    inv_scale: Tensor,
    found_inf: Tensor,
    allow_fp16: bool,
) -> dict[torch.device, Tensor]:
    """`GradScaler._unscale_grads_`, with linked optimizers answered for."""
    if getattr(optimizer, "grad_scaler", None) is scaler:
        found: dict[torch.device, Tensor] = optimizer.found_inf_per_device()
        return found
    return type(scaler)._unscale_grads_(scaler, optimizer, inv_scale, found_inf, allow_fp16)
