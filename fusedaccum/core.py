"""What a `FusedAccumOptimizer` is made of, and what becomes of it when parameters change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends
from .distributed.processes import Processes
from .integrations import checkpoint, handover
from .integrations.face import OwnStep, SharingOptimizer
from .options import Options
from .rules import packages, registry
from .update.masters import Masters
from .update.record import Record
from .update.summary import Summary
from .update.updater import Updater
from .window import blocks
from .window.advice import Advice
from .window.collector import Collector
from .window.engines import exchanged, refuse_exchange
from .window.grad_scaler import Scaling
from .window.hooks import DETACHED
from .window.linears import Linears
from .window.shards import is_sharded
from .window.trouble import PART
from .window.weights import Window

PARTLY_UPDATED = ", so that some parameters may be updated and others not"


class Core:
    """The parts of one wrapper, made for the parameters as they are and anew where they moved.

    Args:
        optimizer: the wrapped one.
        options: the settings, checked.

    Attributes:
        window, scaling, collector, updater: the parts.
        processes: what other processes have to do with it.
        record: what the host remembers of the updates.
        summary: says once, in the log, what serves the parameters.
        linears: layers whose weight gradients never exist.
        window_closed: whether the last step() or flush() ended a window.
    """

    def __init__(self, optimizer: Optimizer, options: Options) -> None:
        self.optimizer, self.options = optimizer, options
        self.window_closed = False
        self.advice = Advice()
        self.record, self.summary = Record(), Summary()
        # What load_state_dict() was given, until all of it is taken over.
        self._loading: dict[str, Any] | None = None
        # The state that moves along, until the parts for moved parameters are complete.
        self._moving: dict[str, Any] | None = None
        self.processes = Processes(weakref.ref(self), type(optimizer), options)
        self._build()
        self.linears = Linears(self.collector)
        self.processes.broadcast(self.collector.slots)
        core_ref = weakref.ref(self)

        def is_allowed() -> bool:  # for anybody's step() of the wrapped optimizer
            core = core_ref()
            # Detached or taken over, it has no slots.
            return core is None or not core.collector.slots or core.updater.wrapped.is_stepping

        own_step = optimizer.register_step_pre_hook(OwnStep(is_allowed))
        weakref.finalize(self, own_step.remove).atexit = False

    def _build(self) -> None:
        """Accumulators, hooks and tables for the parameters as they are now."""
        options = self.options
        groups = self.optimizer.param_groups
        device = next(p.device for group in groups for p in group["params"])
        cap = options.bucket_cap_mb or (64 if device.type == "cpu" else 128)
        steps = options.gradient_accumulation_steps
        self.window = Window(steps)
        self.scaling = Scaling(steps, options.grad_scaler, options.fused_unscale, device)
        masters = Masters(
            packages.master_weights(self.optimizer, options.master_weights),
            splits=registry.serve(self.optimizer),
            is_stochastic=options.stochastic_rounding,
        )
        self.collector = Collector(
            backends.get(options.backend, device),
            self.window,
            bucket_bytes=int(cap * 2**20),
            wants_norm=options.wants_norm,
            scaling=self.scaling,
            device=device,
            check=masters.check,
            serve=self.processes.serve,
            deal=self.processes.deal(),
        )
        self.updater = Updater(
            self.optimizer,
            self.collector,
            masters,
            self.record,
            is_stochastic=options.stochastic_rounding,
            seed=options.seed,
        )
        self.collector.attach_groups(groups)
        self.processes.average_in_group(self.collector.engines)

    def change(self, name: str, value: Any) -> None:
        """Assign a setting.

        Raises:
            TypeError, ValueError: for a value that the constructor would refuse.
            RuntimeError: for another number of micro-batches inside a window.
        """
        old = self.options
        options = replace(old, **{name: value}).checked(self.optimizer, SharingOptimizer)
        steps = options.gradient_accumulation_steps
        if steps != old.gradient_accumulation_steps:
            self.collector.look()
            if self.collector.is_open:
                raise RuntimeError(
                    f"{name}={value!r} was assigned inside a window ({self.window.micro_batches} "
                    f"closed micro-batches of {old.gradient_accumulation_steps}), whose gradients "
                    "are scaled for the old number; nothing was changed. Assign it between windows "
                    "(window_closed), or call flush() or zero_grad() first"
                )
            self.collector.start_counting()
            self.window.steps = steps
            self.scaling.count_to(steps)
        self.collector.adder.wants_norm = options.wants_norm
        self.options = self.processes.options = options

    def detach(self) -> None:
        """Give the parameters and the model back."""
        self.linears.unfuse()
        self.updater.states.release()
        self.collector.reduction.detach()
        self.collector.attached.detach(DETACHED)

    # --- gradients ---

    def collect(self) -> None:
        """Have every gradient in its accumulator, or raise before anything is updated."""
        self.check_usable()
        self.collector.check()
        self._follow_exchange()
        self.collector.engines.at_step()
        self.check_params()
        self.collector.adopt_assigned()

    def check_usable(self) -> None:
        """Raise after a load that was interrupted.

        Raises:
            RuntimeError: saying that it has to be done again.
        """
        self.updater.wrapped.swap.undo()
        if self._moving is not None:
            self._reattach()
        if self._loading is not None:
            raise RuntimeError(
                "load_state_dict() was interrupted, and the states are in part the old ones; "
                "nothing was done. Call load_state_dict() again, or zero_grad(), which ends it"
            )

    def micro_batch(self, weigh: Callable[[], float]) -> AbstractContextManager[None]:
        """See `FusedAccumOptimizer.micro_batch`; `weigh` gives the weight, or raises."""

        def ready() -> Collector:
            self.check_params()  # one that was unfrozen since gets its hook before the forward
            return self.collector

        return blocks.block(ready, weigh)

    def check_params(self, reattach: bool = False) -> None:
        """Notice parameters that were added, unfrozen, or moved by `model.to()` and the like.

        Args:
            reattach: between windows, serve those that moved, and let go of those that left.
        """
        if self.collector.attached.gone:
            return
        if self._moving is not None:
            self._reattach()
        self._follow_exchange()
        self.collector.attach_groups(self.optimizer.param_groups)
        attached, may_move = self.collector.attached, reattach and not self.window.micro_batches
        if may_move and attached.is_outdated(self.optimizer.state):
            self._reattach()
        elif not may_move and attached.changed(layout=False) is not None:
            self._refuse_changed()

    def _refuse_changed(self, *, memory: bool = True) -> None:
        """Raise if a parameter changed; zero_grad() gives the window up then, wherever it is."""
        try:
            self.collector.attached.refuse_changed(memory=memory)
        except RuntimeError as error:
            if self.window.micro_batches:
                self.collector.trouble.note(str(error).partition(";")[0])
            raise

    def _follow_exchange(self) -> None:
        """Serve shards that took the place of all parameters before anything was done with them.

        Raises:
            RuntimeError: where something was.
        """
        newcomers = exchanged(self.collector.slots, self.optimizer.param_groups)
        if not newcomers or not all(is_sharded(param) for param in newcomers):
            return
        if self.optimizer.state or self.collector.is_open:
            refuse_exchange(self.collector.slots, self.optimizer.param_groups)
        self.collector.attached.detach()
        self._build()
        self.linears.follow(self.collector)

    def _reattach(self) -> None:
        """Build everything anew for parameters that moved; states move with them."""
        if self._moving is None:
            self._moving = checkpoint.save(self.optimizer.state_dict(), self.updater)
        norm = self.updater.grad_norm
        self.collector.attached.detach()
        self._build()
        self.linears.follow(self.collector)
        checkpoint.load(self._moving, self.updater)
        self.updater.grad_norm = None if norm is None else norm.to(self.collector.attached.device)
        self._moving = None

    def zero_grad(self, set_to_none: bool) -> None:
        """See `FusedAccumOptimizer.zero_grad`."""
        self.updater.wrapped.swap.undo()
        if self._loading is not None:
            self.load(self._loading)
        collector, window = self.collector, self.window
        if not collector.attached.gone:
            collector.attach_groups(self.optimizer.param_groups)
        if window.steps is not None and window.micro_batches:
            unclosed = collector.unclosed()
            if unclosed is None and collector.by_hand.is_zeroed():
                unclosed = "the accumulators were zeroed in place"
            if unclosed is None:
                if not window.is_inside:
                    window.weight = None  # of a micro-batch in which nothing arrived
                collector.by_hand.drop_assigned()
                return
            window.warn_discarded(f"zero_grad() after {unclosed}")
        collector.trouble.note("zero_grad() was interrupted")
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if set_to_none:
                    param.grad = None
                elif param.grad is not None and param not in collector.slots:
                    param.grad = param.grad.detach().zero_()
        collector.discard(zeroes=not set_to_none)
        self.check_params(reattach=True)

    # --- updates ---

    def sums_so_far(self) -> Tensor:
        """Partial sums of squares of what the coming update would use."""
        self.collect()
        reduction, counts = self.collector.reduction, self.window.steps is not None
        if not counts or reduction.comes_averaged:
            reduction.complete(closes=counts and self.collector.slots.has_arrivals)
        return self.collector.sums_of_squares()

    def clip(self, max_norm: float) -> Tensor:
        """See `FusedAccumOptimizer.clip_grad_norm_`."""
        sums = self.sums_so_far()
        self.window.max_norm = max_norm
        self.collector.by_hand.note_clip()
        reduction = self.collector.reduction
        if reduction.is_average:
            correction = reduction.correction(self.window)
        else:
            correction = self.window.correction_so_far(is_open=self.collector.slots.has_arrivals)
        return (backends.norm_of(sums) * correction).float().to(sums.device)

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure of a step()."""
        try:
            with torch.enable_grad():
                return closure()
        except BaseException:
            if self.collector.slots.has_arrivals:
                self.collector.trouble.note("the closure raised after its backward()" + PART)
            raise

    def step_with_closure(self, closure: Callable[[], Any] | None) -> Any:
        """Let an optimizer that evaluates the closure several times (LBFGS) do so.

        The gradients it reads are the fp32 accumulators; there is no window to normalise or clip.
        """
        if closure is None:
            raise TypeError(f"{type(self.optimizer).__name__}.step() needs a closure")
        self._refuse_changed()

        def evaluate() -> Any:
            loss = self.evaluate(closure)
            self.collect()
            return loss

        loss = self.updater.wrapped.step(evaluate)
        self.record.note(self.window, self.collector.reduction, None)
        self.window_closed = True
        self.collector.end_window()
        self.summary.updated(self.updater, self.options)
        return loss

    def update(self, closes: bool, hooks: AbstractContextManager[Any]) -> bool:
        """One update; then the window is over. What raises before it begins changes nothing.

        Args:
            closes: whether the open micro-batch is closed with it.
            hooks: runs those of step().

        Returns:
            Whether there was a gradient, in this process or in another one of its group.

        Raises:
            RuntimeError: inside a micro_batch() block of a loop that owns the window.
        """
        if self.window.weight is not None and not closes and self.collector.slots.has_arrivals:
            raise RuntimeError(
                "step() was called inside a micro_batch() block, whose weight does not count yet; "
                "nothing was updated. Call step() after the block; after an exception call "
                "zero_grad()"
            )
        self._refuse_changed(memory=False)  # `collect` has looked at that
        self.collector.trouble.note(self.collector.by_hand.fault())
        self.collector.trouble.refuse(self.window.micro_batches)
        self.processes.refuse_alone(self.collector.reduction)
        max_norm = self.window.max_norm or self.options.max_grad_norm
        with hooks as has_run:
            if has_run:
                self.collector.adopt_assigned()
            self.collector.reduction.complete(closes)
            has_gradient = self.collector.slots.is_any_filled
            skip, is_scaled = self.options.skip_nonfinite, self.scaling.takes_part
            apply = self.updater.prepare(max_norm, skip, is_scaled)
            with self.collector.trouble.unless_done("an update", PARTLY_UPDATED):
                if closes:
                    self.collector.close_micro_batch()
                factor = self.collector.reduction.correction(self.window)
                apply(self.scaling.correction(factor))
                if has_gradient:
                    self.record.note(self.window, self.collector.reduction, max_norm)
                if self.options.shard_states:
                    self.collector.reduction.share(self.collector.slots.filled())
                self.collector.end_window()
                self.window_closed = True
        if has_gradient:
            self.summary.updated(self.updater, self.options)
        return has_gradient

    # --- Join; see `distributed.joining.Member` ---

    def whole_state(self) -> Any:
        return handover.whole_state(self)

    def take_over(self, whole_state: Any) -> None:
        handover.take_over(self, whole_state)

    # --- checkpoints ---

    def prepare_save(self) -> None:
        """Have everything in its place that a checkpoint reads.

        Raises:
            RuntimeError: after what must not be saved.
        """
        self.check_usable()
        self.collector.check()
        if self.collector.reduction.keeps_back():
            raise RuntimeError(
                "FSDP2 keeps gradients of the open window back, which a checkpoint would lose; "
                "nothing was done. Save after a backward() that reduces them, or between windows"
            )
        if self.collector.attached.changed() is None:
            self.collector.attach_groups(self.optimizer.param_groups)
        self.collector.adopt_assigned()

    def load(self, state_dict: dict[str, Any]) -> None:
        """See `FusedAccumOptimizer.load_state_dict`."""
        self.updater.wrapped.swap.undo()
        if self.collector.attached.changed() is None:
            self.collector.attach_groups(self.optimizer.param_groups)  # what was unfrozen since
        checkpoint.check(state_dict, self.updater)
        self._loading = state_dict
        self.collector.discard()
        self.check_params(reattach=True)  # Accelerate moves the model, then loads state_dict()
        checkpoint.load(state_dict, self.updater)
        self._loading = None
