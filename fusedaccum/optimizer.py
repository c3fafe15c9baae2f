"""`FusedAccumOptimizer`: wrap the optimizer you have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import arguments, backends, checkpoint, describe, foreign
from .collect import Collector
from .scaling import Scaling
from .sharing import SharingOptimizer
from .update import Updater
from .window import Window

Closure = Callable[[], Any]
Group = dict[str, Any]


class FusedAccumOptimizer(SharingOptimizer):
    """Accumulate micro-batch gradients in fp32 and update once per window.

        update = sum_i w_i g_i / sum_i w_i          (w_i = 1 unless micro_batch(weight=) says)

    Micro-gradients are scaled and added into fp32 accumulators as the backward makes them, and
    freed at once; normalisation, clipping, the optimizer's rule and the master weights are one more
    pass. An optimizer without a fused rule keeps its own `step()`, on fp32 gradients.

    It is a `torch.optim.Optimizer` and shares `param_groups`, `state` and `defaults` with the
    wrapped one. Once a micro-batch is closed, `p.grad` is its fp32 accumulator: clip, log and
    inspect it as ever.

    Args:
        optimizer: the optimizer to wrap, over dense bf16, fp16 or fp32 parameters on one device.
        gradient_accumulation_steps: N: `step()` closes a micro-batch and every N-th updates with
            the mean (do not divide the loss); `zero_grad()` inside a window keeps it. None: the
            loop owns the window, every `step()` updates with the sum of what arrived.
        max_grad_norm: clip the mean gradient to this global L2 norm; None: no clipping.
        master_weights: None: "split" for bf16 (the parameter and an int16 remainder are together
            an exact fp32 number), "fp32" for fp16; "fp32": an fp32 copy; "none": the parameter is
            all there is, and small updates are lost in its rounding.
        skip_nonfinite: a window whose gradient holds NaN or Inf changes nothing and is counted.
        backend: None (automatic), "triton" or "torch".
        stochastic_rounding: with master_weights="none", round bf16 parameters up or down at random,
            right on average, so that small updates are not lost; needs a fused rule.
        seed: of that; the same seed draws the same bits on every backend and after a resume.
        grad_scaler: the GradScaler of fp16 training. Needed where the wrapper counts the window;
            call `scaler.scale(loss).backward(); scaler.step(opt); scaler.update()` for each
            micro-batch. Gradients are unscaled as they are added; a window with an overflow is
            skipped.
        fused_unscale: where the loop owns the window and a framework the GradScaler: `step()`
            divides by the scale, without a pass and without waiting for the device.
        bucket_cap_mb: MiB of micro-gradients that wait to be added in one launch, all that they
            take beside the accumulators. None: 128, but 64 on a CPU (benchmarks/README.md).

    Attributes:
        optimizer: the wrapped one.
        window_closed: whether the last `step()` ended a window: step a scheduler then.

    Raises:
        TypeError, ValueError: for what cannot be served, before anything is changed.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> opt = FusedAccumOptimizer(
        ...     torch.optim.AdamW(model.parameters()), gradient_accumulation_steps=2
        ... )
        >>> for x in torch.randn(4, 8, 4):
        ...     model(x).square().mean().backward()
        ...     opt.step()
        ...     opt.zero_grad()
        >>> opt.window_closed
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gradient_accumulation_steps: int | None = None,
        max_grad_norm: float | None = None,
        master_weights: str | None = None,
        skip_nonfinite: bool = True,
        backend: str | None = None,
        *,
        bucket_cap_mb: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        grad_scaler: torch.amp.GradScaler | None = None,
        fused_unscale: bool = False,
    ) -> None:
        steps = arguments.check_steps(gradient_accumulation_steps)
        max_grad_norm = arguments.check_positive_or_none("max_grad_norm", max_grad_norm)
        arguments.check_optimizer(optimizer, FusedAccumOptimizer, steps, max_grad_norm)
        self.bucket_cap_mb = arguments.check_positive_or_none("bucket_cap_mb", bucket_cap_mb)
        arguments.check_rounding(stochastic_rounding, seed, master_weights)
        arguments.check_scaler(grad_scaler, fused_unscale, steps)
        self.optimizer = optimizer
        self.gradient_accumulation_steps, self.max_grad_norm = steps, max_grad_norm
        self.master_weights, self.skip_nonfinite = master_weights, skip_nonfinite
        self.backend = backend
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self.grad_scaler, self.fused_unscale = grad_scaler, fused_unscale
        self._next_max_norm: float | None = None
        self.window_closed = False
        self._build()

    def _build(self) -> None:
        """Accumulators, hooks and tables for the parameters as they are now."""
        device = self.param_groups[0]["params"][0].device
        self._window = Window(self.gradient_accumulation_steps)
        self._scaling = Scaling(
            self.gradient_accumulation_steps, self.grad_scaler, self.fused_unscale
        )
        self._collector = Collector(
            backends.get(self.backend, device),
            self._window,
            bucket_bytes=int((self.bucket_cap_mb or (64 if device.type == "cpu" else 128)) * 2**20),
            wants_norm=self.skip_nonfinite or self.max_grad_norm is not None,
            master_weights="stochastic"
            if self.stochastic_rounding
            else foreign.master_weights(self.optimizer, self.master_weights),
            scaling=self._scaling,
        )
        self._updater = Updater(self.optimizer, self._collector, self.skip_nonfinite, self.seed)
        if self.stochastic_rounding:
            self._updater.refuse_native("stochastic_rounding=True")
        self._collector.attach_groups(self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, in mid-run if need be; its first gradient starts its history."""
        self.optimizer.add_param_group(param_group)
        try:
            self._collector.attach_groups(self.param_groups)
        except Exception:
            self.optimizer.param_groups.pop()
            raise

    @property
    def micro_batches(self) -> int:
        """Micro-batches closed so far in the open window."""
        return self._window.micro_batches

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of the last update's mean gradient before clipping, 0-d fp32 on the device.

        None before the first update, and without both clipping and `skip_nonfinite`. Reading its
        value waits for the device; keep a `.clone()` to read it later.
        """
        return self._updater.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """Updates skipped because of NaN or Inf, 0-d int64 on the device."""
        return self._updater.prepared_scalars().skipped

    @contextmanager
    def micro_batch(self, weight: float = 1.0) -> Iterator[None]:
        """Run forward and backward of one micro-batch with a weight: its token count, say.

        The update is the exact weighted mean over the window; sum w_i need not be known before.
        Where the wrapper counts to N, `step()` closes the micro-batch; where the loop owns the
        window, leaving the context does.

        Args:
            weight: positive and finite. A device tensor is read, which waits for it: count tokens
                on the CPU where you can.

        Raises:
            TypeError, ValueError: for a weight that is not a positive finite number.
            RuntimeError: if the micro-batch before is still open, or had no weight in this window.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
            >>> for n_tokens in (3, 5):
            ...     with opt.micro_batch(weight=n_tokens):
            ...         model(torch.randn(n_tokens, 4)).mean().backward()
            ...     opt.step()
        """
        value = arguments.check_weight(weight)
        if self._window.weight is not None or self._collector.has_arrivals:
            raise RuntimeError(
                "micro_batch() was entered while another micro-batch is open: call step() after "
                "each micro_batch() block (or, with gradient_accumulation_steps=None, run every "
                "backward() of the window inside such a block)"
            )
        self._window.weight = value
        try:
            yield
        except BaseException:
            if self._collector.has_arrivals:
                self._collector.failed = "a micro_batch() block raised after its backward()"
            self._window.weight = None
            raise
        if self.gradient_accumulation_steps is None:
            self._window.check_arrival()
            self._collector.close_micro_batch()

    def step(self, closure: Closure | None = None) -> Any:
        """Close the micro-batch; update if that ends the window.

        Nothing waits for the device (but see the README for optimizers without a fused rule).

        Args:
            closure: run first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: if a backward raised half-way, or a parameter changed its dtype, shape or
                device since it was wrapped. Nothing is updated then.
        """
        if closure is None and checkpoint.only_initialises(self._updater):
            return None
        with self._scaling.received(self):
            if arguments.calls_closure(self.optimizer):
                return self._step_with_closure(closure)
            with torch.enable_grad():
                loss = None if closure is None else closure()
            self._collect()
            closing = self._window.steps is None or self._window.is_last
            if self._window.steps is not None:
                self._collector.close_micro_batch()
            self.window_closed = False
            if closing:
                self._update()
        return loss

    # Keeps torch.optim.Optimizer from patching step() to run hooks at every call: they run once per
    # update.
    step.hooked = True  # type: ignore[attr-defined]

    def flush(self) -> None:
        """Update now with a partial window, divided by what really arrived. No window: no effect.

        Raises:
            RuntimeError: as `step()` does, and where the loop owns the window: `step()` it is then.
        """
        if self.gradient_accumulation_steps is None:
            raise RuntimeError(
                "flush() is for gradient_accumulation_steps=N; here the loop owns the window: "
                "call step()"
            )
        self._collect()
        if self._collector.has_arrivals:
            self._collector.close_micro_batch()
        if self._window.micro_batches:
            self._update()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Start afresh; inside a window of N micro-batches keep what was accumulated.

        Between `backward()` and `step()` the open micro-batch cannot be taken out of the sum
        again: the whole window is discarded then, with a warning. The same recovers from a
        backward that raised half-way.
        """
        if self._window.steps is not None:
            unclosed = self._collector.unclosed()
            if unclosed and self.micro_batches:
                warnings.warn(
                    f"zero_grad() after {unclosed} discards the whole window: "
                    f"{self.micro_batches} closed micro-batches",
                    RuntimeWarning,
                    stacklevel=2,
                )
            elif self.micro_batches:
                return
        self._collector.discard()
        for group in self.param_groups:
            for param in group["params"]:
                if set_to_none or param.grad is None:
                    param.grad = None
                else:
                    param.grad = param.grad.detach().zero_()
        self._check_params(reattach=True)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the coming update to `max_norm`, inside the step: no pass over the gradients.

        Args:
            max_norm: positive; replaces `max_grad_norm` for the update that closes this window.

        Returns:
            The L2 norm of the mean gradient so far, 0-d fp32 on the device.
        """
        max_norm = arguments.check_positive("max_norm", max_norm)
        self._collect()
        self._next_max_norm = max_norm
        if not self._collector.segments:
            return torch.zeros(())
        total = self._collector.sums_of_squares().double().sum()
        return (total.sqrt() * self._window.correction_so_far()).float()

    def detach(self) -> Optimizer:
        """Remove every hook and give the plain optimizer and model back.

        Masters are dropped; states of bf16 and fp16 parameters are rounded to the parameter's
        dtype, as plain torch keeps them. Returns the wrapped optimizer.

        Raises:
            RuntimeError: inside a window, whose gradients would be lost.
        """
        if self._window.micro_batches or self._collector.has_arrivals:
            raise RuntimeError(
                f"detach() inside a window would lose {self._window.micro_batches} micro-batches: "
                "call flush() (or step()) to use them, or zero_grad() to discard them, first"
            )
        checkpoint.release_states(self._updater)
        self._collector.detach()
        return self.optimizer

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict plus the key "fusedaccum".

        It loads into the plain optimizer too. Saved inside a window it carries the accumulators,
        and a run that resumes from it goes on bit for bit. Tensors are shared, not copied.

        Raises:
            RuntimeError: after a backward that raised half-way.
        """
        return checkpoint.save(self.optimizer.state_dict(), self._updater)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the plain optimizer; states stay fp32.

        Raises:
            ValueError: for other groups, other shapes or another format version, naming the
                difference; nothing is loaded then.
        """
        checkpoint.check(state_dict, self._updater)
        self._collector.discard()
        self._check_params(reattach=True)  # Accelerate moves the model, then loads state_dict()
        checkpoint.load(state_dict, self._updater)

    def __repr__(self) -> str:
        return describe.describe(self._updater, self.backend, self.max_grad_norm)

    def _found_inf_per_device(self) -> dict[torch.device, Tensor]:
        """What a linked GradScaler asks instead of unscaling `p.grad`, which is unscaled."""
        self._collect()
        sums = self._collector.sums_of_squares()
        return {sums.device: self._scaling.found_inf(sums)}

    def _collect(self) -> None:
        """Have every gradient in its accumulator, or raise before anything is updated."""
        self._collector.check_step()
        self._check_params()
        self._collector.adopt_assigned()

    def _check_params(self, reattach: bool = False) -> None:
        """Notice parameters that were added, unfrozen, or changed by `model.to()` and the like."""
        self._collector.attach_groups(self.param_groups)
        if self._collector.changed() is None:
            return
        if reattach and not self._window.micro_batches:
            self._reattach()
        else:
            self._collector.refuse_changed()

    def _reattach(self) -> None:
        """Build everything anew for parameters that moved; states move with them."""
        state = checkpoint.save(self.optimizer.state_dict(), self._updater)
        self._collector.detach()
        self._build()
        checkpoint.load(state, self._updater)

    def _step_with_closure(self, closure: Closure | None) -> Any:
        """Let an optimizer that evaluates the closure several times (LBFGS) do so.

        The gradients it reads are the fp32 accumulators; there is no window to normalise or clip.
        """
        if closure is None:
            raise TypeError(f"{type(self.optimizer).__name__}.step() needs a closure")

        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._collect()
            return loss

        loss = self.optimizer.step(evaluate)
        self.window_closed = True
        self._collector.end_window()
        return loss

    def _update(self) -> None:
        """One update; then the window is over."""
        max_norm = self.max_grad_norm if self._next_max_norm is None else self._next_max_norm
        self._next_max_norm = None
        correction = self._scaling.correction(self._window.correction())
        # The wrapped optimizer's own step() runs the hooks itself.
        with self._step_hooks() if self._updater.is_fused else nullcontext():
            self._updater.run(correction, max_norm)
        self.window_closed = True
        self._collector.end_window()
