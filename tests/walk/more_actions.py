"""More calls that a walk draws from: parameters, options, checkpoints and copies."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.walk import helpers
from tests.walk.actions import action, index, refuse_scaled
from tests.walk.oracle import Oracle
from tests.walk.slots import Unspecified
from tests.walk.world import STEPS, World, draw_param

# --- parameters ---


@action(1.5, lambda rng: (index(rng),))
def freeze(world: World, index: int) -> str:
    i = index % len(world.specs)
    world.oracle.slots[i].needs_grad = False
    return f"p[{i}].requires_grad_(False)"


@action(2.5, lambda rng: (index(rng),))
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
    "zero": "p[{i}].data.zero_()",
    "storage": "p[{i}].data = p[{i}].data.clone()",
}


@action(5, lambda rng: (rng.choice(list(_WRITES)), index(rng), rng.randrange(31)))
def write(world: World, how: str, index: int, seed: int) -> str:
    i = index % len(world.specs)
    shown = world.shown[i]
    written = shown.clone()
    if how in ("copy", "data"):
        written.copy_(helpers.fill(shown.shape, shown.dtype, seed))
    elif how in ("half", "zero"):
        written.copy_(written * 0.5 if how == "half" else 0.0)
    elif how == "element":
        if not written.numel():
            raise Unspecified("no element")
        written[(0,) * written.dim()] = 1.5
    world.oracle.update.write(i, written, shown)
    world.shown[i] = written
    return _WRITES[how].format(i=i, seed=seed)


@action(0.7, lambda rng: (index(rng), rng.choice([torch.float32, torch.bfloat16, torch.float16])))
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


@action(3, lambda rng: (index(rng), index(rng), index(rng)))
def hyper_parameter(world: World, group: int, name: int, value: int) -> str:
    groups = world.oracle.update.plain.param_groups
    g, changes = group % len(groups), world.kind.changes
    key = list(changes)[name % len(changes)]
    new = changes[key][value % len(changes[key])]
    if groups[g].get("nesterov") and key == "momentum" and not new:
        raise Unspecified("nesterov without momentum")
    groups[g][key] = new
    text = f"torch.{new!r}" if isinstance(new, torch.Tensor) else repr(new)
    return f'opt.param_groups[{g}]["{key}"] = {text}'


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
    new.is_whole = saved.is_whole  # whatever came in between
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
    if how != "file" and (world.config.optimizer == "lion" or world.config.scaled):
        raise Unspecified("its own copy loses its options; a GradScaler's copy is another")
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
    if steps is None:
        refuse_scaled(world)
    if not world.oracle.detach():
        return "opt.detach()"
    return "inner = opt.detach()\n" + world.rewrap(steps, max_norm, skip, masters)


@action(0.5)
def load_into_plain(world: World) -> str:
    """A state dict of the wrapper loads into the plain optimizer, and leaves the wrapper alone.

    The plain one goes on from there with parameters in fp32; others' states it rounds.
    """
    saved = world.saved
    if saved is None or len(saved.update.layout) != len(world.oracle.update.layout):
        raise Unspecified("nothing to load")
    plain = world.wrap().splitlines()[0].replace("inner", "plain").replace("p[", "q[")
    lines = [f"q = fresh(p)\nrestore(q, values)\n{plain}"]
    lines.append("plain.load_state_dict(copy.deepcopy(saved))")  # else it steps saved
    world.plain = copy.deepcopy(saved.update)
    grads: list[Any] = [None] * len(world.specs)
    for i, spec in enumerate(world.specs):
        if spec.dtype is torch.float32:
            grad = helpers.fill(spec.shape, torch.float64, i)
            grads[i] = grad, torch.zeros_like(grad)
            lines.append(f"q[{i}].grad = fill(q[{i}].shape, F32, {i})")
    world.plain.run(grads, None, skip=False, overflow=False)
    return "\n".join([*lines, "plain.step()"])


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
