"""The optimizer's param groups as they were last seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from .slots import Slot

_requires_grad = attrgetter("requires_grad")


def params_of(groups: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
    """The parameters of each param group."""
    return [list(group["params"]) for group in groups]


def have_params(groups: Sequence[dict[str, Any]], known: Sequence[Sequence[Tensor]]) -> bool:
    """Whether param groups have these parameters; compared without Python code for each."""
    lists = [group["params"] for group in groups]
    return list(map(len, lists)) == list(map(len, known)) and all(
        map(is_, chain.from_iterable(lists), chain.from_iterable(known))
    )


class Known:
    """Param groups all of whose parameters are attached, or frozen and without a gradient.

    It is asked of at every micro-batch, so it compares without Python code for each parameter.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], slots: Mapping[Tensor, Slot]) -> None:
        self._lists = params_of(groups)
        self._params = list(chain.from_iterable(self._lists))
        self._trained = list(map(_requires_grad, self._params))
        self._others = [param for param in self._params if param not in slots]

    def holds(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether they are the same, and nothing was frozen, unfrozen, or given a gradient."""
        return (
            have_params(groups, self._lists)
            and list(map(_requires_grad, self._params)) == self._trained
            and not any(param.grad is not None for param in self._others)
        )
