"""Which optimizer has which fused update rule, with its states and hyper-parameters.

A `Family` is what the rules of one optimizer class share: hyper-parameters read from a param group
and the function that turns them into scalars. A `Rule` is one update, with its states. Both carry
names only; the functions of those names are in the family's modules: `kernels/rules.py` (Triton,
and the C loops made from it) and `reference.py` (torch), or a user's own (`registry.py`).
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
        memory: torch's names of the numbers it keeps per parameter, and what they start as.
        step_key: the key under which torch keeps a parameter's step count, if it does.
        kernels: the module of the Triton functions.
        reference: the module of the torch functions; None: they are made from the Triton text.
    """

    name: str
    hyper: Callable[[Group], Hyper]
    n_hyper: int
    n_scalars: int
    memory: tuple[tuple[str, Callable[[Group], Any]], ...] = ()
    step_key: str | None = "step"
    kernels: str = "fusedaccum.kernels.rules"
    reference: str | None = "fusedaccum.backends.reference"


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
    initial: tuple[tuple[str, Callable[[Group], Any]], ...] = ()

    def starts(self, group: Group) -> dict[str, float]:
        """What those of its states and numbers start as that do not start as zero."""
        named = (*self.initial, *self.family.memory)
        return {name: float(start(group)) for name, start in named}

    def start(self, state: str, group: Group) -> float:
        """What `state` starts as in a param group."""
        return float(dict(self.initial).get(state, _zero)(group))


def _lr(group: Group) -> Any:
    return group["lr"]


def _one(_: Group) -> float:
    return 1.0


def _keys(*names: str) -> Callable[[Group], Hyper]:
    """Hyper-parameters that are the group's entries of those names."""
    return lambda group: tuple(group[name] for name in names)


def _is_decoupled(group: Group) -> float:
    return float(group.get("decoupled_weight_decay", False))


def _adam(group: Group) -> Hyper:
    decoupled = _is_decoupled(group)
    return group["lr"], *group["betas"], group["eps"], group["weight_decay"], decoupled


def _nadam(group: Group) -> Hyper:
    return *_adam(group), group["momentum_decay"]


def _adamax(group: Group) -> Hyper:
    return group["lr"], *group["betas"], group["eps"], group["weight_decay"]


def _rprop(group: Group) -> Hyper:
    return group["lr"], *group["etas"], *group["step_sizes"]


def _lion(group: Group) -> Hyper:
    return group["lr"], *group["betas"], group["weight_decay"]


ADAM = Family("adam", _adam, 6, 8)
NADAM = Family("nadam", _nadam, 7, 9, memory=(("mu_product", _one),))
RADAM = Family("radam", _adam, 6, 8)
ADAMAX = Family("adamax", _adamax, 5, 5)
ADAGRAD = Family("adagrad", _keys("lr", "lr_decay", "eps", "weight_decay"), 4, 3)
RMSPROP = Family("rmsprop", _keys("lr", "alpha", "eps", "weight_decay", "momentum"), 5, 6)
ADADELTA = Family("adadelta", _keys("lr", "rho", "eps", "weight_decay"), 4, 5)
ASGD = Family(
    "asgd",
    _keys("lr", "lambd", "alpha", "t0", "weight_decay"),
    5,
    4,
    memory=(("eta", _lr), ("mu", _one)),
)
RPROP = Family("rprop", _rprop, 5, 4)
SGD = Family("sgd", _keys("lr", "momentum", "dampening", "weight_decay"), 4, 5, step_key=None)
LION = Family("lion", _lion, 4, 6, step_key=None)

_MOMENTS = ("exp_avg", "exp_avg_sq")
RULES = {
    rule.name: rule
    for rule in (
        Rule("adam", ADAM, _MOMENTS),
        Rule("adam_amsgrad", ADAM, (*_MOMENTS, "max_exp_avg_sq")),
        Rule("nadam", NADAM, _MOMENTS),
        Rule("radam", RADAM, _MOMENTS),
        Rule("adamax", ADAMAX, ("exp_avg", "exp_inf")),
        Rule(
            "adagrad",
            ADAGRAD,
            ("sum",),
            initial=(("sum", lambda group: group["initial_accumulator_value"]),),
        ),
        Rule("rmsprop", RMSPROP, ("square_avg",)),
        Rule("rmsprop_momentum", RMSPROP, ("square_avg", "momentum_buffer")),
        Rule("rmsprop_centered", RMSPROP, ("square_avg", "grad_avg")),
        Rule("rmsprop_centered_momentum", RMSPROP, ("square_avg", "grad_avg", "momentum_buffer")),
        Rule("adadelta", ADADELTA, ("square_avg", "acc_delta")),
        Rule("asgd", ASGD, ("ax",)),
        Rule("rprop", RPROP, ("prev", "step_size"), initial=(("step_size", _lr),)),
        Rule("sgd", SGD, ()),
        Rule("sgd_momentum", SGD, ("momentum_buffer",)),
        Rule("sgd_nesterov", SGD, ("momentum_buffer",)),
        Rule("lion", LION, ("exp_avg",)),
    )
}


