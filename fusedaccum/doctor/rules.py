"""The update rules that the other checks go by, against torch.optim, in float64 on the host.

Those rules are made from the kernels' own text. Here a judge that does not know that text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, optim

from ..rules import registry
from ..rules.as_torch import as_torch
from ..rules.rule import sign
from .checks import Check, Wrong, normal, require_close

FP64 = torch.float64
UPDATES = 10
# Some roundings of 2**-53 an update, of numbers around 1 (3e-15 is the most that was seen); a wrong
# rule is off by a share of the learning rate.
ALLOWED = 1e-13
# torch has no Lion.
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "adam": (optim.AdamW, {"weight_decay": 0.1}),
    "adam_amsgrad": (optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "nadam": (optim.NAdam, {"weight_decay": 0.1}),
    "radam": (optim.RAdam, {"weight_decay": 0.1}),
    "adamax": (optim.Adamax, {"weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    "rmsprop": (optim.RMSprop, {"weight_decay": 0.1}),
    "rmsprop_momentum": (optim.RMSprop, {"momentum": 0.9}),
    "rmsprop_centered": (optim.RMSprop, {"centered": True}),
    "rmsprop_centered_momentum": (optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adadelta": (optim.Adadelta, {"weight_decay": 0.1}),
    "asgd": (optim.ASGD, {"t0": 3, "lambd": 0.1, "weight_decay": 0.1}),
    "rprop": (optim.Rprop, {}),
    "sgd": (optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    "sgd_momentum": (optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd_nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


def all_checks() -> Iterator[Check]:
    """Each rule of an optimizer that torch has."""
    for name, (kind, options) in OPTIMIZERS.items():
        yield check(name, kind, options)


def check(name: str, kind: Any, options: dict[str, Any]) -> Check:
    """Some updates of one tensor by both."""

    def run() -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(FP64)  # torch.optim keeps numbers of its own in that
        try:
            _run(name, kind, options)
        finally:
            torch.set_default_dtype(default)

    return Check(f"rule {name}, torch.optim.{kind.__name__}", run)


def _run(name: str, kind: Any, options: dict[str, Any]) -> None:
    param = normal(257, 0).to(FP64)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = kind([theirs], lr=0.25, **options)
    (group,) = optimizer.param_groups
    rule = registry.select(optimizer, group)
    if rule is None or rule.name != name:
        raise Wrong(f"the rule is {rule.name if rule else None}")
    text = as_torch(rule.family.kernels, FP64)
    states: tuple[Tensor, ...]
    states = tuple(torch.full_like(param, rule.start(state, group)) for state in rule.states)
    memory = tuple(float(start(group)) for _, start in rule.family.memory)
    for update in range(1, UPDATES + 1):
        grad = normal(257, update).to(FP64)
        theirs.grad = grad.clone()
        optimizer.step()
        hyper = rule.family.hyper(group)
        assert len(hyper) == rule.family.n_hyper
        scalars, memory = getattr(text, f"{rule.family.name}_scalars")(hyper, update, memory)
        param, states = getattr(text, name)(param, sign(group) * grad, states, scalars)
        allowed = ALLOWED * (1 + param.abs())
        require_close(f"parameter after update {update}", theirs.detach(), param, allowed)
    for state, new in zip(rule.states, states, strict=True):
        kept = optimizer.state[theirs][state]
        require_close(f"state {state}", kept, new, ALLOWED * (1 + new.abs()))
