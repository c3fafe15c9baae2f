"""Processes that do not have the same parameters and settings: refused before anything is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..window.slots import Slot


def disagreement(
    group: ProcessGroup, settings: Mapping[str, Any], slots: Sequence[Slot]
) -> str | None:
    """Compare this process with the first one of the group; collective.

    Args:
        group: of processes.
        settings: by name.
        slots: of the parameters that are averaged, in the optimizer's order.

    Returns:
        The first difference of each process that differs, the same in every process, and what to
        do; None where there is none.
    """
    own = dict(settings)
    own["number of parameters that need a gradient"] = len(slots)
    for i, slot in enumerate(slots):
        dtype = str(slot.dtype).removeprefix("torch.")
        own[f"parameter {i}"] = f"{dtype} {tuple(slot.param.shape)}"
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group)
    first = everyone[0]
    found = []
    for rank, other in enumerate(everyone):
        name = next((n for n in {**first, **other} if first.get(n) != other.get(n)), None)
        if name is not None:
            found.append(
                f"{name} is {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}"
            )
    if not found:
        return None
    return (
        f"the processes do not train the same: {'; '.join(found)}. Nothing was updated. Build "
        "model and optimizer in the same way in every process"
    )
