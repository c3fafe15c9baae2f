"""Accumulators averaged over the processes of a group, while the last backward still runs.

    p.grad   = mean over ranks r of sum_i (w_ri / W_ref) g_ri      (after the last backward)
    update   = p.grad * W_ref / (mean over ranks of sum_i w_ri)

Buckets of the flat accumulators are averaged in a fixed order, each as soon as its parameters have
brought as many gradients as in the backwards before; then come the sums of weights, what has to be
the same in all, overflows and which parameters anybody used, in one small collective. An average
may be averaged again, so a loop that reduces in every backward comes out right too. Only that small
tensor is ever read on the host: on a GPU in the first window, where a parameter here had no
gradient, and after a setting was assigned here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..backends.mirror import Mirror
from ..window.reducing import Alone, Parts
from ..window.slots import Fill, Slot
from ..window.weights import Window
from . import buckets
from .agreement import Comparison, Settings, disagreement
from .buckets import Bucket

BROKEN = (
    "a reduction of gradients over {} processes was interrupted in this one: the others wait for "
    "it, or their time ran out. Nothing was updated, and this process group cannot go on: end all "
    "processes (torchrun does) and resume from the last checkpoint"
)


class Reduction(Alone):
    """Averages what one collector accumulates.

    Args:
        parts: of the collector.
        group: of processes, each of which has the same parameters.
        is_served: whether a parameter is to be averaged; others stay as they are.
        is_over: whether nothing is to be averaged any more.
        is_due: asked as a backward begins: whether the loop wants an average at its end, where it
            owns the window. Where the wrapper counts, the last micro-batch's has one.
        waits: whether to average in step() and not before.
        is_joint: whether a Join block is open, which processes leave at different times.
        notify: tells those that have left it that a micro-batch begins.
        settings: gives those that hold now, by name; all processes must have the same.
    """

    def __init__(
        self,
        parts: Parts,
        group: ProcessGroup,
        *,
        is_served: Callable[[Tensor], bool] = lambda param: True,
        is_over: Callable[[], bool] = lambda: False,
        is_due: Callable[[], bool] = lambda: True,
        waits: bool = False,
        is_joint: Callable[[], bool] = lambda: False,
        notify: Callable[[], object] = lambda: None,
        settings: Settings,
    ) -> None:
        self.group = group
        self.world = dist.get_world_size(group)
        self.queue_bytes: float = math.inf
        self.is_running, self.is_average, self.shares = False, False, True
        self._slots, self._window, self._scaling, self._trouble, device, _ = parts
        self._is_served, self._is_over, self._is_due = is_served, is_over, is_due
        self._waits, self._settings = waits, settings
        self._is_joint, self._notify = is_joint, notify
        self._has_notified = False  # in this micro-batch
        self._buckets: list[Bucket] = []
        self._n_slots = -1  # when the buckets were made
        self._bucket_of: dict[Slot, Bucket] = {}
        self._next = 0  # the bucket to be started next
        # How often each parameter arrives in a backward: in this one, and before.
        self._arrivals: Counter[Slot] = Counter()
        self._expected: Counter[Slot] = Counter()
        self._comparison = Comparison(settings, self.world, dist.get_rank(group))
        self._n_fixed = 2 + self._comparison.length  # numbers before the overflows
        self._numbers = Mirror(device)
        self._sums: Tensor | None = None  # of the numbers, over the group
        self._holds_average = False  # whether the accumulators hold one, and more perhaps
        parts.window.is_shared = True

    # --- in a backward; see `window.reducing.Reducing` ---

    def begin(self) -> None:
        self._arrivals.clear()
        self.is_average = False
        if self._holds_average:
            self._holds_average = any(slot.fill for slot in self._bucket_of)
        if self._is_over():
            return
        is_due = self._is_due()
        if is_due and self._window.steps is None:
            self._refuse_again()
        if self._window.steps is None:
            self._notify()
        self._tell()
        if (self._window.is_last if self._window.steps else is_due) and not self._waits:
            self._start()

    def added(self, slots: Iterable[Slot]) -> None:
        self.is_average = False
        for slot in slots:
            self._arrivals[slot] += 1
            if not self.is_running or (bucket := self._bucket_of.get(slot)) is None:
                continue
            if bucket.work is not None:
                self.fail(
                    f"a parameter of shape {tuple(slot.shape)} got another gradient after its "
                    f"bucket was on its way to the other processes: it had {self._expected[slot]} "
                    "in each backward so far. Nothing was updated. A graph that grows has to do "
                    "so before its last micro-batch"
                )
            if self._arrivals[slot] == self._expected[slot]:
                bucket.waiting -= 1
        if self.is_running:
            self._start_ready()

    def end(self) -> None:
        for slot, n in self._arrivals.items():
            self._expected[slot] = max(self._expected[slot], n)
        if self.is_running:
            self._finish(self._window.total_so_far(is_open=True), Fill.CURRENT)

    # --- between backwards ---

    def changed(self) -> None:
        self.is_average = False

    def expect_anew(self) -> None:
        self._expected.clear()

    def refuse_kept(self, is_over: bool) -> None:
        """Nothing is kept back here, but processes that have left Join hear of a micro-batch now
        if it had no backward."""
        self._tell()
        self._has_notified = False

    def complete(self, closes: bool) -> None:
        self._check_whole()
        if self._window.steps and not self._window.is_last and self._is_joint():
            raise RuntimeError(
                "flush() was called inside Join, where processes that have no data any more wait "
                "for whole windows; nothing was updated. Leave the block, and have every process "
                "call it then"
            )
        self._tell()
        if not self.is_average and not self._is_over():
            self._start()
            self._finish(self._window.total_so_far(closes), Fill.EARLIER)

    def correction(self, window: Window) -> float | Tensor:
        if not self.is_average or self._sums is None:
            return window.correction()
        return correction_of(self._sums, self.world, window, self._comparison)

    def total(self, window: Window) -> float | Tensor:
        return total_of(self._sums if self.is_average else None, window)

    @torch.no_grad()
    def share(self, slots: Sequence[Slot]) -> None:
        for rank in sorted({slot.updater for slot in slots}):
            updated = [slot for slot in slots if slot.updater == rank]
            params = [slot.param.detach() for slot in updated]
            # As DDP's constructor does.
            dist._broadcast_coalesced(  # type: ignore[attr-defined]
                self.group, params, buckets.BUCKET_BYTES, rank
            )
            received = [slot.param for slot in updated if not slot.is_own]
            torch.autograd.graph.increment_version(received)

    def reset(self) -> None:
        self._check_whole()
        self.is_average = self._has_notified = False

    def detach(self) -> None:
        self._window.is_shared = False

    def _tell(self) -> None:
        """Tell processes that have left Join of a micro-batch that is counted, once."""
        if self._window.steps is not None and not self._has_notified:
            self._has_notified = True
            self._notify()

    def _refuse_again(self) -> None:
        """A loop is about to average, in a backward.

        Raises:
            RuntimeError: if it has before, in the same window and inside Join. The window is
                marked.
        """
        if self._holds_average and self._is_joint():
            self.fail(
                "inside Join, a loop that owns the window averaged twice without zero_grad() in "
                "between, of which a process that has left it knows nothing. Nothing was updated. "
                "Run every backward but a window's last one under no_sync(), or let the wrapper "
                "count (gradient_accumulation_steps=N)"
            )

    def _check_whole(self) -> None:
        if self.is_running:
            raise RuntimeError(BROKEN.format(self.world))

    def fail(self, reason: str) -> NoReturn:
        """Mark the window.

        Raises:
            RuntimeError: with the reason.
        """
        self._trouble.note(reason)
        raise RuntimeError(reason)

    # --- the collectives, in the same order in every process ---

    def _start(self) -> None:
        """Have every bucket wait for its parameters."""
        if len(self._slots) != self._n_slots:
            self._make_buckets()
        self.is_running, self.queue_bytes = True, buckets.BUCKET_BYTES
        self._next = 0
        for bucket in self._buckets:
            bucket.waiting, bucket.work = len(bucket.slots), None

    def _make_buckets(self) -> None:
        served = [slot for param, slot in self._slots.items() if self._is_served(param)]
        if reason := disagreement(self.group, self._settings(), served):
            self.fail(reason)
        self._buckets = buckets.buckets_of(served, self.group, buckets.BUCKET_BYTES)
        self._bucket_of = {slot: bucket for bucket in self._buckets for slot in bucket.slots}
        self._n_slots = len(self._slots)

    @torch.no_grad()
    def _start_ready(self, everything: bool = False) -> None:
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.waiting and not everything:
                return
            self._next += 1
            bucket.start()

    @torch.no_grad()
    def _finish(self, total: float, fill: Fill) -> None:
        """Average all that is left, and share the numbers of the window.

        Args:
            total: the sum of this process's weights.
            fill: of a parameter that only others had a gradient for.
        """
        with self._trouble.unless_done("averaging gradients over processes"):
            self._start_ready(everything=True)
            self._sums = self._add_numbers(total)
            for bucket in self._buckets:
                bucket.wait()
            self._take_over(fill)
            if self._scaling.overflow is not None:
                self._scaling.overflow.copy_(self._sums[self._n_fixed])
            if self._scaling.is_linked:
                self._scaling.agree(self._sums[-2 * self.world :].view(-1, 2))
            self.is_running, self.is_average, self.queue_bytes = False, True, math.inf
            self._holds_average = True
        if reason := self._comparison.disagreement(self._sums[2 : self._n_fixed]):
            self.fail(reason)

    def _add_numbers(self, total: float) -> Tensor:
        """The sums over all processes of: the total weight, whether it is a weighted window, what
        has to be the same in all, overflows, for each parameter whether it has a gradient, and the
        GradScaler's state of each process, which has zeros of the others; float64."""
        served, scaler = self._bucket_of, self._scaling.state()
        first = self._n_fixed + 1  # of the parameters
        last = first + len(served)
        host = np.zeros(last + (0 if scaler is None else 2 * self.world))
        host[:2] = total, self._window.is_weighted
        is_filled = any(slot.fill for slot in served)
        host[2 : self._n_fixed] = self._comparison.numbers(
            self._window, is_filled, self._scaling.is_behind
        )
        host[first:last] = [slot.fill is not Fill.EMPTY for slot in served]
        sums = self._numbers.set(host).clone()
        if self._scaling.overflow is not None:
            sums[self._n_fixed] = self._scaling.overflow
        if scaler is not None:
            at = last + 2 * dist.get_rank(self.group)
            sums[at : at + 2] = scaler
        dist.all_reduce(sums, group=self.group)
        return sums

    def _take_over(self, fill: Fill) -> None:
        """The average is everybody's: show it, also where only others had a gradient."""
        used: list[float] | None = None
        for i, slot in enumerate(self._bucket_of):
            if slot.fill is Fill.EMPTY:
                if used is None:
                    assert self._sums is not None
                    used = self._sums[self._n_fixed + 1 :].tolist()
                if not used[i]:
                    continue
                slot.fill, slot.is_zero = fill, False
                slot.param.grad = slot.grad
            slot.sums_version = None


