"""Checks of every update rule with every way of keeping the parameter, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..backends import (
    Correction,
    Finalize,
    Keep,
    Step,
    StepTensor,
    UpdateScalars,
    reference,
    rounding,
)
from ..backends.compiled import compiler, libraries, source
from ..rules.as_torch import as_torch
from ..rules.builtin import RULES
from ..rules.rule import Rule, sign
from . import checks
from .checks import Check, Memory, Runner, host, normal, short

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Parameter dtype, and how its precise value is kept.
LAYOUTS = [(FP32, Keep.PARAM), *((BF16, keep) for keep in Keep)]
HALF_LAYOUTS = [(FP16, Keep.FP32), (FP16, Keep.PARAM)]
COEF = 0.7
# Hyper-parameters of two param groups, for every family. The rate is large, so that a wrong update
# stands out from the rounding of the parameter.
GROUP: dict[str, Any] = {
    "lr": 0.25, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.9,
    "decoupled_weight_decay": True, "momentum_decay": 0.02, "lr_decay": 0.1, "alpha": 0.75,
    "rho": 0.9, "lambd": 0.1, "t0": 3.0, "etas": (0.5, 1.2), "step_sizes": (1e-3, 2.0),
    "dampening": 0.3, "initial_accumulator_value": 0.5, "maximize": False,
}  # fmt: skip
OTHER = {
    "lr": 0.125, "decoupled_weight_decay": False, "maximize": True, "weight_decay": 0.2,
    "dampening": 0.0,
}  # fmt: skip
GROUPS = [GROUP, GROUP | OTHER]
# The numbers of the checked updates: the first, the second, and one in which RAdam's variance is
# tractable and ASGD averages.
UPDATES = (1, 2, 10)
KINDS = {
    Keep.PARAM: "",
    Keep.SPLIT: " with split master",
    Keep.FP32: " with fp32 master",
    Keep.STOCHASTIC: " rounded stochastically",
}


def all_checks(backend: Runner, full: bool) -> Iterator[Check]:
    """Every rule with every layout, aligned, and with one layout unaligned; with `full` with every
    layout, fp16's as well."""
    layouts = [*LAYOUTS, *HALF_LAYOUTS] if full else LAYOUTS
    unaligned = cycle(LAYOUTS)
    for rule in RULES.values():
        for dtype, keep in layouts:
            yield check(backend, rule, dtype, keep, 0)
        for dtype, keep in layouts if full else [next(unaligned)]:
            yield check(backend, rule, dtype, keep, 1)


def compile_ahead(full: bool) -> None:
    """Have the CPU's loops compiled, on all cores; what fails is found by the checks."""

    def load(text: str) -> None:
        with suppress(compiler.CompilerMissing):
            libraries.load(text)

    layouts = [*LAYOUTS, *HALF_LAYOUTS] if full else LAYOUTS
    sources = [
        source.step_source(rule, dtype, keep) for rule in RULES.values() for dtype, keep in layouts
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, sources))


def check(backend: Runner, rule: Rule, dtype: torch.dtype, keep: Keep, offset: int) -> Check:
    """Three updates of tensors of all sizes in two param groups."""

    def run() -> None:
        memory = Memory(backend.device, offset)
        step = make_step(memory, rule, dtype, keep)
        for tensor in step.tensors:
            for i, (_, start) in enumerate(rule.family.memory):
                step.scalars.memory[tensor.row, i] = float(start(GROUPS[tensor.group]))
        for update in UPDATES:
            step.scalars.steps.fill_(update - 1)
            for tensor in step.tensors:
                tensor.acc.copy_(normal(tensor.acc.numel(), 10 + update))
            _one_update(backend, step, update)
        memory.check()

    name = f"step {rule.name}, {short(dtype)}{KINDS[keep]}"
    return Check(name + (", unaligned" if offset else ""), run)


def make_step(memory: Memory, rule: Rule, dtype: torch.dtype, keep: Keep) -> Step:
    """Parameters, masters, accumulators and states of all sizes."""
    family = rule.family
    numbers = (len(checks.SIZES), family.n_scalars, memory.device, len(family.memory))
    step = Step(rule, keep, [], UpdateScalars(*numbers))
    for row, n in enumerate(checks.SIZES):
        group = row % len(GROUPS)
        param = memory.holding(normal(n, 4), dtype, "parameter")
        acc = memory.empty(n, name="accumulator")
        states = tuple(
            memory.empty(n, name=f"state {name}").fill_(rule.start(name, GROUPS[group]))
            for name in rule.states
        )
        master = None
        if keep is Keep.SPLIT:
            low = (normal(n, 5) * 10_000).clamp(-32767, 32767)
            master = memory.holding(low, torch.int16, "remainder")
        elif keep is Keep.FP32:
            # Not the rounded value itself, but one that rounds to it.
            master = memory.holding(param.float().cpu() * (1 + 2.0**-14), FP32, "master")
        key = rounding.tensor_key(7, row)
        step.tensors.append(StepTensor(param, acc, states, row, group, master, key))
    return step


def precise(tensor: StepTensor) -> Tensor:
    """The value of a parameter as precisely as it is kept, float64."""
    param, master = tensor.param, tensor.master
    if master is None:
        return host(param)
    return host(reference.join_master(param, master) if master.dtype == torch.int16 else master)


