"""`FusedAccumOptimizer`: wrap the optimizer you have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .core import Core
from .integrations import checkpoint
from .integrations.dcp import only_initialises
from .integrations.face import HandedOver, SharingOptimizer, step_hooks
from .integrations.inference import leaves_inference
from .integrations.load_hooks import adapted
from .options import Options, calls_closure, check_positive, check_weight
from .update import describe

Closure = Callable[[], Any]
Group = dict[str, Any]


class Setting:
    """A setting that shows as an attribute; what may be assigned acts on the wrapper's parts."""

    def __init__(self, *, is_changeable: bool = False) -> None:
        self._is_changeable = is_changeable

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, kind: type | None = None) -> Any:
        return self if wrapper is None else getattr(wrapper._core.options, self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        if not self._is_changeable:
            raise AttributeError(
                f"{self._name} is fixed by the constructor: it is "
                f"{self.__get__(wrapper)!r}, got {value!r}. Call detach() and wrap again with "
                f"{self._name}={value!r}"
            )
        wrapper._core.change(self._name, value)


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
        optimizer: the optimizer to wrap, over dense bf16, fp16 or fp32 parameters on one device,
            or DTensors of those (FSDP2, tensor parallelism), of which it steps the local shards.
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
        process_group: the processes that train the same model, where no DistributedDataParallel is
            around it: gradients are averaged over them, and the parameters of the first one are
            copied to all at once. None: DistributedDataParallel is found by itself, and its group
            is taken.
        shard_states: under DistributedDataParallel or with a process_group, each process keeps
            masters and states of a part of the parameters, updates those, and sends them to the
            others (ZeRO stage 1). Whole parameters are dealt out. A state dict then holds the
            states of its own process: use torch.distributed.checkpoint, or a file per process.

    `gradient_accumulation_steps` may be assigned between windows (a batch size that grows);
    `max_grad_norm` and `skip_nonfinite` at any time, for the updates to come. The other settings
    are fixed.

    Attributes:
        optimizer: the wrapped one.

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
        process_group: torch.distributed.ProcessGroup | None = None,
        shard_states: bool = False,
    ) -> None:
        options = Options(
            gradient_accumulation_steps, max_grad_norm, master_weights, skip_nonfinite, backend,
            bucket_cap_mb, stochastic_rounding, seed, grad_scaler, fused_unscale, process_group,
            shard_states,
        ).checked(optimizer, FusedAccumOptimizer)  # fmt: skip
        self.optimizer = optimizer
        self._core, self._calls_closure = Core(optimizer, options), calls_closure(optimizer)

    _changeable = "gradient_accumulation_steps", "max_grad_norm", "skip_nonfinite"
    gradient_accumulation_steps = Setting(is_changeable=True)
    max_grad_norm = Setting(is_changeable=True)
    skip_nonfinite = Setting(is_changeable=True)
    master_weights, backend, bucket_cap_mb = Setting(), Setting(), Setting()
    stochastic_rounding, seed = Setting(), Setting()
    grad_scaler, fused_unscale = Setting(), Setting()
    process_group, shard_states = Setting(), Setting()
    grad_scale, found_inf = HandedOver(), HandedOver()

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, in mid-run if need be; its first gradient starts its history."""
        self.optimizer.add_param_group(param_group)
        try:
            self._core.collector.attach_groups(self.param_groups)
        except Exception:
            self.optimizer.param_groups.pop()
            raise

    @property
    def window_closed(self) -> bool:
        """Whether the last `step()` or `flush()` ended a window: step a scheduler then."""
        return self._core.window_closed

    @property
    def micro_batches(self) -> int:
        """Micro-batches closed so far in the open window."""
        return self._core.window.micro_batches

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of the last update's mean gradient before clipping, 0-d fp32 on the device.

        None before the first update, and without both clipping and `skip_nonfinite`. Reading its
        value waits for the device; keep a `.clone()` to read it later.
        """
        return self._core.updater.grad_norm

    @property
    @leaves_inference
    def skipped_steps(self) -> Tensor:
        """Updates skipped because of NaN or Inf, 0-d int64 on the device."""
        return self._core.updater.states.scalars.skipped

    def micro_batch(self, weight: float = 1.0) -> AbstractContextManager[None]:
        """Run forward and backward of one micro-batch with a weight: its token count, say.

        The update is the exact weighted mean over the window; sum w_i need not be known before.
        Where the wrapper counts to N, `step()` closes the micro-batch; where the loop owns the
        window, leaving the context does.

        Args:
            weight: from 1e-18 to 1e18. A device tensor is read, which waits for it: count tokens
                on the CPU where you can.

        Raises:
            TypeError, ValueError: for a weight that is no such number.
            RuntimeError: if the micro-batch before is still open; and from the block's backward, if
                micro-batches of this window had no weight.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
            >>> for n_tokens in (3, 5):
            ...     with opt.micro_batch(weight=n_tokens):
            ...         model(torch.randn(n_tokens, 4)).mean().backward()
            ...     opt.step()
        """
        return self._core.micro_batch(lambda: check_weight(weight))

    @leaves_inference
    def step(self, closure: Closure | None = None) -> Any:
        """Close the micro-batch; update if that ends the window.

        Nothing waits for the device (but docs/wrong_use.md names the exception).

        Args:
            closure: run first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: if a backward raised half-way, or a parameter changed its dtype, shape or
                device since it was wrapped. Nothing is updated then.
        """
        core = self._core
        if closure is None and only_initialises(core.updater):
            return None
        with core.scaling.received(vars(self)):
            if self._calls_closure:
                return core.step_with_closure(closure)
            loss = None if closure is None else core.evaluate(closure)
            core.collect()
            core.advice.before_step(core.collector, self.param_groups)
            steps = core.window.steps
            if steps is None or core.window.is_last:
                core.update(closes=steps is not None, hooks=self._hooks())
            else:
                core.collector.close_micro_batch()
                core.window_closed = False
        return loss

    # Keeps torch.optim.Optimizer from patching step() to run hooks at every call: they run once per
    # update.
    step.hooked = True  # type: ignore[attr-defined]

    @leaves_inference
    def flush(self) -> None:
        """Update now with a partial window, divided by what really arrived. No window: no effect.

        With more than one process all have to call it, also one without a micro-batch, and as often
        as the others have windows left (docs/distributed.md).

        Raises:
            RuntimeError: as `step()` does, and where the loop owns the window: `step()` it is then.
        """
        if self.gradient_accumulation_steps is None:
            raise RuntimeError(
                "flush() is for gradient_accumulation_steps=N; here the loop owns the window: "
                "call step()"
            )
        core = self._core
        core.collect()
        is_open = core.collector.slots.has_arrivals
        core.window_closed = False
        has_any = is_open or core.window.micro_batches > 0
        if has_any or core.window.is_shared:
            has_gradient = core.update(closes=is_open, hooks=self._hooks())
            core.window_closed = has_any or has_gradient

    @leaves_inference
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Start afresh; inside a window of N micro-batches keep what was accumulated.

        Between `backward()` and `step()` the open micro-batch cannot be taken out of the sum
        again: the whole window is discarded then, with a warning. The same recovers from a
        backward that raised half-way.
        """
        del self.found_inf, self.grad_scale  # of a step() that was interrupted
        self._core.zero_grad(set_to_none)

    @leaves_inference
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the coming update to `max_norm`, inside the step: no pass over the gradients.

        Args:
            max_norm: positive; replaces `max_grad_norm` for the update that closes this window.

        Returns:
            The L2 norm of the mean gradient so far, 0-d fp32 on the device.
        """
        return self._core.clip(check_positive("max_norm", max_norm))

    def detach(self) -> Optimizer:
        """Remove every hook and give the plain optimizer and model back.

        Masters are dropped; states of bf16 and fp16 parameters are rounded to the parameter's
        dtype, as plain torch keeps them. Returns the wrapped optimizer. This one refuses to be used
        after that: wrap the plain optimizer again.

        Raises:
            RuntimeError: inside a window, whose gradients would be lost.
        """
        core = self._core
        if core.collector.attached.gone:
            return self.optimizer
        core.collector.look()
        if self.shard_states and self.state:
            raise RuntimeError(
                "detach() with shard_states=True would leave each process with the states of some "
                "parameters, of which plain torch would start the others afresh; nothing was done. "
                "Save with torch.distributed.checkpoint, and load that into a plain optimizer"
            )
        if core.collector.is_open:
            raise RuntimeError(
                f"detach() inside a window would lose {self.micro_batches} micro-batches: "
                "call flush() (or step()) to use them, or zero_grad() to discard them, first"
            )
        core.detach()
        return self.optimizer

    @leaves_inference
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict plus the key "fusedaccum".

        It loads into the plain optimizer too. Saved inside a window it carries the accumulators,
        and a run that resumes from it goes on bit for bit. A parameter whose updates were all
        skipped has no states in it, as before its first update. Tensors are shared, not copied.

        Raises:
            RuntimeError: after a backward that raised half-way.
        """
        self._core.prepare_save()
        return checkpoint.save(self.optimizer.state_dict(), self._core.updater)

    @leaves_inference
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the plain optimizer; states stay fp32.

        Raises:
            ValueError: for other groups, other shapes or another format version, naming the
                difference; nothing is loaded then.
        """
        self._core.load(adapted(state_dict, self.optimizer))

    def __repr__(self) -> str:
        core = self._core
        return describe.describe(core.updater, core.options, core.linears.describe())

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in ("train", "eval") and callable(value):
            # Schedule-free optimizers rewrite the parameters there: their masters, that is.
            return partial(self._core.updater.on_masters, value)
        return value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: False lets it unscale `p.grad`, once per window, before step().

        True has it hand over its scale instead (`window/grad_scaler.py`).
        """
        core = vars(self).get("_core")
        return core is not None and bool(core.scaling.asked())

    def found_inf_per_device(self) -> dict[torch.device, Tensor]:
        """What a linked GradScaler asks, instead of unscaling `p.grad`: it is unscaled already."""
        sums = self._core.sums_so_far()
        return {sums.device: self._core.scaling.found_inf(sums)}

    # torch's Joinable: for `Join([opt])`, where `process_group` was given.

    def join_hook(self, **options: Any) -> Any:
        """What this process does in the block when it has left it."""
        return self._core.processes.join(self, options)

    join_device = property(lambda self: self._core.collector.attached.device)
    join_process_group = property(lambda self: self.process_group)

    _linears = property(lambda self: self._core.linears)
    _updates = property(lambda self: self._core.updater)

    def _take_parameters(self) -> None:
        self._core.check_params()

    def _follow_model(self) -> None:
        if not self._core.collector.is_open:
            self._core.check_params(reattach=True)

    def _hooks(self) -> AbstractContextManager[Any]:
        """Hooks of step(), but for an optimizer whose own step() runs them itself."""
        return step_hooks(self) if self._core.updater.is_fused else nullcontext()


if torch.distributed.is_available():
    from torch.distributed.algorithms.join import Joinable

    Joinable.register(FusedAccumOptimizer)
