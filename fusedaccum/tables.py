"""Launch tables: what one multi-tensor launch reads instead of one launch per tensor.

A table has a row of int64 addresses and counts per tensor and a row `(tensor, chunk)` per chunk of
`CHUNK` elements; program `i` of a launch works on chunk `i`. Tables live on the device and are
uploaded again only when an address changed, which between micro-batches is rare: the caching
allocator hands out the same blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Elements per program. Large enough that the table costs nothing (20 bytes for at least 48 KiB of
# traffic), small enough that a LoRA matrix of 16 x 4096 still makes 8 programs.
CHUNK = 8192
# Every address of a launch must be a multiple of this for 128-bit accesses.
VECTOR_BYTES = 16
# Columns of a row of an update's scalars before the rule's own, as in kernels/norm.py.
OWN = 2
# Tables kept per backend. A model needs one per bucket and one per step launch.
MAX_TABLES = 512

Rows = npt.NDArray[np.int64]


def count_chunks(numel: int) -> int:
    """Chunks, so programs and partial sums, of a tensor of `numel` elements."""
    return -(-numel // CHUNK)


def upload(host: npt.NDArray[Any], device_tensor: Tensor, keep: list[Tensor]) -> None:
    """Copy `host` into `device_tensor` without waiting for the device.

    The pinned staging block comes from torch's caching host allocator, which reuses it only after
    the copy has run. A copy captured in a CUDA graph reads its source at every replay, so then the
    block is added to `keep`, which must live as long as the graph.
    """
    source = torch.from_numpy(host)
    if device_tensor.device.type != "cuda":
        device_tensor.copy_(source)
        return
    staging = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    staging.copy_(source)
    device_tensor.copy_(staging, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        keep.append(staging)


class Mirror:
    """A small host array and its copy on the device, uploaded only when the numbers change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: npt.NDArray[Any] | None = None
        self._keep: list[Tensor] = []
        self.tensor = torch.empty(0, device=device)

    def set(self, host: npt.NDArray[Any]) -> Tensor:
        """The device copy of `host`."""
        if self._host is None or not np.array_equal(self._host, host):
            if self._host is None or self._host.shape != host.shape:
                dtype = torch.from_numpy(host).dtype
                self.tensor = torch.empty(host.shape, dtype=dtype, device=self._device)
            self._host = host.copy()
            upload(self._host, self.tensor, self._keep)
        return self.tensor


class LaunchTable:
    """Rows and chunks of one launch, kept on the device.

    Args:
        rows: int64 [n_tensors, n_columns], the first contents.
        numels: element count of each tensor.
        address_columns: the columns that hold addresses (0 where there is none).
        device: where the kernel runs.
    """

    def __init__(
        self,
        rows: Rows,
        numels: Sequence[int],
        address_columns: Sequence[int],
        device: torch.device,
    ) -> None:
        counts = [count_chunks(n) for n in numels]
        self.n_chunks = sum(counts)
        self.n_elements = sum(numels)
        chunks = np.empty((self.n_chunks, 2), np.int32)
        chunks[:, 0] = np.repeat(np.arange(len(counts)), counts)
        if self.n_chunks:
            chunks[:, 1] = np.concatenate([np.arange(n) for n in counts])
        self.chunks = Mirror(device).set(chunks)
        self._address_columns = list(address_columns)
        self._rows = Mirror(device)
        self.update(rows)

    def update(self, rows: Rows) -> None:
        """Give the rows new contents; nothing moves when they are the old ones."""
        self.rows = self._rows.set(rows)
        addresses = rows[:, self._address_columns]
        self.is_aligned = not bool((addresses & (VECTOR_BYTES - 1)).any())


class TableCache:
    """The tables a backend has made, least recently used first out."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, LaunchTable] = OrderedDict()

    def get(
        self,
        key: Hashable,
        rows: Rows,
        numels: Sequence[int],
        address_columns: Sequence[int],
        device: torch.device,
    ) -> LaunchTable:
        """The table under `key` with these `rows`; `numels` belongs to the key."""
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = LaunchTable(rows, numels, address_columns, device)
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(key)
            table.update(rows)
        return table


def addresses(tensors: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """The address of each tensor's first element."""
    return np.fromiter((t.data_ptr() for t in tensors), np.int64, len(tensors))
