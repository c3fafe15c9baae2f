"""Kernels (in the interpreter), compiled CPU loops and the ATen fallback against the reference.

Every dtype x rule x alignment x size. The interpreter and the compiled loops round as the reference
does, operation by operation, so they are compared bit for bit; only ATen's sqrt is its own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import backends
from fusedaccum.backends import (
    Add,
    Correction,
    Finalize,
    Keep,
    Step,
    StepTensor,
    UpdateScalars,
    reference,
    rounding,
)  # fmt: skip
from fusedaccum.backends.tables import count_chunks
from fusedaccum.doctor import checks, sums
from fusedaccum.doctor.checks import Runner
from fusedaccum.rules.as_torch import as_torch
from fusedaccum.rules.builtin import RULES
from fusedaccum.rules.rule import Family, Rule
from tests import tolerances
from tests.cases import (
    CASES,
    GRAD_DTYPES,
    LAYOUTS,
    SIZES,
    WithoutCompiler,
    case_id,
    forget_compiled,
    tensor,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["triton", "compiled", "aten", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend, and which it is: it says how exactly it rounds."""
    if request.param == "aten":
        WithoutCompiler(monkeypatch)
    device = torch.device("cuda", 0) if request.param == "gpu" else CPU
    name = "triton" if request.param in ("triton", "gpu") else "torch"
    yield backends.get(name, device), request.param
    forget_compiled()


def cells_of(tensors: list[Tensor]) -> tuple[list[int], int]:
    cells, end = [], 0
    for each in tensors:
        cells.append(end)
        end += count_chunks(each.numel())
    return cells, end


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=case_id)
def test_accumulate(
    backend: Any, dtype: torch.dtype, offset: int, first: bool, with_norm: bool
) -> None:
    runner, kind = backend
    device = runner.device
    accs = [tensor(n, offset=offset, seed=1, device=device) for n in SIZES]
    grads = [tensor(n, dtype, offset=offset, seed=2, device=device) for n in SIZES]
    magnitudes = [a.abs() + 0.3 * g.float().abs() for a, g in zip(accs, grads, strict=True)]
    expected = [reference.accumulate(a, g, 0.3, first) for a, g in zip(accs, grads, strict=True)]
    if first:
        for acc in accs:
            acc.fill_(math.nan)  # a store must not read what was there
    cells, end = cells_of(accs)
    partials = torch.full((end,), math.nan, device=device) if with_norm else None
    pairs = list(zip(accs, grads, strict=True))
    runner.accumulate(Add(pairs, 0.3, first, partials, cells))
    for acc, reference_acc, magnitude in zip(accs, expected, magnitudes, strict=True):
        if kind == "gpu":  # one rounding fewer where the compiler fuses the product and the sum
            assert ((acc - reference_acc).abs() <= 2 * tolerances.U * magnitude).all()
        else:
            assert tolerances.equal_bits(acc, reference_acc)
    if partials is not None:
        norm = partials.double().sum().sqrt().cpu()
        torch.testing.assert_close(
            norm, reference.global_norm(expected), rtol=tolerances.NORM_RTOL, atol=0
        )


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=case_id)
def test_mixed_dtypes_in_one_call(backend: Any, dtype: torch.dtype) -> None:
    runner, _ = backend
    accs = [torch.zeros(n, device=runner.device) for n in (5, 3000)]
    grads = [tensor(5, device=runner.device), tensor(3000, dtype, device=runner.device)]
    runner.accumulate(Add(list(zip(accs, grads, strict=True)), 1.0, True))
    for acc, grad in zip(accs, grads, strict=True):
        assert torch.equal(acc, grad.float())


SUMS = [check.name for check in sums.all_checks(Runner(backends.get("torch", CPU), CPU, 1), True)]


