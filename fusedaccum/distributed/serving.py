"""What goes with the engines that have our parameters: chosen, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ..window.reducing import Parts, Reducing
from . import ddp, sharded


def serve(
    parts: Parts,
    modules: Sequence[Module],
    settings: Mapping[str, Any],
    has_group: bool,
    shares: bool,
) -> Reducing:
    """Average instead of DDP, or go with shards.

    Args:
        parts: of a collector.
        modules: of DDP and FSDP2, with parameters of it.
        settings: by name; all processes must have the same.
        has_group: whether `process_group` was given.
        shares: whether each process updates a part of the parameters (`shard_states`).

    Raises:
        ValueError: for what cannot be served, naming it and the way round.
    """
    if has_group:
        raise ValueError(
            "process_group= was given, and DistributedDataParallel (DDP), fully_shard (FSDP2) or "
            "tensor parallelism has parameters of this optimizer, and groups of its own that are "
            "taken instead: leave process_group out"
        )
    engines = [module for module in modules if isinstance(module, DistributedDataParallel)]
    if shares:
        _refuse_to_share(parts, engines)
    if any(slot.shard is not None for slot in parts.slots.values()):
        return sharded.serve(parts, modules, settings)
    return ddp.serve(parts, engines, settings)


def _refuse_to_share(parts: Parts, engines: Sequence[DistributedDataParallel]) -> None:
    """Raise where states cannot be shared out over all processes."""
    if any(slot.shard is not None for slot in parts.slots.values()):
        raise ValueError(
            "shard_states=True, but parameters are sharded (DTensors) already, and their states "
            "are too: leave shard_states out"
        )
    everyone = list(range(dist.get_world_size()))
    averaged: set[Tensor] = set()
    for engine in engines:
        averaged.update(engine.parameters())
        if dist.get_process_group_ranks(engine.process_group) != everyone:
            raise ValueError(
                "DistributedDataParallel (DDP) averages over a group of some processes, and "
                "shard_states=True shares states out over all of them: leave shard_states out"
            )
    if alone := [param for param in parts.slots if param not in averaged]:
        raise ValueError(
            f"shard_states=True, but {len(alone)} parameters (one of shape "
            f"{tuple(alone[0].shape)}) are in no DistributedDataParallel module, so that their "
            "gradients differ: give those an optimizer of their own"
        )
