"""The fused step: one launch for all parameters of one rule, dtype and kind of master."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import StepBatch, UpdateRequest
from ..backends.rounding import tensor_key
from ..rules import builtin as rules
from ..window.collector import Collector
from ..window.slots import Slot
from .masters import Master, Masters
from .states import States

# What is still to do of an update, given the factor that makes the accumulated sum the mean: a
# tensor where a GradScaler takes part, NaN after an overflow, which skips the update in any case.
Apply = Callable[[float | Tensor], None]


class FusedStep:
    """Updates by the rules of `optimizer`'s param groups.

    Args:
        optimizer: the wrapped one.
        collector: has the accumulators.
        masters, states: of its parameters.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        collector: Collector,
        masters: Masters,
        states: States,
        seed: int,
    ) -> None:
        self._optimizer, self._collector = optimizer, collector
        self._masters, self._states = masters, states
        self._seed = seed

    def bind(self, slot: Slot, rule: rules.Rule, group: dict[str, Any]) -> Master:
        """Have a parameter's master and states in their buffers, and show them."""
        master = self._masters[slot]
        master.refresh()
        self._states.bind(slot, rule, group)
        return master

    def prepare(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply | None:
        """See `Updater.prepare`; None where there is nothing to update."""
        scalars = self._states.scalars
        groups = self._optimizer.param_groups
        batches: dict[tuple[str, torch.dtype, str], StepBatch] = {}
        updated: list[Slot] = []
        position = -1  # among all parameters, frozen ones too: a resumed run draws the same bits
        for group_index, group in enumerate(groups):
            rule = rules.select(self._optimizer, group)
            assert rule is not None
            for param in group["params"]:
                position += 1
                slot = self._collector.slots.get(param)
                if slot is None or not slot.fill:
                    continue
                master = self.bind(slot, rule, group)
                key = (rule.name, slot.dtype, master.kind)
                batch = batches.setdefault(key, StepBatch(rule, master.kind))
                batch.params.append(param)
                batch.accs.append(slot.acc)
                batch.states.append(self._states[slot].tensors)
                batch.rows.append(slot.row)
                batch.groups.append(group_index)
                if master.is_kept:
                    assert master.tensor is not None
                    batch.masters.append(master.tensor)
                elif master.kind == "stochastic":
                    batch.keys.append(tensor_key(self._seed, position))
                updated.append(slot)
        if not updated:
            return None
        first = next(iter(batches.values())).rule.family
        hyper = [(rules.sign(group), *first.hyper(group)) for group in groups]
        backend = self._collector.backend

        @torch.no_grad()
        def apply(correction: float | Tensor) -> None:
            request = UpdateRequest(first, hyper, partials, correction, max_norm, skip)
            backend.finalize(request, list(batches.values()), scalars)
            for batch in batches.values():
                backend.step(batch, scalars)
            # The kernels write behind autograd's back: a backward through the old weights must
            # notice.
            torch.autograd.graph.increment_version([s.param for s in updated])

        return apply
