"""Fused rules of users' own optimizers, without a change in this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch.optim import Optimizer

from ..backends.compiled import source as cgen
from . import as_torch as rule_text
from . import builtin as rules
from .builtin import Family, Group, Rule

Start = float | Callable[[Group], float]


def register_rule(
    optimizer_class: type[Optimizer],
    name: str,
    *,
    kernels: str | ModuleType,
    hyper: Sequence[str] | Callable[[Group], tuple[Any, ...]],
    n_hyper: int | None = None,
    states: Sequence[str] | Mapping[str, Start] = (),
    memory: Mapping[str, Start] | None = None,
    step_key: str | None = "step",
    family: str | None = None,
    when: Callable[[Any, Group], bool] | None = None,
) -> Rule:
    """Give an optimizer class a fused update rule; those wrapped afterwards step by it.

    Two Triton functions are the rule: `<family>_scalars(hyper, step, memory)`, once per tensor in
    float64, and `<name>(param, grad, states, scalars)`, for each element in fp32. They run as
    Triton on a GPU; the CPU's C loop, and torch operations where there is no compiler, are made
    from their text. `fusedaccum/kernels/rules.py` is full of examples, `kernels/README.md` says
    what may stand in one.

    Args:
        optimizer_class: exactly this class, not its subclasses, which may step differently.
        name: the elements' function.
        kernels: the module that has both functions, or its importable name. The name alone does
            not import it (and Triton) on a machine without a GPU.
        hyper: keys of a param group, in the order that the scalars function unpacks; or a function
            from the group to that tuple (then `n_hyper` says how long it is). `maximize` is taken
            care of.
        states: names under which `optimizer.state[p]` keeps the rule's tensors, in its order, each
            fp32 and of the parameter's shape; a mapping also says what one starts as (a number or
            a function of the group), else zero.
        memory: names in `optimizer.state[p]` of numbers that the scalars function keeps per tensor,
            and what they start as.
        step_key: name in `optimizer.state[p]` of the step count; None if the class keeps none.
        family: prefix of the scalars function, where several rules share it; None: `name`.
        when: whether the rule serves an optimizer and a param group of it; others take the class's
            own `step()`. None: all of them. The first registered rule that serves is taken.

    Returns:
        The rule.

    Raises:
        TypeError: for a class that is no optimizer.
        LookupError: for a module or function that is not there.
        ValueError: for functions that do not fit together or are no straight-line arithmetic, and
            for a class that this package serves already. Nothing is registered then.

    Example:
        See `examples/custom_rule.py`, which is complete and checks itself.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            f"optimizer_class must be a subclass of torch.optim.Optimizer, got {optimizer_class!r}"
        )
    known = rules.REGISTERED.get(optimizer_class, [])
    if not known and rules.has_rule(optimizer_class):
        raise ValueError(
            f"{optimizer_class.__name__} has a fused rule in fusedaccum already; register a "
            "subclass of your own"
        )
    if not callable(hyper):
        n_hyper = len(hyper)
    elif n_hyper is None:
        raise ValueError("hyper is a function: say with n_hyper how many numbers it returns")
    module = kernels if isinstance(kernels, str) else kernels.__name__
    starts = dict.fromkeys(states, 0.0) if not isinstance(states, Mapping) else dict(states)
    memory = memory or {}
    prefix = family or name
    shared = Family(
        name=prefix,
        hyper=_reader(hyper),
        n_hyper=n_hyper,
        n_scalars=_n_scalars(module, name, len(starts)),
        memory=tuple((key, _start(value)) for key, value in memory.items()),
        step_key=step_key,
        kernels=module,
        reference=None,
    )
    _check_scalars(shared)
    for _, other in known:
        if other.name == name or _shape(other.family) != _shape(shared):
            raise ValueError(
                f"{optimizer_class.__name__} has the rule {other.name!r} of family "
                f"{other.family.name!r} already; its other rules need names of their own and the "
                "same family, hyper, memory and step_key (unregister_rules() takes them away)"
            )
    if known:
        shared = known[0][1].family
    initial = tuple((key, _start(value)) for key, value in starts.items())
    rule = Rule(name, shared, tuple(starts), initial)
    rules.REGISTERED.setdefault(optimizer_class, []).append((when or _always, rule))
    return rule


def unregister_rules(optimizer_class: type[Optimizer]) -> None:
    """Take away what `register_rule` gave a class; optimizers wrapped already step natively.

    Raises:
        KeyError: if nothing was registered for it.
    """
    del rules.REGISTERED[optimizer_class]


def _always(optimizer: Any, group: Group) -> bool:
    return True


def _start(value: Start) -> Callable[[Group], float]:
    if callable(value):
        return value
    number = float(value)
    return lambda group: number


def _reader(hyper: Any) -> Callable[[Group], tuple[Any, ...]]:
    if callable(hyper):
        read: Callable[[Group], tuple[Any, ...]] = hyper
        return read
    keys = tuple(hyper)
    return lambda group: tuple(group[key] for key in keys)


def _shape(family: Family) -> tuple[Any, ...]:
    """What two rules of one class must have in common."""
    keys = tuple(key for key, _ in family.memory)
    return family.name, family.n_hyper, family.n_scalars, keys, family.step_key, family.kernels


def _n_scalars(module: str, name: str, n_states: int) -> int:
    """How many scalars the elements' function takes, once it is known to be sound."""
    names, scalars, _, results = cgen.translate(rule_text.function(module, name))
    if (n_states, n_states) != (len(names), len(results)):
        raise ValueError(
            f"{module}.{name} unpacks {len(names)} states and returns {len(results)}, but "
            f"{n_states} are named"
        )
    return len(scalars)


def _check_scalars(family: Family) -> None:
    """Run the scalars function once, on numbers that mean nothing, to see what it returns."""
    name = f"{family.name}_scalars"
    rule_text.function(family.kernels, name)
    function = getattr(rule_text.as_torch(family.kernels), name)
    n_memory = len(family.memory)
    try:
        scalars, memory = function((0.5,) * family.n_hyper, 1.0, (0.5,) * n_memory)
        found = len(scalars), len(memory)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{family.kernels}.{name} cannot take {family.n_hyper} hyper-parameters and {n_memory} "
            f"numbers of memory: {error}"
        ) from error
    if found != (family.n_scalars, n_memory):
        raise ValueError(
            f"{family.kernels}.{name} returns {found[0]} scalars and {found[1]} numbers of memory; "
            f"the elements' function unpacks {family.n_scalars} scalars, and {n_memory} numbers "
            "of memory are named"
        )
