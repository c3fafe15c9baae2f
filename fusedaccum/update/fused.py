"""The fused step: one launch for all parameters of one rule, dtype and kind of master.

What an update needs is nearly always what the one before needed, the learning rate apart. It is
kept and compared with what is there now, without Python code for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import Correction, Finalize, Keep, Launch, Step, StepTensor, UpdateScalars
from ..backends.rounding import tensor_key
from ..rules import registry
from ..rules.number import number
from ..rules.rule import Rule, sign
from ..window.collector import Collector
from ..window.groups import have_params, params_of
from ..window.slots import Slot
from .masters import Master, Masters
from .states import RuleState, States

# What is still to do of an update, given what makes the accumulated sum the mean.
Apply = Callable[[Correction], None]

_keep, _tensor = attrgetter("keep"), attrgetter("tensor")
_loaded, _step = attrgetter("loaded"), attrgetter("step")
# What hyper-parameters nearly always are; others are looked at.
_NUMBERS = frozenset({float, int, Tensor})


def _check_numbers(group: int, row: tuple[Any, ...]) -> None:
    """Raise for a hyper-parameter that is no number, before the update begins."""
    for value in row:
        if not isinstance(value, (Tensor, bool)) and number(value) is None:
            raise TypeError(
                f"param group {group}: a hyper-parameter must be a number, or a tensor of one "
                f"element; got {value!r:.60}; nothing was updated"
            )


class _Prepared:
    """The steps of an update, and all that they were made from.

    Attributes:
        steps: one for all tensors that share rule, dtype and `Keep`.
        params: those that are updated.
        launch: of the update's `Finalize`.
    """

    def __init__(self, steps: list[Step], params: list[Tensor]) -> None:
        self.steps, self.params, self.launch = steps, params, Launch()

    def remember(
        self,
        filled: list[Slot],
        groups: Sequence[dict[str, Any]],
        rules: list[Rule],
        bound: list[tuple[Master, RuleState]],
        states: Any,
    ) -> None:
        """Keep what `holds` compares."""
        self._filled, self._rules = filled, rules
        self._params = params_of(groups)
        self._masters, self._own = [m for m, _ in bound], [own for _, own in bound]
        self._keeps = list(map(_keep, self._masters))
        self._kept = list(map(_tensor, self._masters))
        self._counts = list(map(_step, self._own))
        entries_of = [states[param] for param in self.params]
        self._known = list(states), list(states.values())
        # By name: all of that name, each with where it is shown.
        self._shown: dict[str, tuple[list[Any], list[Tensor]]] = {}
        for entry, own in zip(entries_of, self._own, strict=True):
            for name, tensor in own.shown.items():
                entries, tensors = self._shown.setdefault(name, ([], []))
                entries.append(entry)
                tensors.append(tensor)

    def holds(
        self,
        filled: list[Slot],
        groups: Sequence[dict[str, Any]],
        rules: list[Rule],
        scalars: UpdateScalars,
        states: Any,
    ) -> bool:
        """Whether nothing but numbers of the param groups differs."""
        if not (
            self.steps[0].scalars is scalars
            and filled == self._filled
            and rules == self._rules
            and have_params(groups, self._params)
            and set(map(_loaded, self._masters)) == {None}
            and list(map(_keep, self._masters)) == self._keeps
            and all(map(is_, map(_tensor, self._masters), self._kept))
            and all(map(is_, map(_step, self._own), self._counts))
            and len(states) == len(self._known[0])
            # In their order, which needs no hash of a tensor: that is Python code.
            and all(map(is_, states, self._known[0]))
            and all(map(is_, states.values(), self._known[1]))
        ):
            return False
        try:
            return all(
                all(map(is_, map(itemgetter(name), entries), tensors))
                for name, (entries, tensors) in self._shown.items()
            )
        except KeyError:  # somebody took a state away
            return False


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
        self._prepared: _Prepared | None = None

    def bind(self, slot: Slot, rule: Rule, group: dict[str, Any]) -> tuple[Master, RuleState]:
        """Have a parameter's master and states in their buffers, and show them."""
        master = self._masters[slot]
        master.refresh()
        return master, self._states.bind(slot, rule, group)

    def prepare(self, max_norm: float | None, partials: Tensor | None, skip: bool) -> Apply | None:
        """See `Updater.prepare`; None where there is nothing to update."""
        scalars, filled = self._states.scalars, self._collector.slots.filled()
        groups, state = self._optimizer.param_groups, self._optimizer.state
        rules = [self._rule(group) for group in groups]
        prepared = self._prepared
        if prepared is None or not prepared.holds(filled, groups, rules, scalars, state):
            self._prepared = None  # until all is well with the new one
            prepared, may_come_again = self._prepare(filled, groups, rules, scalars)
            self._prepared = prepared if may_come_again else None
        requests = prepared.steps
        if not requests:
            return None
        family = requests[0].rule.family
        hyper = [(sign(group), *family.hyper(group)) for group in groups]
        for i, row in enumerate(hyper):
            if not _NUMBERS.issuperset(map(type, row)):
                _check_numbers(i, row)
        backend = self._collector.backend

        @torch.no_grad()
        def apply(correction: Correction) -> None:
            backend.finalize(
                Finalize(requests, hyper, correction, partials, max_norm, skip, prepared.launch)
            )
            for request in requests:
                if request.tensors:  # others may update all
                    backend.step(request)
            # The kernels write behind autograd's back: a backward through the old weights must
            # notice.
            torch.autograd.graph.increment_version(prepared.params)

        return apply

    def _rule(self, group: dict[str, Any]) -> Rule:
        rule = registry.select(self._optimizer, group)
        assert rule is not None
        return rule

    def _prepare(
        self,
        filled: list[Slot],
        groups: Sequence[dict[str, Any]],
        rules: list[Rule],
        scalars: UpdateScalars,
    ) -> tuple[_Prepared, bool]:
        """Bind what the window filled, and sort it into steps; whether they may be used again."""
        # What starts as a hyper-parameter is looked at each time, and a shard is another tensor.
        comes_again = not any(rule.has_starts for rule in rules)
        comes_again &= all(slot.shard is None for slot in filled)
        steps: dict[tuple[str, torch.dtype, Keep], Step] = {}
        params: list[Tensor] = []
        bound: list[tuple[Master, RuleState]] = []
        position = -1  # among all parameters, frozen ones too: a resumed run draws the same bits
        for group_index, (group, rule) in enumerate(zip(groups, rules, strict=True)):
            for param in group["params"]:
                position += 1
                slot = self._collector.slots.get(param)
                if slot is None or not slot.fill:
                    continue
                keep = self._masters[slot].keep
                step = steps.get((rule.name, slot.dtype, keep))
                if step is None:
                    launch = Launch() if comes_again else None
                    step = Step(rule, keep, [], scalars, launch)
                    steps[rule.name, slot.dtype, keep] = step
                if not slot.is_own:
                    continue
                master, own = self.bind(slot, rule, group)
                kept = master.tensor if master.is_kept else None
                key = self._key(slot, position) if keep is Keep.STOCHASTIC else 0
                step.tensors.append(
                    StepTensor(slot.local, slot.acc, own.tensors, slot.row, group_index, kept, key)
                )
                params.append(param)
                bound.append((master, own))
        prepared = _Prepared(list(steps.values()), params)
        comes_again &= bool(params)
        if comes_again:
            prepared.remember(filled, groups, rules, bound, self._optimizer.state)
        return prepared, comes_again

    def _key(self, slot: Slot, position: int) -> int:
        """Of a parameter's random bits; each shard draws others, and copies draw the same."""
        shard = 0 if slot.shard is None else slot.shard.index
        return tensor_key(self._seed, position + (shard << 20))
