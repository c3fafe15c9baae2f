"""Stretches of the flat accumulators that are averaged in one collective each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, Work, all_reduce, get_backend

from ..window.slots import Fill, Slot

# fp32 bytes: as DistributedDataParallel has it, but for its first, smaller bucket.
BUCKET_BYTES = 25 * 2**20


class Bucket:
    """Neighbours in one flat buffer.

    Attributes:
        slots: in the order of the buffer.
        flat: their accumulators and the padding between them.
        waiting: how many of them still wait for gradients of the backward that is running.
        work: the collective, once it was started in this backward.
        averages: whether that divides by the number of processes, too.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        for slot in slots:
            slot.allocate()
        first, last = slots[0], slots[-1]
        self.flat: Tensor = first.block.span("acc", first.position, last.position, torch.float32)
        self.waiting, self.averages = 0, False
        self.work: Work | None = None

    def start(self, group: ProcessGroup) -> None:
        """Average over the group; what has no gradient here counts as zeros."""
        for slot in self.slots:
            if slot.fill is Fill.EMPTY:
                slot.acc.zero_()
        self.averages = get_backend(group) == "nccl"  # by itself, which not every backend can
        op = ReduceOp.AVG if self.averages else ReduceOp.SUM
        self.work = all_reduce(self.flat, op, group, async_op=True)

    def wait(self, world: int) -> None:
        """Wait for it: the host does with gloo, the device's stream with NCCL."""
        assert self.work is not None
        self.work.wait()
        self.work = None
        if not self.averages:
            self.flat.div_(world)


def buckets_of(slots: Iterable[Slot], max_bytes: int) -> Iterator[Bucket]:
    """Cut parameters into buckets, the last ones first: the backward reaches them first.

    Args:
        slots: in the optimizer's order, which is that of the flat buffers.
        max_bytes: a bucket ends where it has as many; a larger parameter is one by itself.
    """
    run: list[Slot] = []
    for slot in reversed(list(slots)):
        is_neighbour = run and run[-1].block is slot.block and run[-1].position == slot.position + 1
        if run and (not is_neighbour or 4 * sum(s.numel for s in run) >= max_bytes):
            yield Bucket(run[::-1])
            run = []
        run.append(slot)
    if run:
        yield Bucket(run[::-1])