@pytest.mark.parametrize("name", [name for name in SUMS if not name.startswith("accumulate")])
def test_the_doctors_checks(backend: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, NaN in the sums, finalize and a skipped step: the doctor says what must hold."""
    monkeypatch.setattr(checks, "SIZES", SIZES)
    runner = Runner(backend[0], backend[0].device, torch.get_num_threads())
    (check,) = [c for c in sums.all_checks(runner, True) if c.name == name]
    check.run()


def hyper_of(family: str) -> tuple[float, ...]:
    """Hyper-parameters that exercise a family: those of its case with the most options."""
    if family == "lion":  # its class is another package's, which may not be installed
        return (1e-2, 0.9, 0.99, 0.1)
    own = [case for case in CASES if RULES[case.rule].family.name == family]
    case = max(own, key=lambda c: len(c.options))
    group = case.make([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    return RULES[case.rule].family.hyper(group)


HYPER = {rule.family.name: hyper_of(rule.family.name) for rule in RULES.values()}
ADAM = as_torch(RULES["adam"].family.kernels).adam_scalars
# Rules whose results every CPU path rounds alike: no square root, which ATen rounds its own way.
NO_ROOT = ("sgd", "asgd", "rprop", "lion", "adamax")


def make_scalars(family: Family, device: torch.device = CPU) -> UpdateScalars:
    scalars = UpdateScalars(len(SIZES), family.n_scalars, device, len(family.memory))
    scalars.memory += 0.5
    return scalars


def start(rule: Rule, name: str) -> float:
    group = {"lr": 1e-2, "initial_accumulator_value": 0.25}
    return rule.start(name, group)


def make_step(
    rule_name: str, dtype: torch.dtype, keep: Keep, offset: int, device: torch.device = CPU
) -> Step:
    rule = RULES[rule_name]
    step = Step(rule, keep, [], make_scalars(rule.family, device))

    def make(n: int, kind: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return tensor(n, kind, offset=offset, seed=seed, device=device)

    for row, n in enumerate(SIZES):
        param, acc, master = make(n, dtype, seed=3), make(n, seed=4), None
        states = tuple(make(n).fill_(start(rule, name)) for name in rule.states)
        if keep is Keep.SPLIT:
            low = make(n, seed=5).mul(1000).clamp(-32767, 32767)
            master = make(n, torch.int16).copy_(low)
        elif keep is Keep.FP32:
            master = make(n).copy_(param)
        key = rounding.tensor_key(7, row)
        step.tensors.append(StepTensor(param, acc, states, row, row % 2, master, key))
    return step


def finalize_and_step(
    runner: Any, step: Step, hyper: list[tuple[float, ...]], coef: float = 0.7
) -> None:
    runner.finalize(Finalize([step], hyper, Correction(coef), skip_nonfinite=True))
    runner.step(step)


def run_reference(
    request: Step, hyper: list[tuple[float, ...]], coef: float, step: int, memory: Tensor
) -> None:
    """What a step must do to its tensors, by the reference; in place."""
    text = as_torch(request.rule.family.kernels)
    rule = getattr(text, request.rule.name)
    for i, each in enumerate(request.tensors):
        param, master = each.param, each.master
        sign, *values = hyper[each.group]
        scalars_of = getattr(text, f"{request.rule.family.name}_scalars")
        scalars, kept = scalars_of(tuple(values), step, tuple(memory[i].tolist()))
        memory[i] = torch.tensor(kept)
        # What the tables hold: one rounding to fp32.
        scalars = tuple(torch.tensor(scalars, dtype=torch.float32).tolist())
        factor = torch.tensor(coef * sign, dtype=torch.float32).item()
        full, states = rule(precise(each).float(), each.acc * factor, each.states, scalars)
        for state, new in zip(each.states, states, strict=True):
            state.copy_(new)
        if request.keep is Keep.SPLIT:
            assert master is not None
            high, low = reference.split_master(full)
            param.copy_(high)
            master.copy_(low)
        elif request.keep is Keep.STOCHASTIC:
            random = rounding.random_bits(each.key, step, 0, full.numel())
            param.copy_(rounding.round_stochastic(full, random))
        else:
            param.copy_(full)
            if master is not None:
                master.copy_(full)


def precise(each: StepTensor) -> Tensor:
    if each.master is None:
        return each.param
    if each.master.dtype == torch.int16:
        return reference.join_master(each.param, each.master)
    return each.master


def contents(step: Step) -> list[Tensor]:
    masters = [each.master for each in step.tensors if each.master is not None]
    return [
        *(each.param for each in step.tensors),
        *masters,
        *(state for each in step.tensors for state in each.states),
    ]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("dtype", "master"), LAYOUTS, ids=case_id)
@pytest.mark.parametrize("rule", RULES)
def test_step(backend: Any, rule: str, dtype: torch.dtype, master: str, offset: int) -> None:
    runner, kind = backend
    keep = Keep(master)
    ours, theirs = (make_step(rule, dtype, keep, offset, runner.device) for _ in range(2))
    family = RULES[rule].family
    hyper = [(1.0, *HYPER[family.name]), (-1.0, 3e-3, *HYPER[family.name][1:])]
    scalars, memory = ours.scalars, theirs.scalars.memory.cpu()
    for step in (1, 2, 3):
        finalize_and_step(runner, ours, hyper)
        run_reference(theirs, hyper, 0.7, step, memory)
    assert scalars.steps.tolist() == [3.0] * len(SIZES)
    torch.testing.assert_close(scalars.memory.cpu(), memory, rtol=4 * tolerances.U, atol=0)
    exactly = kind in ("triton", "compiled") and family.name in NO_ROOT and not family.memory
    for mine, reference_tensor in zip(contents(ours), contents(theirs), strict=True):
        if exactly:
            assert tolerances.equal_bits(mine, reference_tensor)
        elif mine.dtype != torch.int16:  # remainders are compared through the masters below
            assert_same(mine, reference_tensor)
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert_same(precise(mine), precise(other))


def assert_same(a: Tensor, b: Tensor) -> None:
    """Within a rule's few roundings; a low dtype may be one rounding boundary away."""
    u = tolerances.STEP_ROUNDINGS * tolerances.U
    if a.dtype != torch.float32:
        u = 2 * torch.finfo(a.dtype).eps
    torch.testing.assert_close(a.double(), b.double(), rtol=u, atol=u)


@pytest.mark.parametrize("rule", RULES)
def test_interpreter_and_compiled_loops_agree_to_the_bit(rule: str) -> None:
    """One rule text, two compilers: any difference is a mistake in one of them."""
    for dtype, master in LAYOUTS:
        results = []
        for name in ("triton", "torch"):
            step = make_step(rule, dtype, Keep(master), 0)
            family = RULES[rule].family
            hyper = [(1.0, *HYPER[family.name]), (-1.0, 3e-3, *HYPER[family.name][1:])]
            runner = backends.get(name, CPU)
            for _ in range(3):
                finalize_and_step(runner, step, hyper)
            results.append(contents(step))
        for a, b in zip(*results, strict=True):
            assert tolerances.equal_bits(a, b)


def test_an_fp32_master_gives_way_to_a_written_parameter(backend: Any) -> None:
    runner, _ = backend
    step, other = (make_step("sgd", torch.bfloat16, Keep.FP32, 0, runner.device) for _ in range(2))
    for each in step.tensors:
        assert each.master is not None
        each.master.add_(1.0)  # as if the parameters had been overwritten since
    for each_step in (step, other):
        finalize_and_step(runner, each_step, [(1.0, *HYPER["sgd"])] * 2, coef=1.0)
    for a, b in zip(contents(step), contents(other), strict=True):
        assert tolerances.equal_bits(a, b)


def test_an_overflow_skips_whatever_the_sums_are(backend: Any) -> None:
    runner, _ = backend
    step = make_step("adam", torch.bfloat16, Keep.SPLIT, 0, runner.device)
    before = [t.clone() for t in contents(step)]
    hyper, sums = [(1.0, *HYPER["adam"])] * 2, torch.tensor([1.0], device=runner.device)
    for overflow in (1.0, 0.0):
        correction = Correction(0.25, torch.tensor(overflow, device=runner.device))
        runner.finalize(Finalize([step], hyper, correction, sums, None, True))
        runner.step(step)
        same = [tolerances.equal_bits(*pair) for pair in zip(contents(step), before, strict=True)]
        assert all(same) is bool(step.scalars.skip) is bool(overflow)
    assert float(step.scalars.norm) == 0.25
