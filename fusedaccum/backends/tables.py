"""Launch tables: what one multi-tensor launch reads instead of one launch per tensor.

A table has a row of int64 addresses and counts per tensor and a row `(tensor, chunk)` per chunk of
`CHUNK` elements; program `i` of a launch works on chunk `i`. Tables live on the device and are
uploaded again only when an address changed, which between micro-batches is rare: the caching
allocator hands out the same blocks.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.layout import CHUNK, VECTOR_BYTES, AccumulateRow, SquaresRow, StepRow
from .mirror import Mirror
from .operations import Add, Step, SumOfSquares

# Tables kept per backend. A model needs one per bucket and one per step launch.
MAX_TABLES = 512

Rows = npt.NDArray[np.int64]


def count_chunks(numel: int) -> int:
    """Chunks, so programs and partial sums, of a tensor of `numel` elements."""
    return -(-numel // CHUNK)


class LaunchTable:
    """Rows and chunks of one launch, kept on the device.

    Args:
        dtype: of the gradients, the tensors that are summed, or the parameters.
        rows: int64 [n_tensors, n_columns], the first contents.
        numels: element count of each tensor.
        address_columns: the columns that hold addresses (0 where there is none).
        device: where the kernel runs.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        rows: Rows,
        numels: Sequence[int],
        address_columns: Sequence[int],
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        counts = [count_chunks(n) for n in numels]
        self.n_chunks = sum(counts)
        self.n_elements = sum(numels)
        chunks = np.empty((self.n_chunks, 2), np.int32)
        chunks[:, 0] = np.repeat(np.arange(len(counts)), counts)
        if self.n_chunks:
            chunks[:, 1] = np.concatenate([np.arange(n) for n in counts])
        self._host_chunks, self._chunks = chunks, Mirror(device)
        self._address_columns = list(address_columns)
        self._rows = Mirror(device)
        self.update(rows)

    def update(self, rows: Rows) -> None:
        """Give the rows new contents; nothing moves when they are the old ones."""
        self.rows = self._rows.set(rows)
        self.chunks = self._chunks.keep(self._host_chunks)
        addresses = rows[:, self._address_columns]
        self.is_aligned = not bool((addresses & (VECTOR_BYTES - 1)).any())


class Tables:
    """The launch tables of one backend, least recently used first out.

    Each method makes or updates those of a request, and leaves out what has no elements. The
    columns are those of the rows of `kernels/layout.py`, in its order.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: OrderedDict[Hashable, LaunchTable] = OrderedDict()

    def of_add(self, request: Add) -> Iterator[LaunchTable]:
        """A table for each dtype of the gradients."""
        pairs = request.pairs
        cells = request.cells or [0] * len(pairs)
        for dtype, members in _by_dtype([grad for _, grad in pairs]).items():
            accs = [pairs[i][0] for i in members]
            numels = [acc.numel() for acc in accs]
            own_cells = [cells[i] for i in members]
            acc_addresses = addresses(accs)
            columns = [addresses([pairs[i][1] for i in members]), acc_addresses, numels, own_cells]
            # The accumulators are part of the key, so that two buckets of equal shapes, such as two
            # layers of a model, keep a table each and neither is uploaded again.
            key = ("accumulate", dtype, acc_addresses.tobytes(), tuple(numels), tuple(own_cells))
            yield from self._get(
                key, dtype, columns, numels, (AccumulateRow.GRAD, AccumulateRow.ACC)
            )

    def of_sums(self, request: SumOfSquares) -> Iterator[LaunchTable]:
        """A table for each dtype of the tensors."""
        for dtype, members in _by_dtype(request.tensors).items():
            tensors = [request.tensors[i] for i in members]
            numels = [tensor.numel() for tensor in tensors]
            cells = [request.cells[i] for i in members]
            key = ("sum_of_squares", dtype, tuple(numels), tuple(cells))
            yield from self._get(
                key, dtype, [addresses(tensors), numels, cells], numels, (SquaresRow.DATA,)
            )

    def of_step(self, request: Step) -> Iterator[LaunchTable]:
        """The one table."""
        tensors = request.tensors
        dtype = tensors[0].param.dtype
        numels = [t.acc.numel() for t in tensors]
        accs = addresses([t.acc for t in tensors])
        masters = [0 if t.master is None else t.master.data_ptr() for t in tensors]
        rows, keys = [t.row for t in tensors], [t.key for t in tensors]
        columns: list[Any] = [addresses([t.param for t in tensors]), masters, accs]
        columns += [numels, rows, keys]
        columns += [addresses(states) for states in zip(*(t.states for t in tensors), strict=True)]
        own = (StepRow.PARAM, StepRow.MASTER, StepRow.ACC)
        address_columns = (*own, *range(StepRow.STATES, len(columns)))
        key = ("step", request.rule.name, dtype, request.keep, accs.tobytes(), tuple(numels))
        yield from self._get(key, dtype, columns, numels, address_columns)

    def _get(
        self,
        key: Hashable,
        dtype: torch.dtype,
        columns: list[Any],
        numels: Sequence[int],
        address_columns: Sequence[int],
    ) -> Iterator[LaunchTable]:
        """The table under `key` with these columns; `dtype` and `numels` belong to the key."""
        rows = np.stack(columns, axis=1)
        table = self._tables.get(key)
        if table is None:
            table = LaunchTable(dtype, rows, numels, address_columns, self._device)
            self._tables[key] = table
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
            table.update(rows)
        if table.n_chunks:
            yield table


def addresses(tensors: Sequence[Tensor]) -> Rows:
    """The address of each tensor's first element."""
    return np.fromiter((t.data_ptr() for t in tensors), np.int64, len(tensors))


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """Indices of `tensors` by dtype; nearly always one dtype."""
    members: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        members[tensor.dtype].append(index)
    return members
