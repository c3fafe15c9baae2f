"""The calls that a walk draws from: backwards, the loop, p.grad; `more_actions.py` has the others.

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
from tests.walk.slots import Unspecified
from tests.walk.world import World

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
    text = f"backward(p, {used}" + (f', bad=float("{bad}")' if bad is not None else "")
    text += ", scaler=scaler)" if world.config.scaled else ")"
    return grads, text


def refuse_scaled(world: World) -> None:
    if world.config.scaled:
        raise Unspecified("not with a GradScaler that is linked")


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
    refuse_scaled(world)
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
    refuse_scaled(world)
    grads, _ = _grads(world, seeds)
    world.oracle.broken_backward(grads)
    used = {i: seed for i, seed in seeds if i in grads}
    return f"broken_backward(p, {used})"


# --- the loop ---


@action(22)
def step(world: World) -> str:
    world.oracle.step()
    return "scaler.step(opt)\nscaler.update()" if world.config.scaled else "opt.step()"


@action(2, lambda rng: (_seeds(rng),))
def closure_step(world: World, seeds: Any) -> str:
    """step() runs the closure first."""
    refuse_scaled(world)
    if world.oracle.broken or world.oracle.destroyed or world.oracle.removed:
        raise Unspecified("which of the two raises")
    grads, text = _grads(world, seeds)
    world.oracle.backward(grads)
    if world.oracle.expected.error and (world.oracle.has_arrivals or world.oracle.has_assigned):
        raise Unspecified("whether step() refuses from now on")
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


def index(rng: random.Random) -> int:
    return rng.randrange(12)


@action(2, lambda rng: (index(rng), rng.randrange(31)))
def assign(world: World, index: int, seed: int) -> str:
    i = index % len(world.specs)
    grad = helpers.fill(world.specs[i].shape, torch.float64, seed)
    world.oracle.assign(i, grad)
    return f"p[{i}].grad = fill(p[{i}].shape, F32, {seed})"


@action(1.5, lambda rng: (index(rng), rng.choice([0.5, 1.0, -2.0])))
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


@action(2, lambda rng: (index(rng), rng.choice([0.5, -2.0])))
def scale(world: World, index: int, factor: float) -> str:
    i = index % len(world.specs)
    world.oracle.scale(i, factor)
    return f"p[{i}].grad.mul_({factor})"


@action(2, lambda rng: (index(rng),))
def set_none(world: World, index: int) -> str:
    i = index % len(world.specs)
    world.oracle.set_none(i)
    return f"p[{i}].grad = None"
