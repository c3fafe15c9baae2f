"""Which optimizer has which fused update rule, with its states and hyper-parameters.

A `Family` is what the rules of one optimizer class share: hyper-parameters read from a param group
and the function that turns them into scalars. A `Rule` is one update, with its states. Both carry
names only; the functions of those names are in `kernels/rules.py` (Triton, and the C loops made
from it) and `reference.py` (torch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
        step_key: the key under which torch keeps a parameter's step count, if it does.
    """

    name: str
    hyper: Callable[[Group], Hyper]
    n_hyper: int
    n_scalars: int
    step_key: str | None


@dataclass(frozen=True)
class Rule:
    """One element-wise update: the functions called `name`, and torch's names of its states."""

    name: str
    family: Family
    states: tuple[str, ...]


def _adam_hyper(group: Group) -> Hyper:
    beta1, beta2 = group["betas"]
    return group["lr"], beta1, beta2, group["eps"], group["weight_decay"]


def _sgd_hyper(group: Group) -> Hyper:
    return group["lr"], group["momentum"], group["dampening"], group["weight_decay"]


ADAM = Family("adam", _adam_hyper, n_hyper=5, n_scalars=8, step_key="step")
SGD = Family("sgd", _sgd_hyper, n_hyper=4, n_scalars=5, step_key=None)

RULES = {
    rule.name: rule
    for rule in (
        Rule("adamw", ADAM, ("exp_avg", "exp_avg_sq")),
        Rule("adamw_amsgrad", ADAM, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        Rule("adam", ADAM, ("exp_avg", "exp_avg_sq")),
        Rule("adam_amsgrad", ADAM, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        Rule("sgd", SGD, ()),
        Rule("sgd_momentum", SGD, ("momentum_buffer",)),
        Rule("sgd_nesterov", SGD, ("momentum_buffer",)),
    )
}


def _adam_rule(group: Group) -> str:
    decoupled = group.get("decoupled_weight_decay", False)
    return ("adamw" if decoupled else "adam") + ("_amsgrad" if group["amsgrad"] else "")


def _adamw_rule(group: Group) -> str:
    return "adamw_amsgrad" if group["amsgrad"] else "adamw"


def _sgd_rule(group: Group) -> str:
    if not group["momentum"]:
        return "sgd"
    return "sgd_nesterov" if group["nesterov"] else "sgd_momentum"


# Exact classes: a subclass may have changed step(), so it keeps its own.
_SELECT: dict[type, Callable[[Group], str]] = {
    torch.optim.Adam: _adam_rule,
    torch.optim.AdamW: _adamw_rule,
    torch.optim.SGD: _sgd_rule,
}


def select(optimizer: torch.optim.Optimizer, group: Group) -> Rule | None:
    """The fused rule of a param group of `optimizer`, or None where it has none."""
    choose = _SELECT.get(type(optimizer))
    if choose is None:
        return None
    return RULES[choose(group)]


def sign(group: Group) -> float:
    """What the gradient is multiplied with: -1 for `maximize`."""
    return -1.0 if group.get("maximize") else 1.0


def reason(optimizer: torch.optim.Optimizer) -> str:
    """Why `optimizer` takes its native step, in words for people."""
    kind = type(optimizer)
    bases = [base.__name__ for base in _SELECT if issubclass(kind, base)]
    if bases:
        return f"{kind.__name__} is a subclass of {bases[-1]} that may have its own step()"
    return f"no fused rule for {kind.__name__}"
