"""Which optimizer has which fused update rule, this package's and users' own."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch.optim import Optimizer

from . import as_c, text
from .as_torch import as_torch
from .number import number
from .rule import Family, Group, Rule

Start = float | Callable[[Group], float]
# Exactly this class: a subclass may have changed step(), so it keeps its own. Or a class by its
# package and name, so that nothing is imported for it.
Owner = type | tuple[str, str]


class _Entry(NamedTuple):
    serves: Callable[[Any, Group], bool]
    rule: Rule


_entries: dict[Owner, list[_Entry]] = {}
_built_in: set[Owner] = set()


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
    from their text. `fusedaccum/kernels/rules.py` is full of examples, and
    `docs/add_a_rule.md` says what may stand in one.

    Args:
        optimizer_class: exactly this class, not its subclasses, which may step differently.
        name: the elements' function.
        kernels: the module that has both functions, or its importable name. The name alone does
            not import it (and Triton) on a machine without a GPU.
        hyper: keys of a param group, in the order that the scalars function unpacks; or a function
            from the group to that tuple. `maximize` is taken care of.
        n_hyper: how many numbers a function `hyper` returns, if the scalars function does not say
            so by unpacking `hyper` into names.
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
        TypeError: for a class that is no optimizer, and for arguments of another kind than these.
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
    if _built_in & {optimizer_class, _names(optimizer_class)}:
        raise ValueError(
            f"{optimizer_class.__name__} has a fused rule in fusedaccum already; register a "
            "subclass of your own"
        )
    if when is not None and not callable(when):
        raise TypeError(f"when must be a function of an optimizer and a param group, got {when!r}")
    rule = make_rule(
        name,
        kernels=kernels,
        hyper=hyper,
        n_hyper=n_hyper,
        states=states,
        memory=memory,
        step_key=step_key,
        family=family,
    )
    _check_scalars(rule.family)
    return add(optimizer_class, rule, when)


def unregister_rules(optimizer_class: type[Optimizer]) -> None:
    """Take away what `register_rule` gave a class; optimizers wrapped already step natively.

    Raises:
        KeyError: if nothing was registered for it.
    """
    if optimizer_class in _built_in:
        raise KeyError(optimizer_class)
    del _entries[optimizer_class]


def make_rule(
    name: str,
    *,
    kernels: str | ModuleType,
    hyper: Sequence[str] | Callable[[Group], tuple[Any, ...]],
    n_hyper: int | None = None,
    states: Sequence[str] | Mapping[str, Start] = (),
    memory: Mapping[str, Start] | None = None,
    step_key: str | None = "step",
    family: str | None = None,
) -> Rule:
    """A rule; see `register_rule`, which takes the same and also runs the scalars function once."""
    if not isinstance(kernels, (str, ModuleType)):
        raise TypeError(f"kernels must be a module or its name, got {kernels!r}")
    module = kernels if isinstance(kernels, str) else kernels.__name__
    _check_keys("states", states)
    starts = dict.fromkeys(states, 0.0) if not isinstance(states, Mapping) else dict(states)
    memory = {} if memory is None else memory
    if not isinstance(memory, Mapping):
        raise TypeError(f"memory must map each name to what it starts as, got {memory!r}")
    _check_keys("memory", memory)
    if not callable(hyper):
        _check_keys("hyper", hyper)
    prefix = family or name
    n_scalars = _n_scalars(module, name, len(starts))
    _check_names(name, [*states, *memory, *([] if step_key is None else [step_key])])
    n_hyper = _n_hyper(text.function(module, f"{prefix}_scalars"), hyper, n_hyper)
    shared = Family(
        name=prefix,
        hyper=_reader(name, hyper, n_hyper),
        n_hyper=n_hyper,
        n_scalars=n_scalars,
        memory=tuple((key, _start(value)) for key, value in memory.items()),
        step_key=step_key,
        kernels=module,
    )
    # What starts as zero is not named: `Rule.starts` is about what depends on the group.
    initial = tuple((key, _start(value)) for key, value in starts.items() if value != 0.0)
    return Rule(name, shared, tuple(starts), initial)


def add(owner: Owner, rule: Rule, when: Callable[[Any, Group], bool] | None) -> Rule:
    """Give a class one more rule, for what those before it do not serve.

    Returns:
        The rule, with the family that the class has already.

    Raises:
        ValueError: if it does not go together with the others.
    """
    known = _entries.get(owner, [])
    for _, other in known:
        if other.name == rule.name or _shape(other.family) != _shape(rule.family):
            of = owner.__name__ if isinstance(owner, type) else owner[1]
            raise ValueError(
                f"{of} has the rule {other.name!r} of family {other.family.name!r} already; its "
                "other rules need names of their own and the same family, hyper, memory and "
                "step_key (unregister_rules() takes them away)"
            )
    if known:
        rule = dataclasses.replace(rule, family=known[0].rule.family)
    _entries.setdefault(owner, []).append(_Entry(when or _always, rule))
    return rule


def seal() -> None:
    """What is registered so far is this package's: nobody adds to it or takes it away."""
    _built_in.update(_entries)


