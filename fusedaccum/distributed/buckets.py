"""Stretches of the flat accumulators that are averaged in one collective each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import (
    ProcessGroup,
    ReduceOp,
    Work,
    all_reduce,
    get_backend,
    get_world_size,
)

from ..window.buffers import Block
from ..window.slots import Fill, Slot

# fp32 bytes: as DistributedDataParallel has it, but for its first, smaller bucket.
BUCKET_BYTES = 25 * 2**20


class Bucket:
    """Neighbours in one flat buffer.

    Args:
        slots: in the order of the buffer.
        group: of processes.

    Attributes:
        slots: as given.
        flat: their accumulators and the padding between them.
        waiting: how many of them still wait for gradients of the backward that is running.
        work: the collective, once it was started in this backward.
    """

    def __init__(self, slots: Sequence[Slot], group: ProcessGroup) -> None:
        self.slots = slots
        for slot in slots:
            slot.allocate()
        first, last = slots[0], slots[-1]
        self.flat: Tensor = first.block.span("acc", first.position, last.position, torch.float32)
        self.waiting = 0
        self.work: Work | None = None
        self._group = group
        # Not every backend divides by itself.
        averages = get_backend(group) == "nccl"
        self._op = ReduceOp.AVG if averages else ReduceOp.SUM
        self._divisor = 1 if averages else get_world_size(group)

    def start(self) -> None:
        """Average over the group; what has no gradient here counts as zeros."""
        for slot in self.slots:
            if slot.fill is Fill.EMPTY:
                slot.acc.zero_()
        self.work = all_reduce(self.flat, self._op, self._group, async_op=True)

    def wait(self) -> None:
        """Wait for it: the host does with gloo, the device's stream with NCCL."""
        assert self.work is not None
        self.work.wait()
        self.work = None
        if self._divisor != 1:
            self.flat.div_(self._divisor)


def buckets_of(slots: Sequence[Slot], group: ProcessGroup, max_bytes: int) -> list[Bucket]:
    """Cut parameters into buckets, in the order in which a backward completes them.

    Args:
        slots: in the optimizer's order, which is also that inside a flat buffer; a backward
            reaches the last ones first.
        group: of processes.
        max_bytes: a bucket ends where it has as many; a larger parameter is one by itself.
    """
    order = {slot: i for i, slot in enumerate(slots)}
    blocks: dict[Block, list[Slot]] = {}
    for slot in reversed(slots):
        blocks.setdefault(slot.block, []).append(slot)
    runs: list[list[Slot]] = []  # of neighbours, the last one first
    for members in blocks.values():
        n_bytes, next_position = 0, None
        for slot in members:
            if slot.position + 1 != next_position or n_bytes >= max_bytes:
                runs.append([])
                n_bytes = 0
            runs[-1].append(slot)
            n_bytes, next_position = n_bytes + 4 * slot.numel, slot.position
    runs.sort(key=lambda run: -order[run[-1]])
    return [Bucket(run[::-1], group) for run in runs]
