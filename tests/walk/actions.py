"""The calls that a walk draws from.

An action has plain arguments, so that it can be deleted, printed and repeated. `apply` changes the
oracle and returns the line of Python that does the same to the optimizer; both see the same state.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.walk import helpers
from tests.walk.oracle import Oracle
from tests.walk.slots import Unspecified
from tests.walk.world import STEPS, World, draw_param

Draw = Callable[[random.Random], tuple[Any, ...]]
Apply = Callable[..., str]


@dataclass(frozen=True)
class Action:
    """One drawn call."""

    name: str
    args: tuple[Any, ...] = ()

    def apply(self, world: World) -> str:
        return ACTIONS[self.name][2](world, *self.args)


ACTIONS: dict[str, tuple[float, Draw, Apply]] = {}


def action(weight: float, draw: Draw = lambda _: ()) -> Callable[[Apply], Apply]:
    """Let walks draw this, so often."""

    def register(apply: Apply) -> Apply:
        ACTIONS[apply.__name__] = (weight, draw, apply)
        return apply

    return register


def draw_action(rng: random.Random) -> Action:
    names = list(ACTIONS)
    (name,) = rng.choices(names, [ACTIONS[n][0] for n in names])
    return Action(name, ACTIONS[name][1](rng))


# --- backwards ---


def _seeds(rng: random.Random) -> tuple[tuple[int, int], ...]:
    kind = rng.random()
    chosen = range(8) if kind < 0.6 else [i for i in range(8) if rng.random() < 0.5]
    return tuple((i, rng.randrange(36)) for i in chosen)


def _grads(world: World, seeds: Any, bad: float | None = None) -> tuple[dict[int, Any], str]:
    used = {i: seed for i, seed in seeds if i < len(world.specs)}
    like = {i: torch.zeros(world.specs[i].shape, dtype=world.specs[i].dtype) for i in used}
    grads = {i: helpers.gradient(like[i], seed, bad).double() for i, seed in used.items()}
    grads = {i: g for i, g in grads.items() if world.oracle.slots[i].needs_grad}
    text = f"backward(p, {used}" + (f', bad=float("{bad}"))' if bad is not None else ")")
    return grads, text


@action(24, lambda rng: (_seeds(rng),))
def backward(world: World, seeds: Any) -> str:
    grads, text = _grads(world, seeds)
    world.oracle.backward(grads)
    return text


@action(2, lambda rng: (_seeds(rng), rng.choice([float("nan"), float("inf"), -float("inf")])))
def bad_backward(world: World, seeds: Any, bad: float) -> str:
    grads, text = _grads(world, seeds, bad)
    world.oracle.backward(grads)
    return text


@action(1.5, lambda rng: (_seeds(rng),))
def reentrant_backward(world: World, seeds: Any) -> str:
    grads, text = _grads(world, seeds)
    world.oracle.backwards([grads, grads], None)
    return f"reentrant_{text}"


@action(9, lambda rng: (rng.choice([1.0, 2.0, 3.0, 5.0]), [_seeds(rng)] * rng.choice([1, 1, 2])))
def weighted_backward(world: World, weight: float, many: Any) -> str:
    made = [_grads(world, seeds) for seeds in many]
    world.oracle.backwards([grads for grads, _ in made], weight)
    lines = "\n".join(f"    {text}" for _, text in made)
    return f"with opt.micro_batch(weight={weight}):\n{lines}"


@action(1.5, lambda rng: (_seeds(rng),))
def broken_backward(world: World, seeds: Any) -> str:
    grads, _ = _grads(world, seeds)
    world.oracle.broken_backward(grads)
    used = {i: seed for i, seed in seeds if i in grads}
    return f"broken_backward(p, {used})"


# --- the loop ---


@action(22)
def step(world: World) -> str:
    world.oracle.step()
    return "opt.step()"


@action(2, lambda rng: (_seeds(rng),))
def closure_step(world: World, seeds: Any) -> str:
    """step() runs the closure first."""
    if world.oracle.broken or world.oracle.destroyed or world.oracle.removed:
        raise Unspecified("which of the two raises")
    grads, text = _grads(world, seeds)
    world.oracle.backward(grads)
    if not world.oracle.expected.error:
        world.oracle.step()
    return f"opt.step(lambda: {text})"


@action(3)
def flush(world: World) -> str:
    world.oracle.flush()
    return "opt.flush()"


@action(7, lambda rng: (rng.random() < 0.7,))
def zero_grad(world: World, set_to_none: bool) -> str:
    world.oracle.zero_grad(set_to_none)
    return "opt.zero_grad()" if set_to_none else "opt.zero_grad(set_to_none=False)"


@action(3, lambda rng: (rng.random() < 0.7,))
def model_zero_grad(world: World, set_to_none: bool) -> str:
    world.oracle.model_zero_grad(set_to_none)
    return f"zero_grad(p, set_to_none={set_to_none})  # model.zero_grad()"


@action(2.5, lambda rng: (rng.choice([0.5, 2.0, 1e4]),))
def clip_grad_norm_(world: World, max_norm: float) -> str:
    world.oracle.clip_grad_norm(max_norm)
    return f"norm = opt.clip_grad_norm_({max_norm})"


@action(1.5, lambda rng: (rng.choice([0.5, 1e4]),))
def torch_clip(world: World, max_norm: float) -> str:
    world.oracle.torch_clip(max_norm)
    return f"norm = torch.nn.utils.clip_grad_norm_(p, {max_norm})"


# --- p.grad by hand ---


def _index(rng: random.Random) -> int:
    return rng.randrange(12)


@action(2, lambda rng: (_index(rng), rng.randrange(31)))
def assign(world: World, index: int, seed: int) -> str:
    i = index % len(world.specs)
    grad = helpers.fill(world.specs[i].shape, torch.float64, seed)
    world.oracle.assign(i, grad)
    return f"p[{i}].grad = fill(p[{i}].shape, F32, {seed})"


@action(1.5, lambda rng: (_index(rng), rng.choice([0.5, 1.0, -2.0])))
def assign_scaled(world: World, index: int, factor: float) -> str:
    """p.grad = p.grad * factor"""
    i = index % len(world.specs)
    slot = world.oracle.slots[i]
    if slot.grad is None or not slot.is_known:
        raise Unspecified("what shows")
    error = slot.grad.error * abs(factor)
    world.oracle.assign(i, slot.grad.value * factor)
    assert slot.grad is not None
    slot.grad.error = error
    return f"p[{i}].grad = p[{i}].grad * {factor}"


@action(2, lambda rng: (_index(rng), rng.choice([0.5, -2.0])))
def scale(world: World, index: int, factor: float) -> str:
    i = index % len(world.specs)
    world.oracle.scale(i, factor)
    return f"p[{i}].grad.mul_({factor})"


@action(2, lambda rng: (_index(rng),))
def set_none(world: World, index: int) -> str:
    i = index % len(world.specs)
    world.oracle.set_none(i)
    return f"p[{i}].grad = None"


# --- parameters ---


@action(1.5, lambda rng: (_index(rng),))
def freeze(world: World, index: int) -> str:
    i = index % len(world.specs)
    world.oracle.slots[i].needs_grad = False
    return f"p[{i}].requires_grad_(False)"


@action(2.5, lambda rng: (_index(rng),))
def unfreeze(world: World, index: int) -> str:
    frozen = [i for i, slot in enumerate(world.oracle.slots) if not slot.needs_grad]
    if not frozen:
        raise Unspecified("nothing is frozen")
    i = frozen[index % len(frozen)]
    world.oracle.slots[i].needs_grad = True
    return f"p[{i}].requires_grad_(True)"


_WRITES = {
    "copy": "with torch.no_grad():\n    p[{i}].copy_(fill(p[{i}].shape, p[{i}].dtype, {seed}))",
    "data": "p[{i}].data.copy_(fill(p[{i}].shape, p[{i}].dtype, {seed}))",
    "element": "p[{i}].data[(0,) * p[{i}].dim()] = 1.5",
    "clamp": "with torch.no_grad():\n    p[{i}].clamp_(min=-torch.inf)",
    "half": "with torch.no_grad():\n    p[{i}].mul_(0.5)",
    "storage": "p[{i}].data = p[{i}].data.clone()",
}


@action(5, lambda rng: (rng.choice(list(_WRITES)), _index(rng), rng.randrange(31)))
def write(world: World, how: str, index: int, seed: int) -> str:
    i = index % len(world.specs)
    shown = world.shown[i]
    written = shown.clone()
    if how in ("copy", "data"):
        written.copy_(helpers.fill(shown.shape, shown.dtype, seed))
    elif how == "half":
        written.mul_(0.5)
    elif how == "element":
        if not written.numel():
            raise Unspecified("no element")
        written[(0,) * written.dim()] = 1.5
    world.oracle.update.write(i, written, shown)
    world.shown[i] = written
    return _WRITES[how].format(i=i, seed=seed)


@action(0.7, lambda rng: (_index(rng), rng.choice([torch.float32, torch.bfloat16, torch.float16])))
def convert(world: World, index: int, dtype: torch.dtype) -> str:
    """model.to(dtype), taken up at the next zero_grad()."""
    i = index % len(world.specs)
    code = world.convert(i, dtype)
    world.oracle.zero_grad()
    return f"torch.nn.ParameterList(p[{i}:{i + 1}]).to({code})\nopt.zero_grad()"


@action(1, lambda rng: (draw_param(rng), rng.choice([None, 0.25])))
def add_param_group(world: World, spec: Any, lr: float | None) -> str:
    if len(world.specs) >= 8:
        raise Unspecified("enough")
    options = {} if lr is None else {"lr": lr / 4}
    spec = world.fit(spec)
    code = world.add(spec, options)
    text = f', "lr": {options["lr"]}' if options else ""
    return f'p.append({code})\nopt.add_param_group({{"params": p[-1:]{text}}})'


# --- options ---


@action(3, lambda rng: (_index(rng), _index(rng), _index(rng)))
def hyper_parameter(world: World, group: int, name: int, value: int) -> str:
    groups = world.oracle.update.plain.param_groups
    g, changes = group % len(groups), world.kind.changes
    key = list(changes)[name % len(changes)]
    new = changes[key][value % len(changes[key])]
    if groups[g].get("nesterov") and key == "momentum" and not new:
        raise Unspecified("nesterov without momentum")
    groups[g][key] = new
    return f'opt.param_groups[{g}]["{key}"] = {new!r}'


@action(1.5, lambda rng: (rng.choice(STEPS),))
def set_steps(world: World, steps: int | None) -> str:
    world.oracle.set_steps(steps)
    return f"opt.gradient_accumulation_steps = {steps}"


@action(1, lambda rng: (rng.choice([None, 0.5, 1e4]),))
def set_max_norm(world: World, max_norm: float | None) -> str:
    world.oracle.max_norm = max_norm
    return f"opt.max_grad_norm = {max_norm}"


@action(1, lambda rng: (rng.random() < 0.5,))
def set_skip(world: World, skip: bool) -> str:
    if world.config.optimizer == "lion":
        raise Unspecified("the sign of NaN")
    world.oracle.skip = skip
    return f"opt.skip_nonfinite = {skip}"


@action(0.7)
def clear_state(world: World) -> str:
    """The optimizer's history begins anew."""
    world.oracle.update.plain.state.clear()
    return "opt.state.clear()"


