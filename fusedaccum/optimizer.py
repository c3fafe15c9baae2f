"""`FusedAccumOptimizer`: wrap the optimizer you have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import arguments, backends, checkpoint, describe, foreign
from .collect import Collector
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
        bucket_cap_mb: MiB of micro-gradients that wait to be added in one launch, all that they
            take beside the accumulators. None: 128, but 16 on a CPU, which has them in its cache.

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
    ) -> None:
        arguments.check_optimizer(optimizer, FusedAccumOptimizer)
        steps = arguments.check_steps(gradient_accumulation_steps)
        if max_grad_norm is not None:
            max_grad_norm = arguments.check_positive("max_grad_norm", max_grad_norm)
        if bucket_cap_mb is None:
            bucket_cap_mb = 16 if optimizer.param_groups[0]["params"][0].is_cpu else 128
        self.bucket_cap_mb = arguments.check_positive("bucket_cap_mb", bucket_cap_mb)
        if arguments.calls_closure(optimizer):
            arguments.check_closure_optimizer(optimizer, steps, max_grad_norm)
        self.optimizer = optimizer
        self.gradient_accumulation_steps = steps
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self._next_max_norm: float | None = None
        self.window_closed = False
        self._build()

    def _build(self) -> None:
        """Accumulators, hooks and tables for the parameters as they are now."""
        self._window = Window(self.gradient_accumulation_steps)
        self._collector = Collector(
            backends.get(self.backend, self.param_groups[0]["params"][0].device),
            self._window,
            bucket_bytes=int(self.bucket_cap_mb * 2**20),
            wants_norm=self.skip_nonfinite or self.max_grad_norm is not None,
            master_weights=foreign.master_weights(self.optimizer, self.master_weights),
        )
        self._updater = Updater(self.optimizer, self._collector, self.skip_nonfinite)
        self._attach_new()

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, in mid-run if need be; its first gradient starts its history."""
        self.optimizer.add_param_group(param_group)
        try:
            self._attach_new()
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
        self._refuse_scaler()
        if closure is None and checkpoint.only_initialises(self._updater):
            return None
        loss = None
        if arguments.calls_closure(self.optimizer):
            if closure is None:
                raise TypeError(f"{type(self.optimizer).__name__}.step() needs a closure")
            return self._step_with_closure(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._collect()
        if self.gradient_accumulation_steps is None:
            self._update()
            return loss
        closing = self._window.is_last
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
        window, collector = self._window, self._collector
        if window.steps is not None:
            is_broken = bool(collector._open) or collector.failed is not None
            if is_broken or collector.has_arrivals:
                if window.micro_batches:
                    why = "a failed backward()" if is_broken else "backward() without step()"
                    warnings.warn(
                        f"zero_grad() after {why} discards the whole window: "
                        f"{window.micro_batches} closed micro-batches",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            elif window.micro_batches:
                return
        collector.discard()
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
        dtype, as plain torch keeps them.

        Returns:
            The wrapped optimizer.

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
        checkpoint.load(state_dict, self._updater)

    def __repr__(self) -> str:
        return describe.describe(self._updater, self.backend, self.max_grad_norm)

    def _collect(self) -> None:
        """Have every gradient in its accumulator, or raise before anything is updated."""
        self._collector.check()
        self._check_params()
        self._collector.adopt_assigned()

    def _attach_new(self) -> None:
        """Give parameters that need a gradient and have no segment yet one."""
        known = self._collector.segments
        self._collector.attach(
            (f"param_groups[{i}]['params'][{j}]", param)
            for i, group in enumerate(self.param_groups)
            for j, param in enumerate(group["params"])
            if param.requires_grad and param not in known
        )

    def _check_params(self, reattach: bool = False) -> None:
        """Notice parameters that were added, unfrozen, or changed by `model.to()` and the like."""
        self._attach_new()
        changed = [s for s in self._collector.segments.values() if s.difference()]
        if not changed:
            return
        if reattach and not self._window.micro_batches:
            self._reattach()
            return
        first = changed[0]
        raise RuntimeError(
            f"{len(changed)} parameters changed after they were wrapped (one of shape "
            f"{tuple(first.shape)}: {first.difference()}) and lost their hooks; nothing was "
            "updated. Call zero_grad() after moving or converting the model, or wrap after it"
        )

    def _reattach(self) -> None:
        """Build everything anew for parameters that moved; optimizer states move with them."""
        state = checkpoint.save(self.optimizer.state_dict(), self._updater)
        self._collector.detach()
        self._build()
        checkpoint.load(state, self._updater)

    def _step_with_closure(self, closure: Closure) -> Any:
        """Let an optimizer that evaluates the closure several times (LBFGS) do so.

        The gradients it reads are the fp32 accumulators; there is no window to normalise or clip.
        """

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
        correction = self._window.correction()
        if self._updater.is_fused:
            with self._step_hooks():
                self._updater.run(correction, max_norm)
        else:  # the wrapped optimizer's own step() runs them
            self._updater.run(correction, max_norm)
        self.window_closed = True
        self._collector.end_window()