def _one_update(backend: Runner, step: Step, update: int) -> None:
    rule, tensors, where = step.rule, step.tensors, f"in update {update}"
    before = [[precise(t), host(t.acc), *(host(s) for s in t.states)] for t in tensors]
    memory, accs = host(step.scalars.memory), [t.acc.clone() for t in tensors]
    hyper = [(sign(group), *rule.family.hyper(group)) for group in GROUPS]
    backend.finalize(Finalize([step], hyper, Correction(COEF), skip_nonfinite=True))
    backend.step(step)
    for g, numbers in enumerate(hyper):
        members = [i for i, tensor in enumerate(tensors) if tensor.group == g]
        for i in members:
            scalars = _require_scalars(step, numbers, memory[i], i, update)
        # The tensors of a group in one, which they are to a rule of elements.
        sizes = [before[i][0].numel() for i in members]
        joined = [torch.cat(parts) for parts in zip(*(before[i] for i in members), strict=True)]
        results = _bounds(rule, joined, COEF * numbers[0], scalars)
        parts = [zip(new.split(sizes), bound.split(sizes), strict=True) for new, bound in results]
        for i, (param, *states) in zip(members, zip(*parts, strict=True), strict=True):
            tensor = tensors[i]
            _require_param(step.keep, tensor, param, update)
            for state, name, right in zip(tensor.states, rule.states, states, strict=True):
                checks.require_close(f"{where} state {name}", host(state), *right)
            checks.require_same(f"{where} accumulator", tensor.acc, accs[i])


def _bounds(
    rule: Rule, inputs: list[Tensor], coef: float, scalars: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """New parameter and states by the reference, each with what it may be off by.

    A sum whose terms cancel, and a sign of such a sum, magnify the roundings before it. How much
    is measured: the reference is run again with each input off by a few roundings.
    """

    def run(param: Tensor, acc: Tensor, *states: Tensor) -> list[Tensor]:
        new, updated = getattr(as_torch(rule.family.kernels, torch.float64), rule.name)(
            param, acc * coef, states, scalars
        )
        return [new, *updated]

    results = run(*inputs)
    states = [inputs[0], *inputs[2:]]
    allowed = [
        checks.STEP_ROUNDINGS * checks.U * (new.abs() + old.abs() + (new - old).abs()) + checks.TINY
        for new, old in zip(results, states, strict=True)
    ]
    nudges = [(i, checks.INPUT_ROUNDINGS * checks.U) for i in range(len(inputs))]
    nudges.append((1, -checks.INPUT_ROUNDINGS * checks.U))  # over a change of sign, on both sides
    for i, nudge in nudges:
        nudged = list(inputs)
        nudged[i] = inputs[i] * (1 + nudge)
        for bound, new, other in zip(allowed, results, run(*nudged), strict=True):
            bound += (other - new).abs()
    return list(zip(results, allowed, strict=True))


def _require_scalars(
    step: Step, hyper: tuple[Any, ...], memory: Tensor, row: int, update: int
) -> tuple[float, ...]:
    """The rule's scalars for a tensor by the reference, once the backend's agree."""
    family = step.rule.family
    function = getattr(as_torch(family.kernels), f"{family.name}_scalars")
    own, kept = function(hyper[1:], float(update), tuple(memory.tolist()))
    for name, got, wanted in (
        ("scalars", step.scalars.scalars[row], (COEF * hyper[0], float(update), *own)),
        ("numbers kept from update to update", step.scalars.memory[row], kept),
    ):
        right = torch.tensor(wanted, dtype=torch.float64, device="cpu")
        allowed = checks.SCALAR_ROUNDINGS * checks.U * right.abs()
        checks.require_close(f"in update {update} {name}", host(got), right, allowed)
    return tuple(own)


def _require_param(
    keep: Keep, tensor: StepTensor, right: tuple[Tensor, Tensor], update: int
) -> None:
    """The parameter, and what keeps it precise, are what this layout makes of the right value."""
    param, master, where = tensor.param, tensor.master, f"in update {update}"
    if master is None:
        expected, allowed = right
        low, high = (_rounding(keep, tensor, update)(expected + s * allowed) for s in (-1, 1))
        checks.require_between(f"{where} parameter", host(param), low, high)
        return
    checks.require_close(f"{where} master", precise(tensor), *right)
    if keep is Keep.SPLIT:
        high, remainder = reference.split_master(precise(tensor).float())
        checks.require_same(f"{where} parameter", param, high)
        checks.require_same(f"{where} remainder", master, remainder)
    else:
        checks.require_same(f"{where} parameter", param, master.cpu().to(param.dtype))


def _rounding(keep: Keep, tensor: StepTensor, update: int) -> Callable[[Tensor], Tensor]:
    """How a value becomes the parameter: a monotone function."""
    dtype, n = tensor.param.dtype, tensor.param.numel()
    if keep is not Keep.STOCHASTIC:
        return lambda value: value.float().to(dtype).double()
    random = rounding.random_bits(tensor.key, update, 0, n)
    return lambda value: rounding.round_stochastic(value.float(), random).double()