# --- checkpoints and copies ---


@action(4, lambda rng: (rng.random() < 0.3,))
def save(world: World, to_file: bool) -> str:
    if world.oracle.broken:
        world.oracle.expected.error = RuntimeError
        return "opt.state_dict()"
    world.saved = world.oracle.saved()
    text = "through_a_file(opt.state_dict())" if to_file else "copy.deepcopy(opt.state_dict())"
    return f"values, saved = values_of(p), {text}"


@action(3, lambda rng: (rng.random() < 0.5,))
def load(world: World, values_first: bool) -> str:
    saved, oracle = world.saved, world.oracle
    if saved is None:
        raise Unspecified("nothing was saved")
    text = ["opt.load_state_dict(saved)", "restore(p, values)"]
    if len(saved.update.layout) != len(oracle.update.layout):
        oracle.expected.error = ValueError
        return text[0]
    if saved.holds_window() and saved.steps != oracle.steps:
        if not saved.micro_batches:
            raise Unspecified("whose window it is")
        oracle.expected.error = ValueError
        return text[0]
    if oracle.has_assigned:
        raise Unspecified("an assigned gradient, when a checkpoint is loaded")
    world.oracle = oracle.resumed(saved)
    return "\n".join(reversed(text) if values_first else text)


@action(2)
def load_fresh(world: World) -> str:
    saved, oracle = world.saved, world.oracle
    if saved is None or len(saved.update.layout) != len(oracle.update.layout):
        raise Unspecified("nothing to load")
    if saved.holds_window() and saved.steps != oracle.steps:
        raise Unspecified("another window")
    new = oracle.resumed(saved)
    _is_new(new)
    world.oracle = new
    return f"p = fresh(p)\nrestore(p, values)\n{world.wrap()}\nopt.load_state_dict(saved)"