def _adam_rule(group: Group) -> str:
    return "adam_amsgrad" if group["amsgrad"] else "adam"


def _rmsprop_rule(group: Group) -> str:
    centered = "_centered" if group["centered"] else ""
    return f"rmsprop{centered}" + ("_momentum" if group["momentum"] else "")


def _sgd_rule(group: Group) -> str:
    if not group["momentum"]:
        return "sgd"
    return "sgd_nesterov" if group["nesterov"] else "sgd_momentum"


def _always(name: str) -> Callable[[Group], str]:
    return lambda group: name


# Exact classes: a subclass may have changed step(), so it keeps its own.
_SELECT: dict[type, Callable[[Group], str]] = {
    torch.optim.Adam: _adam_rule,
    torch.optim.AdamW: _adam_rule,
    torch.optim.NAdam: _always("nadam"),
    torch.optim.RAdam: _always("radam"),
    torch.optim.Adamax: _always("adamax"),
    torch.optim.Adagrad: _always("adagrad"),
    torch.optim.RMSprop: _rmsprop_rule,
    torch.optim.Adadelta: _always("adadelta"),
    torch.optim.ASGD: _always("asgd"),
    torch.optim.Rprop: _always("rprop"),
    torch.optim.SGD: _sgd_rule,
}


def _lion_pytorch_rule(optimizer: Any, group: Group) -> str | None:
    # decoupled_weight_decay=True there divides the decay by the first learning rate.
    return None if optimizer.decoupled_wd else "lion"


def _timm_lion_rule(optimizer: Any, group: Group) -> str | None:
    changed = group.get("caution") or group.get("corrected_weight_decay")
    return None if changed else "lion"


# Classes of other packages, by package and name, so that nothing is imported for them. None where
# an option makes them another algorithm.
_SELECT_BY_NAME: dict[tuple[str, str], Callable[[Any, Group], str | None]] = {
    ("lion_pytorch", "Lion"): _lion_pytorch_rule,
    ("timm", "Lion"): _timm_lion_rule,
}


# What users added (`registry.py`): for a class its rules, each with the groups it serves.
REGISTERED: dict[type, list[tuple[Callable[[Any, Group], bool], Rule]]] = {}


def select(optimizer: torch.optim.Optimizer, group: Group) -> Rule | None:
    """The fused rule of a param group of `optimizer`, or None where it has none."""
    kind = type(optimizer)
    for serves, rule in REGISTERED.get(kind, ()):
        if serves(optimizer, group):
            return rule
    if choose := _SELECT.get(kind):
        return RULES[choose(group)]
    if find := _SELECT_BY_NAME.get((kind.__module__.split(".")[0], kind.__name__)):
        name = find(optimizer, group)
        return RULES[name] if name else None
    return None


def serve(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every param group of `optimizer` has a fused rule."""
    return all(select(optimizer, group) is not None for group in optimizer.param_groups)


def has_rule(kind: type) -> bool:
    """Whether an optimizer class has a fused rule for some of its options."""
    names = (kind.__module__.split(".")[0], kind.__name__)
    return kind in REGISTERED or kind in _SELECT or names in _SELECT_BY_NAME


def sign(group: Group) -> float:
    """What the gradient is multiplied with: -1 for `maximize`."""
    return -1.0 if group.get("maximize") else 1.0


def reason(optimizer: torch.optim.Optimizer) -> str:
    """Why `optimizer` takes its own step, in words for people."""
    kind = type(optimizer)
    if kind in REGISTERED:
        return f"no registered rule of {kind.__name__} serves these options"
    bases = [base.__name__ for base in _SELECT if issubclass(kind, base)]
    if bases:
        return f"{kind.__name__} is a subclass of {bases[-1]} that may have its own step()"
    return f"no fused rule for {kind.__name__}"
