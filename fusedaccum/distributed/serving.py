"""What goes with the engines that have our parameters: chosen, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ..window.reducing import Parts, Reducing
from . import ddp, sharded
from .agreement import Settings
from .joining import Member, Membership


class Request(NamedTuple):
    """What is asked for beside the averages.

    Attributes:
        settings: gives those that hold now, by name; all processes must have the same.
        member: gives the optimizer, a weak reference.
        has_group: whether `process_group` was given.
        shares: whether each process updates a part of the parameters (`shard_states`).
    """

    settings: Settings
    member: Callable[[], Member | None]
    has_group: bool
    shares: bool


def serve(parts: Parts, modules: Sequence[Module], request: Request) -> Reducing:
    """Average instead of DDP, or go with shards.

    Args:
        parts: of a collector.
        modules: of DDP and FSDP2, with parameters of it.
        request: how.

    Raises:
        ValueError: for what cannot be served, naming it and the way round.
    """
    if request.has_group:
        raise ValueError(
            "process_group= was given, and DistributedDataParallel (DDP), fully_shard (FSDP2) or "
            "tensor parallelism has parameters of this optimizer, and groups of its own that are "
            "taken instead: leave process_group out"
        )
    engines = [module for module in modules if isinstance(module, DistributedDataParallel)]
    if request.shares:
        _refuse_to_share(parts, engines)
    if any(slot.shard is not None for slot in parts.slots.values()):
        return sharded.serve(parts, modules, request.settings)
    return ddp.serve(parts, engines, request.settings, Membership(request.member))


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