def _is_new(oracle: Oracle) -> None:
    oracle.warned = set()
    for slot in oracle.slots:
        slot.is_attached = slot.needs_grad


@action(3, lambda rng: (rng.choice(["deepcopy", "pickle", "file"]), rng.random() < 0.6))
def copied(world: World, how: str, goes_on_with_copy: bool) -> str:
    """A copy, or the same run in a new process: nothing changes, to the bit."""
    text = {"deepcopy": "copy.deepcopy((p, opt))", "pickle": "pickle.loads(pickle.dumps((p, opt)))"}
    if world.oracle.broken:
        world.oracle.expected.error = RuntimeError
        return text.get(how, "opt.state_dict()")
    if how != "file" and world.config.optimizer == "lion":
        raise Unspecified("its own copy loses its options")
    saved = world.oracle.saved()
    if not goes_on_with_copy:
        return text.get(how, "opt.state_dict()")
    new = world.oracle.resumed(saved)
    _is_new(new)
    world.oracle = new
    if how == "file":
        state = "state = through_a_file(opt.state_dict())"
        return f"{state}\np = fresh(p)\n{world.wrap()}\nopt.load_state_dict(state)"
    return f"p, opt = {text[how]}"


@action(
    1,
    lambda rng: (
        rng.choice(STEPS),
        rng.choice([None, 0.5, 1e4]),
        rng.random() < 0.7,
        rng.choice([None, "fp32", "none"]),
    ),
)
def rewrap(world: World, steps: Any, max_norm: Any, skip: bool, masters: str | None) -> str:
    skip |= world.config.optimizer == "lion"
    if not world.oracle.detach():
        return "opt.detach()"
    return "inner = opt.detach()\n" + world.rewrap(steps, max_norm, skip, masters)


@action(0.5)
def load_into_plain(world: World) -> str:
    """A state dict of the wrapper loads into the plain optimizer, and leaves the wrapper alone."""
    if world.saved is None or len(world.saved.update.layout) != len(world.oracle.update.layout):
        raise Unspecified("nothing to load")
    plain = world.wrap().splitlines()[0].replace("inner", "plain").replace("p[", "q[")
    return f"q = fresh(p)\n{plain}\nplain.load_state_dict(saved)"


@action(0.5)
def show(world: World) -> str:
    return "repr(opt)"


@action(0.5)
def autograd_grad(world: World) -> str:
    """Gradients that are asked for, and not accumulated."""
    wanted = [i for i, slot in enumerate(world.oracle.slots) if slot.needs_grad]
    if not wanted:
        raise Unspecified("nothing needs a gradient")
    return (
        f"torch.autograd.grad(sum(p[i].float().sum() for i in {wanted}), [p[i] for i in {wanted}])"
    )
