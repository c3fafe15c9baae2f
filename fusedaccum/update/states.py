"""What an optimizer remembers of each parameter, in flat buffers that `optimizer.state` shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import UpdateScalars
from ..backends.devices import same_place
from ..rules import registry
from ..rules.rule import Rule
from ..window.collector import Collector
from ..window.slots import Slot

Group = dict[str, Any]


def _zero(_: Group) -> float:
    return 0.0


class RuleState:
    """One parameter's.

    Attributes:
        tensors: the states with the parameter's shape, fp32, in the rule's order.
        starts: what states and numbers started as, by name, where that is not zero.
        step: its step count, 0-d, on the device; None until the states are there.
        knows_step: whether its step count is in the device tables, though `step` is None.
        is_new: whether the optimizer had no states of it when these were made.
        numbers: the 0-d states that `state[param]` shows, by torch's names.
        shown: all that `state[param]` was made to show.
    """

    __slots__ = ("is_new", "knows_step", "numbers", "shown", "starts", "step", "tensors")

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.starts: dict[str, float] = {}
        self.step: Tensor | None = None
        self.knows_step = self.is_new = False
        self.numbers: dict[str, Tensor] = {}
        self.shown: dict[str, Tensor] = {}


class States(dict[Slot, RuleState]):
    """Each parameter's states, made when they are first asked for.

    Args:
        optimizer: the wrapped one; its `state` is read and written.
        collector: has the slots.

    Attributes:
        is_provisional: whether states are there for their names and shapes only, made with a
            learning rate of 0, from which some start.
    """

    def __init__(self, optimizer: Optimizer, collector: Collector) -> None:
        super().__init__()
        self._optimizer, self._collector = optimizer, collector
        self._scalars: UpdateScalars | None = None
        self.is_provisional = False

    def __missing__(self, slot: Slot) -> RuleState:
        state = self[slot] = RuleState()
        return state

    @property
    def skipped(self) -> int:
        """Updates that were skipped; waits for the device."""
        return 0 if self._scalars is None else int(self._scalars.skipped)

    @property
    def scalars(self) -> UpdateScalars:
        """The device tables, grown where parameters were added."""
        n = len(self._collector.slots)
        old = self._scalars
        if old is None or len(old.steps) < n:
            rule = registry.select(self._optimizer, self._optimizer.param_groups[0])
            n_scalars = rule.family.n_scalars if rule else 0
            n_memory = len(rule.family.memory) if rule else 0
            new = UpdateScalars(n, n_scalars, self._collector.attached.device, n_memory)
            if old is not None:
                new.memory[: len(old.memory)] = old.memory
                new.steps[: len(old.steps)] = old.steps
                new.norm, new.skipped = old.norm, old.skipped
                for state in self.values():
                    # What `optimizer.state` shows is in the old tables.
                    state.knows_step |= state.step is not None
                    state.step = None
            self._scalars = new
        assert self._scalars is not None
        return self._scalars

    def restore(self, slot: Slot, step: float | None) -> None:
        """Let the next update take over what `state[param]` shows then.

        Args:
            slot: of the parameter.
            step: its count, where a checkpoint tells it apart from the states.
        """
        own = self[slot]
        own.tensors, own.step, own.numbers = (), None, {}
        own.knows_step, own.is_new = step is not None, False
        self.scalars.steps[slot.row] = 0.0 if step is None else float(step)

    def step_of(self, slot: Slot, entry: dict[str, Any] | None) -> float | None:
        """A parameter's step count as far as it is known, also before the first update after a
        load; `entry` is what a state dict has of it."""
        own = self[slot]
        if own.step is not None:
            return float(own.step)
        if entry and "step" in entry:
            return float(entry["step"])
        if own.knows_step and self._scalars is not None:
            return float(self._scalars.steps[slot.row])
        return None

    def is_unused(self, slot: Slot) -> bool:
        """Whether a parameter's states are there, and every update so far was skipped.

        The optimizer alone would have none yet: SGD takes a momentum buffer that is there for one
        of an earlier update, and what ASGD and Rprop start from is the rate of the first update.
        What an optimizer makes as it is constructed (Adagrad), or somebody puts there, is not ours.
        Waits for the device.
        """
        own, state = self[slot], self._optimizer.state.get(slot.param, {})
        is_ours = own.is_new and all(state.get(name) is own.shown[name] for name in own.shown)
        return is_ours and self.step_of(slot, None) == 0

    def forget_provisional(self) -> None:
        """Let states that are provisional start as if there had been none."""
        if not self.is_provisional:
            return
        self.is_provisional = False
        self._optimizer.state.clear()
        self.scalars.steps.zero_()
        for state in self.values():
            state.tensors, state.step = (), None

    @torch.no_grad()
    def release(self) -> None:
        """Give the wrapped optimizer states of its own, in the dtypes plain torch would have, and
        its numbers where it would have them: on the device where its step reads them there."""
        if self.is_provisional:
            self._optimizer.state.clear()
        stays = {
            param
            for group in self._optimizer.param_groups
            if group.get("fused") or group.get("capturable")
            for param in group["params"]
        }
        for param, slot in self._collector.slots.items():
            if self.is_unused(slot):
                self._optimizer.state.pop(param, None)
            entry = self._optimizer.state.get(param, {})
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                if value.dim() == 0:
                    number = value.detach().clone()
                    entry[name] = number if param in stays else number.cpu()
                elif value.is_floating_point():
                    entry[name] = value.to(slot.dtype, copy=True)

    def bind(self, slot: Slot, rule: Rule, group: Group) -> RuleState:
        """Make `state[param]` show the flat buffers, taking over what somebody put there.

        It shows all of them or none: what raises before leaves `state` as it was.

        Raises:
            ValueError: for a state of another shape.
        """
        own, state = self[slot], self._optimizer.state[slot.param]
        if own.step is not None and len(own.tensors) == len(rule.states):
            for name, tensor in own.shown.items():
                if state.get(name) is not tensor:
                    break
            else:
                if rule.has_starts:
                    self._start_later(own, state, rule.starts(group))
                return own
        scalars = self.scalars
        is_foreign = False  # whether it comes from a plain run, or from a checkpoint
        shown: dict[str, Tensor] = {}
        tensors: tuple[Tensor, ...] = ()
        for name in rule.states:
            view = slot.view(name)
            tensors += (view,)
            shown[name] = slot.shown(view)
            existing = state.get(name)
            if not isinstance(existing, Tensor):
                view.fill_(rule.start(name, group))
                continue
            part = slot.part(existing)
            if part.shape != view.shape:
                raise ValueError(
                    f"optimizer.state has a {name!r} of shape {tuple(existing.shape)} for a "
                    f"parameter of shape {tuple(slot.param.shape)}; nothing was updated. Assign "
                    "one of the parameter's shape, or clear the parameter's state to start afresh"
                )
            if not same_place(part, view):
                is_foreign = True
                view.copy_(part)
        step = scalars.steps[slot.row]
        if tensors and not any(isinstance(state.get(name), Tensor) for name in rule.states):
            step.zero_()  # history begins anew, also where somebody cleared the states
        memory = rule.family.memory
        numbers = [(scalars.memory[slot.row, i], *m) for i, m in enumerate(memory)]
        if rule.family.step_key is not None:
            numbers.append((step, rule.family.step_key, _zero))
        elif is_foreign and not own.knows_step:
            step.clamp_(min=1.0)  # a momentum buffer from before: this is not the first update
        for number, name, start in numbers:
            shown[name] = number
            existing = state.get(name, start(group))
            if not isinstance(existing, Tensor):
                number.fill_(existing)
            elif not same_place(existing, number):
                number.copy_(existing)
        had_states = bool(state)
        own.is_new = not had_states or (own.is_new and not is_foreign)
        state.update(shown)
        own.tensors = tensors
        own.numbers = {name: number for number, name, _ in numbers}
        own.shown, own.step, own.knows_step = shown, step, False
        starts = rule.starts(group)
        if own.is_new and had_states:
            self._start_later(own, state, starts)
        own.starts = starts
        return own

    @staticmethod
    def _start_later(own: RuleState, state: dict[str, Any], starts: dict[str, float]) -> None:
        """Let what starts as a hyper-parameter start as what that is now (ASGD's and Rprop's rate),
        where every update so far was skipped. That shows on the device alone."""
        if starts == own.starts:
            return
        assert own.step is not None
        for name, start in starts.items():
            value = state[name]
            value.copy_(torch.where(own.step == 0, start, value))
        own.starts = starts