def total_of(sums: Tensor | None, window: Window) -> float | Tensor:
    """The sum of the weights: of all processes, whose `sums` these are, or of this one alone."""
    return window.total if sums is None else sums[0]


def correction_of(sums: Tensor, world: int, window: Window, comparison: Comparison) -> Tensor:
    """What makes the average of all processes' sums the mean; NaN where what has to be
    the same in all differs.

    Args:
        sums: over the processes: the total weight, whether it is a weighted window, and
            `comparison`'s numbers.
        world: how many.
        window: of this process.
        comparison: with the other processes.
    """
    total, n_weighted = sums[:2]
    # That of a checkpoint which one process has written may be another one.
    reference = window.reference or window.steps or 1
    mean = torch.where(n_weighted > 0, float(reference) * world / total, 1.0)
    is_mixed = comparison.is_mixed(sums[2 : 2 + comparison.length])
    return torch.where(is_mixed, torch.nan, mean)


@torch.no_grad()
def broadcast(params: Iterable[Tensor], group: ProcessGroup, rank: int = 0) -> None:
    """Give every process the parameters of one, by default of the group's first; collective."""
    source = dist.get_global_rank(group, rank)
    for param in params:
        dist.broadcast(param.detach(), source, group)
        torch.autograd.graph.increment_version(param)
