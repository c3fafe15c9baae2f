"""The rules of this package: one entry each, registered as a user's are.

An entry names the function of `kernels/rules.py`, the classes that take it, where the
hyper-parameters come from, and torch's names of the states. Where a class has several rules, the
first whose `when` holds is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import optim

from . import registry
from .registry import Owner
from .rule import Group, Hyper, Rule

RULES: dict[str, Rule] = {}


def _add(
    name: str,
    *classes: Owner,
    when: Callable[[Any, Group], bool] | None = None,
    **options: Any,
) -> None:
    rule = registry.make_rule(name, kernels="fusedaccum.kernels.rules", **options)
    for kind in classes:
        RULES[name] = registry.add(kind, rule, when)


def _betas(group: Group) -> Hyper:
    return group["lr"], *group["betas"], group["eps"], group["weight_decay"]


def _adam(group: Group) -> Hyper:
    return *_betas(group), float(group.get("decoupled_weight_decay", False))


def _nadam(group: Group) -> Hyper:
    return *_adam(group), group["momentum_decay"]


def _rprop(group: Group) -> Hyper:
    return group["lr"], *group["etas"], *group["step_sizes"]


def _lion(group: Group) -> Hyper:
    return group["lr"], *group["betas"], group["weight_decay"]


def _lr(group: Group) -> float:
    return group["lr"]  # type: ignore[no-any-return]


registry.forget_own()
_MOMENTS = ("exp_avg", "exp_avg_sq")
_add(
    "adam", optim.Adam, optim.AdamW, hyper=_adam, states=_MOMENTS,
    when=lambda _, group: not group["amsgrad"],
)  # fmt: skip
_add(
    "adam_amsgrad", optim.Adam, optim.AdamW, family="adam", hyper=_adam,
    states=(*_MOMENTS, "max_exp_avg_sq"),
)  # fmt: skip
_add("nadam", optim.NAdam, hyper=_nadam, states=_MOMENTS, memory={"mu_product": 1.0})
_add("radam", optim.RAdam, hyper=_adam, states=_MOMENTS)
_add("adamax", optim.Adamax, hyper=_betas, states=("exp_avg", "exp_inf"))
_add(
    "adagrad", optim.Adagrad, hyper=("lr", "lr_decay", "eps", "weight_decay"),
    states={"sum": lambda group: group["initial_accumulator_value"]},
)  # fmt: skip

_RMSPROP = ("lr", "alpha", "eps", "weight_decay", "momentum")
_add(
    "rmsprop", optim.RMSprop, hyper=_RMSPROP, states=("square_avg",),
    when=lambda _, group: not group["centered"] and not group["momentum"],
)  # fmt: skip
_add(
    "rmsprop_momentum", optim.RMSprop, family="rmsprop", hyper=_RMSPROP,
    states=("square_avg", "momentum_buffer"),
    when=lambda _, group: not group["centered"],
)  # fmt: skip
_add(
    "rmsprop_centered", optim.RMSprop, family="rmsprop", hyper=_RMSPROP,
    states=("square_avg", "grad_avg"),
    when=lambda _, group: not group["momentum"],
)  # fmt: skip
_add(
    "rmsprop_centered_momentum", optim.RMSprop, family="rmsprop", hyper=_RMSPROP,
    states=("square_avg", "grad_avg", "momentum_buffer"),
)  # fmt: skip
_add(
    "adadelta", optim.Adadelta, hyper=("lr", "rho", "eps", "weight_decay"),
    states=("square_avg", "acc_delta"),
)  # fmt: skip
_add(
    "asgd", optim.ASGD, hyper=("lr", "lambd", "alpha", "t0", "weight_decay"),
    states=("ax",), memory={"eta": _lr, "mu": 1.0},
)  # fmt: skip
_add("rprop", optim.Rprop, hyper=_rprop, states={"prev": 0.0, "step_size": _lr})

_SGD = ("lr", "momentum", "dampening", "weight_decay")
_add(
    "sgd", optim.SGD, hyper=_SGD, step_key=None,
    when=lambda _, group: not group["momentum"],
)  # fmt: skip
_add(
    "sgd_momentum", optim.SGD, family="sgd", hyper=_SGD, step_key=None,
    states=("momentum_buffer",), when=lambda _, group: not group["nesterov"],
)  # fmt: skip
_add(
    "sgd_nesterov", optim.SGD, family="sgd", hyper=_SGD, step_key=None,
    states=("momentum_buffer",),
)  # fmt: skip

# With decoupled_weight_decay=True lion_pytorch divides the decay by the first learning rate.
_add(
    "lion", ("lion_pytorch", "Lion"), hyper=_lion, states=("exp_avg",), step_key=None,
    when=lambda optimizer, _: not optimizer.decoupled_wd,
)  # fmt: skip
_add(
    "lion", ("timm", "Lion"), hyper=_lion, states=("exp_avg",), step_key=None,
    when=lambda _, group: not (group.get("caution") or group.get("corrected_weight_decay")),
)  # fmt: skip

registry.seal()
