"""What is known of an update rule beside its arithmetic.

A `Family` is what the rules of one optimizer class share: hyper-parameters read from a param group
and the function that turns them into scalars. A `Rule` is one update, with its states. Both carry
names only; the functions of those names are in the family's module: `kernels/rules.py`, or a
user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Group = dict[str, Any]
# A hyper-parameter may be a number or a tensor (lr for CUDA graphs): never read on the host here.
Hyper = tuple[Any, ...]


@dataclass(frozen=True)
class Family:
    """What the rules of one optimizer class share.

    Attributes:
        name: `<name>_scalars` is the scalars function.
        hyper: read a group's hyper-parameters, in the order that function takes them.
        n_hyper: how many those are.
        n_scalars: how many scalars it returns.
        memory: torch's names of the numbers it keeps per parameter, and what they start as.
        step_key: the key under which torch keeps a parameter's step count, if it does.
        kernels: the module of the Triton functions, whose text everything else is made from.
    """

    name: str
    hyper: Callable[[Group], Hyper]
    n_hyper: int
    n_scalars: int
    memory: tuple[tuple[str, Callable[[Group], Any]], ...]
    step_key: str | None
    kernels: str


def _zero(_: Group) -> float:
    return 0.0


@dataclass(frozen=True)
class Rule:
    """One element-wise update.

    Attributes:
        name: the functions called so.
        family: what it shares.
        states: torch's names of its states, fp32 and of the parameter's shape.
        initial: what each state starts as, zero for those not named.
    """

    name: str
    family: Family
    states: tuple[str, ...]
    initial: tuple[tuple[str, Callable[[Group], Any]], ...]

    @property
    def has_starts(self) -> bool:
        """Whether something starts as another number than zero."""
        return bool(self.initial or self.family.memory)

    def starts(self, group: Group) -> dict[str, float]:
        """What those of its states and numbers start as that do not start as zero."""
        named = (*self.initial, *self.family.memory)
        return {name: float(start(group)) for name, start in named}

    def start(self, state: str, group: Group) -> float:
        """What `state` starts as in a param group."""
        return float(dict(self.initial).get(state, _zero)(group))


def sign(group: Group) -> float:
    """What the gradient is multiplied with: -1 for `maximize`."""
    return -1.0 if group.get("maximize") else 1.0
