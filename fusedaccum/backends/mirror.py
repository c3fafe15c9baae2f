"""Small host arrays with a copy on the device, uploaded only when the numbers change."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Pinned memory for the tables of captured CUDA graphs: 32 bytes a tensor and micro-batch.
ARENA_BYTES = 4 << 20


class _Staging:
    """Pinned memory that uploads are made from.

    Outside of a capture it comes from torch's caching host allocator, which reuses a block only
    after its copy has run. A copy captured in a CUDA graph reads its source at every replay, so
    that is a slice of `arena`, never used again; and it was allocated before, because pinned memory
    may not be allocated during a capture.
    """

    def __init__(self) -> None:
        self._arena: Tensor | None = None
        self._used = 0
        self._lock = threading.Lock()  # of what is used: every optimizer's tables come here

    def stage(self, source: Tensor, capturing: bool) -> Tensor:
        """A pinned copy of `source`."""
        if self._arena is None and not capturing:
            self._arena = torch.empty(ARENA_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        if not capturing:
            return torch.empty_like(source, pin_memory=True).copy_(source)
        with self._lock:
            start, self._used = self._used, self._used + -(-source.nbytes // 64) * 64
        if self._arena is None or self._used > ARENA_BYTES:
            raise RuntimeError(
                f"no pinned memory left for the tables of captured CUDA graphs ({ARENA_BYTES} "
                "bytes for all graphs of the process), or a capture without a window before it: "
                "run at least one window before the capture, and capture fewer graphs"
            )
        piece = self._arena[start : start + source.nbytes].view(source.dtype)
        return piece.view(source.shape).copy_(source)


_staging = _Staging()


class Mirror:
    """A small host array and its copy on the device, uploaded only when the numbers change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: npt.NDArray[Any] | None = None  # what `set` uploaded last
        self._is_there = False  # whether the device has what was uploaded last
        self._of_graphs: list[Tensor] = []  # what captured graphs read and write, also later
        self.tensor = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def must_upload(self) -> bool:
        """Whether the device's copy may be another one than the last that was uploaded."""
        return not self._is_there or bool(self._of_graphs) or is_capturing(self._device)

    def set(self, host: npt.NDArray[Any]) -> Tensor:
        """The device copy of `host`. Nothing waits for the device.

        In a CUDA graph's capture it is always uploaded, and at each use after that: captured copies
        run at replays, of which nothing is seen here.
        """
        if self.must_upload or self._host is None or not np.array_equal(self._host, host):
            self.upload(host)
            self._host = host.copy()
        return self.tensor

    def upload(self, host: npt.NDArray[Any]) -> None:
        """`set` for numbers that are known to have changed."""
        capturing = is_capturing(self._device)
        source = torch.from_numpy(host)
        if self.tensor.shape != source.shape or self.tensor.dtype != source.dtype:
            self.tensor = torch.empty_like(source, device=self._device)
        if capturing and not any(self.tensor is tensor for tensor in self._of_graphs):
            self._of_graphs.append(self.tensor)
        if self._device.type == "cuda":
            source = _staging.stage(source, capturing)
        self.tensor.copy_(source, non_blocking=True)
        self._host, self._is_there = None, not capturing

    def keep(self, host: npt.NDArray[Any]) -> Tensor:
        """`set` for numbers that never change: uploaded once, and before a capture where that can
        be, so that the graph has no copy of them."""
        if not self._is_there:
            self.upload(host)
        return self.tensor


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
