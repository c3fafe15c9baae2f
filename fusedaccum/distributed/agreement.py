"""Processes that do not have the same parameters and settings: refused.

Parameters and settings are compared before anything is added. What may change later travels with
the numbers of each window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..window.slots import Slot
from ..window.weights import Window

Settings = Callable[[], Mapping[str, Any]]

# What a process says of a window: one number for each, 0 where it says nothing, and the others as
# people are told of them.
_NAMES = (
    "gradient_accumulation_steps", "max_grad_norm", "skip_nonfinite", "micro_batch(weight=...)",
)  # fmt: skip
_COUNTED_BY_LOOP, _NO_CLIP = 0.5, math.inf
_FALSE, _TRUE, _PLAIN, _WEIGHTED = 1.0, 2.0, 1.0, 2.0
_WORDS: tuple[dict[float, str], ...] = (
    {_COUNTED_BY_LOOP: "None"},
    {_NO_CLIP: "None"},
    {_FALSE: "False", _TRUE: "True"},
    {_PLAIN: "not used", _WEIGHTED: "used"},
)


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


class Comparison:
    """Compares what may differ from window to window: settings that are assigned, and weights.

    Args:
        settings: gives those of this process as they are now, by name.
        world: how many processes there are.
        rank: of this one among them.

    Attributes:
        length: how many numbers all processes say together.
    """

    def __init__(self, settings: Settings, world: int, rank: int) -> None:
        self._settings, self._world, self._rank = settings, world, rank
        self.length = len(_NAMES) * world
        self._own: tuple[float, ...] = ()  # what this process said last
        self._agreed: tuple[float, ...] = ()  # what it said when the host last looked

    def numbers(self, window: Window, is_filled: bool, is_behind: bool) -> np.ndarray:
        """What this process says, with zeros in the places of the others.

        Args:
            window: that is about to be used.
            is_filled: whether it has a gradient here.
            is_behind: whether this process has left Join, so that it hears of no setting.
        """
        settings = self._settings()
        max_norm, skip = settings["max_grad_norm"], settings["skip_nonfinite"]
        self._own = (
            window.steps or _COUNTED_BY_LOOP,
            0.0 if is_behind else max_norm or _NO_CLIP,
            0.0 if is_behind else _TRUE if skip else _FALSE,
            _kind(window, is_filled),
        )
        table = np.zeros((self._world, len(_NAMES)))
        table[self._rank] = self._own
        return table.reshape(-1)

    def is_mixed(self, table: Tensor) -> Tensor:
        """Whether any two processes say different things; the same in every process."""
        said = table.view(self._world, -1)
        return ((said != 0) & (said != said.amax(0))).any()

    def disagreement(self, table: Tensor) -> str | None:
        """What differs, and what to do; None where nothing does.

        On a GPU the host would wait for it, so it looks only after this process has changed.

        Args:
            table: the sum of all processes' `numbers`.
        """
        # A window of nothing says nothing of weights, which is no change.
        is_as_before = all(
            own in (0.0, agreed) for own, agreed in zip(self._own, self._agreed, strict=False)
        )
        if self._agreed and is_as_before and table.device.type != "cpu":
            return None
        found = []
        columns = table.view(self._world, -1).T.tolist()
        for name, words, column in zip(_NAMES, _WORDS, columns, strict=True):
            said = [(rank, value) for rank, value in enumerate(column) if value]
            for rank, value in said[1:]:
                first_rank, first = said[0]
                if value != first:
                    found.append(
                        f"{name} is {_shown(first, words)} on rank {first_rank}, "
                        f"{_shown(value, words)} on rank {rank}"
                    )
        if not found:
            self._agreed = tuple(
                own or agreed
                for own, agreed in zip(self._own, self._agreed or self._own, strict=True)
            )
            return None
        return (
            f"the processes do not train the same: {'; '.join(found)}. Nothing was updated. Assign "
            "settings in every process at the same step, and use micro_batch(weight=...) in every "
            "process or in none"
        )


def _shown(value: float, words: Mapping[float, str]) -> str:
    """A number that a process said, for people."""
    return words.get(value, str(value).removesuffix(".0"))


def _kind(window: Window, is_filled: bool) -> float:
    """Whether the window's micro-batches come with weights here."""
    if window.steps is not None:
        return {None: 0.0, False: _PLAIN, True: _WEIGHTED}[window.is_explicit]
    if window.is_weighted:
        return _WEIGHTED
    return _PLAIN if is_filled else 0.0