def forget_own() -> None:
    """Take this package's rules away, before `builtin` registers them: a notebook may reload it."""
    for owner in _built_in:
        del _entries[owner]
    _built_in.clear()


def select(optimizer: Optimizer, group: Group) -> Rule | None:
    """The fused rule of a param group of `optimizer`, or None where it has none."""
    if has_step_of_its_own(optimizer):
        return None
    kind = type(optimizer)
    for serves, rule in _entries.get(kind, _entries.get(_names(kind), [])):
        if serves(optimizer, group):
            return rule
    return None


def serve(optimizer: Optimizer) -> bool:
    """Whether every param group of `optimizer` has a fused rule."""
    return all(select(optimizer, group) is not None for group in optimizer.param_groups)


def has_step_of_its_own(optimizer: Optimizer) -> bool:
    """Whether somebody assigned `optimizer.step`. A scheduler of torch does too: its function calls
    the one before it."""
    step = vars(optimizer).get("step")
    while getattr(step, "__globals__", {}).get("__name__") == "torch.optim.lr_scheduler":
        step = step.__wrapped__  # type: ignore[union-attr]
    return step is not None and getattr(step, "__func__", step) is not type(optimizer).step


def reason(optimizer: Optimizer) -> str:
    """Why `optimizer` takes its own step, in words for people."""
    kind = type(optimizer)
    if has_step_of_its_own(optimizer):
        return f"somebody assigned the step() of this {kind.__name__}"
    if kind in _entries and kind not in _built_in:
        return f"no registered rule of {kind.__name__} serves these options"
    known = [owner for owner in _entries if isinstance(owner, type) and owner in _built_in]
    bases = [base.__name__ for base in known if issubclass(kind, base)]
    if bases:
        return f"{kind.__name__} is a subclass of {bases[-1]} that may have its own step()"
    return f"no fused rule for {kind.__name__}"


def _check_keys(argument: str, keys: Any) -> None:
    """Names in a sequence; one name alone would be taken letter by letter."""
    is_one = isinstance(keys, str) or not hasattr(keys, "__iter__")
    if is_one or not all(isinstance(key, str) for key in keys):
        raise TypeError(f'{argument} must be a sequence of names, as ("lr",) is; got {keys!r}')


def _check_names(name: str, keys: Sequence[str]) -> None:
    """What a rule keeps in `optimizer.state[p]` has a place of its own there."""
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise ValueError(
            f"rule {name}: states, memory and step_key name {twice[0]!r} twice; each is a key of "
            "optimizer.state[p], so give each a name of its own"
        )


def _names(kind: type) -> tuple[str, str]:
    return kind.__module__.split(".")[0], kind.__name__


def _always(optimizer: Any, group: Group) -> bool:
    return True


def _start(value: Start) -> Callable[[Group], float]:
    if callable(value):
        return value
    start = number(value)
    if start is None:
        raise TypeError(f"a state starts as a number, or as what a function returns; got {value!r}")
    return lambda group: start


def _n_hyper(scalars: ast.FunctionDef, hyper: Any, n_hyper: int | None) -> int:
    """How many hyper-parameters there are, by who says so."""
    if not callable(hyper):
        return len(hyper)
    n_hyper = n_hyper or text.n_unpacked(scalars, "hyper")
    if n_hyper is None:
        raise ValueError("hyper is a function: say with n_hyper how many numbers it returns")
    return n_hyper


def _reader(name: str, hyper: Any, n_hyper: int) -> Callable[[Group], tuple[Any, ...]]:
    if not callable(hyper):
        keys = tuple(hyper)

        def read_keys(group: Group) -> tuple[Any, ...]:
            try:
                return tuple(map(group.__getitem__, keys))
            except KeyError as error:
                raise KeyError(f"rule {name}: hyper names {error}, no key of a group") from error

        return read_keys

    def read(group: Group) -> tuple[Any, ...]:
        values = tuple(hyper(group))
        if len(values) != n_hyper:
            raise ValueError(
                f"rule {name}: hyper returned {len(values)} numbers, and {n_hyper} are taken"
            )
        return values

    return read


def _shape(family: Family) -> tuple[Any, ...]:
    """What two rules of one class must have in common."""
    keys = tuple(key for key, _ in family.memory)
    return family.name, family.n_hyper, family.n_scalars, keys, family.step_key, family.kernels


def _n_scalars(module: str, name: str, n_states: int) -> int:
    """How many scalars the elements' function takes, once it is known to be sound."""
    loop = as_c.translate(text.function(module, name))
    if (n_states, n_states) != (len(loop.states), len(loop.results)):
        raise ValueError(
            f"{module}.{name} unpacks {len(loop.states)} states and returns {len(loop.results)}, "
            f"but {n_states} are named"
        )
    return len(loop.scalars)


def _check_scalars(family: Family) -> None:
    """Run the scalars function once, on numbers that mean nothing, to see what it returns."""
    name = f"{family.name}_scalars"
    function = getattr(as_torch(family.kernels), name)
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
