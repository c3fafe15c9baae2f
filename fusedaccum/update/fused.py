"""The fused step: one launch for all parameters of one rule, dtype and kind of master."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import Correction, Finalize, Keep, Step, StepTensor
from ..backends.rounding import tensor_key
from ..rules import registry
from ..rules.rule import Rule, sign
from ..window.collector import Collector
from ..window.slots import Slot
from .masters import Master, Masters
from .states import RuleState, States

# What is still to do of an update, given what makes the accumulated sum the mean.
Apply = Callable[[Correction], None]


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

    def bind(self, slot: Slot, rule: Rule, group: dict[str, Any]) -> tuple[Master, RuleState]:
        """Have a parameter's master and states in their buffers, and show them."""
        master = self._masters[slot]
        master.refresh()
        return master, self._states.bind(slot, rule, group)

    def prepare(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply | None:
        """See `Updater.prepare`; None where there is nothing to update."""
        scalars = self._states.scalars
        groups = self._optimizer.param_groups
        steps: dict[tuple[str, torch.dtype, Keep], Step] = {}
        updated: list[Slot] = []
        position = -1  # among all parameters, frozen ones too: a resumed run draws the same bits
        for group_index, group in enumerate(groups):
            rule = registry.select(self._optimizer, group)
            assert rule is not None
            for param in group["params"]:
                position += 1
                slot = self._collector.slots.get(param)
                if slot is None or not slot.fill:
                    continue
                keep = self._masters[slot].keep
                step = steps.get((rule.name, slot.dtype, keep))
                if step is None:
                    step = steps[rule.name, slot.dtype, keep] = Step(rule, keep, [], scalars)
                if not slot.is_own:
                    continue
                master, own = self.bind(slot, rule, group)
                kept = master.tensor if master.is_kept else None
                key = self._key(slot, position) if keep is Keep.STOCHASTIC else 0
                step.tensors.append(
                    StepTensor(slot.local, slot.acc, own.tensors, slot.row, group_index, kept, key)
                )
                updated.append(slot)
        requests = list(steps.values())
        if not requests:
            return None
        family = requests[0].rule.family
        hyper = [(sign(group), *family.hyper(group)) for group in groups]
        backend = self._collector.backend

        @torch.no_grad()
        def apply(correction: Correction) -> None:
            backend.finalize(Finalize(requests, hyper, correction, partials, max_norm, skip))
            for request in requests:
                if request.tensors:  # others may update all
                    backend.step(request)
            # The kernels write behind autograd's back: a backward through the old weights must
            # notice.
            torch.autograd.graph.increment_version([s.param for s in updated])

        return apply

    def _key(self, slot: Slot, position: int) -> int:
        """Of a parameter's random bits; each shard draws others, and copies draw the same."""
        shard = 0 if slot.shard is None else slot.shard.index
        return tensor_key(self._seed, position + (shard << 20))
