"""How many bytes of tensors a training loop keeps, and how many it needs at its worst."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class LiveBytes(TorchDispatchMode):
    """While active, follows every storage that an operation makes until it is freed.

    For CPUs, which have no max_memory_allocated. Scratch memory inside an operation is not seen.

    Args:
        known: tensors that exist already and count from the start.

    Attributes:
        live: bytes alive now.
        peak: the most there were.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        self._count(list(known), are_new=True)

    def _count(self, tensors: Any, *, are_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, n_bytes = storage._cdata, storage.nbytes() if are_new else 0
            if key in self._seen:
                continue

            def freed(_: Any, key: int = key, n_bytes: int = n_bytes) -> None:
                self.live -= n_bytes
                del self._seen[key]

            self._seen[key] = weakref.ref(storage, freed)
            self.live += n_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operation is given, and none has made, was there before: a view of it is not new.
        self._count((args, kwargs), are_new=False)
        out = func(*args, **(kwargs or {}))
        self._count(out, are_new=True)
        return out


def footprint(
    device: torch.device, build: Callable[[], T], use: Callable[[T], object]
) -> tuple[T, int, int]:
    """Build something, use it twice, and count.

    The first use makes what lasts, such as optimizer states; the second is what is judged. What was
    alive before does not count.

    Returns:
        What was built, the bytes it keeps between two uses, and the most that were alive in one.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        built = build()
        use(built)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        use(built)
        peak = torch.cuda.max_memory_allocated(device)
        return built, torch.cuda.memory_allocated(device) - before, peak - before
    with LiveBytes() as bytes_:
        built = build()
        use(built)
        gc.collect()
        bytes_.peak = bytes_.live
        use(built)
    return built, bytes_.live, bytes_.peak
