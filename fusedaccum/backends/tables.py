"""Launch tables: what one multi-tensor launch reads instead of one launch per tensor.

A table has a row of int64 addresses and counts per tensor and a row `(tensor, chunk)` per chunk of
`CHUNK` elements; program `i` of a launch works on chunk `i`. Tables live on the device and are
uploaded again only when an address changed, which between micro-batches is rare: the caching
allocator hands out the same blocks.

A request that comes again (`Launch`) keeps its own table. Others find theirs by their contents.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from functools import reduce
from itertools import chain
from operator import attrgetter, or_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.layout import CHUNK, VECTOR_BYTES, AccumulateRow, SquaresRow, StepRow
from .mirror import Mirror, is_capturing
from .operations import Add, Launch, Step, SumOfSquares

# Tables kept per backend of requests that keep none themselves.
MAX_TABLES = 512

Rows = npt.NDArray[np.int64]
_GRAD = (AccumulateRow.GRAD,)


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
        self._fixed: int | None = None
        self.update(rows)

    def update(self, rows: Rows) -> None:
        """Give the rows new contents; nothing moves when they are the old ones."""
        self.rows = self._rows.set(rows)
        self.chunks = self._chunks.keep(self._host_chunks)
        self._host_rows = rows
        self.is_aligned = _are_aligned(_bits(rows, self._address_columns))

    def readdress(self, columns: Sequence[int], found: Sequence[int]) -> None:
        """Give the same columns new addresses each time, listed column by column."""
        rows, n = self._host_rows, len(self._host_rows)
        if self._fixed is None:
            self._fixed = _bits(rows, [c for c in self._address_columns if c not in columns])
        for i, column in enumerate(columns):
            rows[:, column] = found[i * n : (i + 1) * n]
        self._rows.upload(rows)
        self.rows = self._rows.tensor
        self.chunks = self._chunks.keep(self._host_chunks)
        self.is_aligned = _are_aligned(reduce(or_, found, self._fixed))

    @property
    def must_upload(self) -> bool:
        """Whether the rows have to be uploaded though they are the old ones."""
        return self._rows.must_upload


def _rows(columns: Sequence[Any]) -> Rows:
    rows: Rows = np.array(columns, np.int64).T.copy()
    return rows


def _bits(rows: Rows, columns: list[int]) -> int:
    """Those that are set in any address of these columns."""
    return int(np.bitwise_or.reduce(rows[:, columns], axis=None))


def _are_aligned(bits: int) -> bool:
    return not bits & (VECTOR_BYTES - 1)


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
        self._of_graphs: set[LaunchTable] = set()  # never freed: a replay reads them

    def of_add(self, request: Add) -> Sequence[LaunchTable]:
        """A table for each dtype of the gradients; the one of a `Launch`, whose dtype is one."""
        pairs, launch = request.pairs, request.launch
        if launch is not None and launch.table is not None:
            return self._again(launch, _GRAD, [grad.data_ptr() for _, grad in pairs])
        found: list[LaunchTable] = []
        cells = request.cells or [0] * len(pairs)
        all_accs, all_grads = [acc for acc, _ in pairs], [grad for _, grad in pairs]
        for dtype, (accs, grads, own_cells) in _by_dtype(all_grads, all_accs, all_grads, cells):
            numels = list(map(Tensor.numel, accs))
            acc_addresses, grad_addresses = addresses(accs), addresses(grads)
            columns = [grad_addresses, acc_addresses, numels, own_cells]
            own = (AccumulateRow.GRAD, AccumulateRow.ACC)
            if launch is not None:
                return self._first(launch, dtype, columns, numels, own, grad_addresses.tolist())
            # The accumulators are part of the key, so that two buckets of equal shapes, such as two
            # layers of a model, keep a table each and neither is uploaded again.
            key = ("accumulate", dtype, acc_addresses.tobytes(), tuple(numels), tuple(own_cells))
            found += self._get(key, dtype, columns, numels, own)
        return found

    def of_sums(self, request: SumOfSquares) -> Sequence[LaunchTable]:
        """A table for each dtype of the tensors."""
        found: list[LaunchTable] = []
        everything = request.tensors, request.cells
        for dtype, (tensors, cells) in _by_dtype(request.tensors, *everything):
            numels = list(map(Tensor.numel, tensors))
            key = ("sum_of_squares", dtype, tuple(numels), tuple(cells))
            columns = [addresses(tensors), numels, cells]
            found += self._get(key, dtype, columns, numels, (SquaresRow.DATA,))
        return found

    def of_step(self, request: Step) -> Sequence[LaunchTable]:
        """The one table."""
        tensors, launch = request.tensors, request.launch
        n_states, n = len(tensors[0].states), len(tensors)
        own: tuple[int, ...] = (StepRow.PARAM, StepRow.ACC)
        own += () if tensors[0].master is None else (StepRow.MASTER,)
        own += tuple(range(StepRow.STATES, StepRow.STATES + n_states))
        if launch is not None and launch.table is not None:
            return self._again(launch, own, list(map(Tensor.data_ptr, launch.tensors)))
        lists: list[list[Any]] = [[t.param for t in tensors], [t.acc for t in tensors]]
        lists += [] if tensors[0].master is None else [[t.master for t in tensors]]
        lists += map(list, zip(*(t.states for t in tensors), strict=True))
        addressed = list(chain.from_iterable(lists))
        found = list(map(Tensor.data_ptr, addressed))
        numels = [t.acc.numel() for t in tensors]
        columns: list[Any] = [[0] * n] * (StepRow.STATES + n_states)
        columns[StepRow.NUMEL] = numels
        columns[StepRow.TENSOR] = [t.row for t in tensors]
        columns[StepRow.KEY] = [t.key for t in tensors]
        for i, column in enumerate(own):
            columns[column] = found[i * n : (i + 1) * n]
        dtype = tensors[0].param.dtype
        if launch is not None:
            launch.tensors = addressed
            return self._first(launch, dtype, columns, numels, own, found)
        accs = tuple(columns[StepRow.ACC])
        key = ("step", request.rule.name, dtype, request.keep, accs, tuple(numels))
        return self._get(key, dtype, columns, numels, own)

    def _first(
        self,
        launch: Launch,
        dtype: torch.dtype,
        columns: list[Any],
        numels: Sequence[int],
        address_columns: Sequence[int],
        found: list[int],
    ) -> Sequence[LaunchTable]:
        """Make the table of a launch; `found` are the addresses that `_again` compares."""
        rows = _rows(columns)
        launch.table = LaunchTable(dtype, rows, numels, address_columns, self._device)
        launch.found = found
        return self._usable(launch.table)

    def _again(
        self, launch: Launch, columns: Sequence[int], found: list[int]
    ) -> Sequence[LaunchTable]:
        """The table of a launch, with the addresses in these columns as they are now."""
        table: LaunchTable = launch.table
        if found != launch.found or table.must_upload:
            table.readdress(columns, found)
            launch.found = found
        return self._usable(table)

    def _usable(self, table: LaunchTable) -> Sequence[LaunchTable]:
        if is_capturing(self._device):
            self._of_graphs.add(table)
        return (table,) if table.n_chunks else ()

    def _get(
        self,
        key: Hashable,
        dtype: torch.dtype,
        columns: list[Any],
        numels: Sequence[int],
        address_columns: Sequence[int],
    ) -> Sequence[LaunchTable]:
        """The table under `key` with these columns; `dtype` and `numels` belong to the key."""
        rows = _rows(columns)
        table = self._tables.get(key)
        if table is None:
            table = LaunchTable(dtype, rows, numels, address_columns, self._device)
            self._tables[key] = table
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
            table.update(rows)
        return self._usable(table)


def addresses(tensors: Sequence[Tensor]) -> Rows:
    """The address of each tensor's first element."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def _by_dtype(
    tensors: Sequence[Tensor], *lists: Sequence[Any]
) -> Iterator[tuple[torch.dtype, Sequence[Sequence[Any]]]]:
    """Each dtype of `tensors`, with the items of the other lists that belong to its tensors."""
    dtypes = list(map(attrgetter("dtype"), tensors))
    kinds = dict.fromkeys(dtypes)
    for dtype in kinds:
        if len(kinds) == 1:  # nearly always
            yield dtype, lists
        else:
            own = [i for i, other in enumerate(dtypes) if other is dtype]
            yield dtype, [[items[i] for i in own] for items in lists]
