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
        self._host: npt.NDArray[Any] | None = None
        self.tensor = torch.empty(0, dtype=torch.float32, device=device)

    def set(self, host: npt.NDArray[Any]) -> Tensor:
        """The device copy of `host`. Nothing waits for the device.

        In a CUDA graph's capture it is always uploaded, and afterwards once more: the captured copy
        runs at replays only, and a replay may follow an upload of other numbers.
        """
        capturing = self._is_capturing()
        if capturing or self._host is None or not np.array_equal(self._host, host):
            source = torch.from_numpy(host)
            if self.tensor.shape != source.shape or self.tensor.dtype != source.dtype:
                self.tensor = torch.empty_like(source, device=self._device)
            if self._device.type == "cuda":
                source = _staging.stage(source, capturing)
            self.tensor.copy_(source, non_blocking=True)
            self._host = None if capturing else host.copy()
        return self.tensor

    def keep(self, host: npt.NDArray[Any]) -> Tensor:
        """The same for numbers that never change, without comparing them."""
        return self.set(host) if self._host is None or self._is_capturing() else self.tensor

    def _is_capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
