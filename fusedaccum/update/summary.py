"""One line for the log, at the first update: what serves the parameters, and at what cost."""

from __future__ import annotations

import logging

from torch import Tensor

from ..backends import why
from ..options import Options
from ..window.shards import local_of
from .describe import counted, path_of
from .updater import Updater

LOGGER = logging.getLogger("fusedaccum")
MAX_GROUPS = 4  # that are listed for one path


class Summary:
    """Logs the line once, at the level INFO of the logger "fusedaccum"."""

    def __init__(self) -> None:
        self._is_due = True

    def updated(self, updater: Updater, options: Options) -> None:
        """An update has been made, or skipped."""
        if not self._is_due:
            return
        self._is_due = False
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("%s", summary(updater, options))


def summary(updater: Updater, options: Options) -> str:
    """The line. Nothing waits for the device, and no other process takes part."""
    collector, inner = updater.collector, updater.optimizer
    device = collector.attached.device
    backend, _ = why(options.backend, device)
    of_path: dict[str, list[int]] = {}
    for index, group in enumerate(inner.param_groups):
        of_path.setdefault(path_of(updater, group), []).append(index)
    n_params = sum(param.numel() for param in collector.slots)
    kinds = {kind: n / max(n_params, 1) for kind, n in bytes_of(updater).items()}
    kept = ", ".join(f"{n:.3g} {kind}" for kind, n in kinds.items())
    world = collector.reduction.world
    parts = [
        f"{counted(len(collector.slots), 'tensor')}, {counted(n_params, 'parameter')} on {device}",
        f"backend {backend}",
        *(f"{_groups(indices)}: {path}" for path, indices in of_path.items()),
        f"{sum(kinds.values()):.3g} bytes per parameter ({kept})",
        f"{world} process" + ("" if world == 1 else "es"),
    ]
    return f"FusedAccumOptimizer({type(inner).__name__}): {'; '.join(parts)}"


def bytes_of(updater: Updater) -> dict[str, int]:
    """What this process keeps of the trained parameters, by kind; the buffers' padding aside."""
    found = dict.fromkeys(("of parameters", "of accumulators", "of masters", "of states"), 0)
    for param, slot in updater.collector.slots.items():
        found["of parameters"] += slot.nbytes
        found["of accumulators"] += 0 if slot.grad is None else 4 * slot.numel
        master = updater.masters.get(slot)
        if master is not None and master.tensor is not None:
            found["of masters"] += master.tensor.nbytes
        for value in updater.optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor) and value.dim():
                found["of states"] += local_of(value).nbytes
    return found


def _groups(indices: list[int]) -> str:
    """Param groups, for people."""
    listed = ", ".join(map(str, indices[:MAX_GROUPS]))
    more = len(indices) - MAX_GROUPS
    if more > 0:
        listed += f" and {more} more"
    return f"group {listed}" if len(indices) == 1 else f"groups {listed}"
