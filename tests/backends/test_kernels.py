"""Kernels (in the interpreter), compiled CPU loops and the ATen fallback: the doctor's own checks.

Every dtype, rule, layout, alignment and size: what a user's machine is asked, each backend is asked
here. Beside that the bits must be right where rounding is known: accumulators are the reference's,
and the interpreter and the compiled loops, two compilers of one rule text, leave the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import backends
from fusedaccum.backends import Add, Correction, Finalize, Keep, Step, reference
from fusedaccum.doctor import checks, steps, sums
from fusedaccum.doctor.checks import Memory, Runner
from fusedaccum.rules.builtin import RULES
from tests.cases import GRAD_DTYPES, SIZES, WithoutCompiler, case_id, forget_compiled, tensor
from tests.tolerances import equal_bits

CPU = torch.device("cpu")
KINDS = ["triton", "compiled", "aten", pytest.param("gpu", marks=pytest.mark.gpu)]


class ToTheBit:
    """A backend on a CPU that asserts the bits of what it leaves.

    Args:
        own: the backend.
        twin: another one, which must step to the same bits; None where a square root is rounded in
            another way, as ATen's is.
    """

    def __init__(self, own: Any, twin: Any) -> None:
        self.own, self.twin = own, twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def accumulate(self, request: Add) -> None:
        scale, stores = request.scale, request.stores
        if request.control is not None:
            factor, keeps = request.control.tolist()
            scale, stores = scale * factor, stores or not keeps
        expected = [reference.accumulate(acc, grad, scale, stores) for acc, grad in request.pairs]
        self.own.accumulate(request)
        for (acc, _), right in zip(request.pairs, expected, strict=True):
            assert equal_bits(acc, right)

    def step(self, request: Step) -> None:
        other = copy.deepcopy(request) if self.twin else None
        self.own.step(request)
        if other is not None:
            self.twin.step(other)
            for mine, theirs in zip(contents(request), contents(other), strict=True):
                assert equal_bits(mine, theirs)


def contents(step: Step) -> list[Tensor]:
    """All that a step writes."""
    found = [t for each in step.tensors for t in (each.param, each.master, *each.states)]
    return [t for t in found if t is not None]


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    kind = request.param
    if kind == "aten":
        WithoutCompiler(monkeypatch)
    if kind == "gpu":
        yield backends.get("triton", torch.device("cuda", 0))
    elif kind == "triton":
        yield ToTheBit(backends.get("triton", CPU), backends.get("torch", CPU))
    else:
        yield ToTheBit(backends.get("torch", CPU), None)
    if kind == "aten":
        forget_compiled()


def doctors(backend: Any, device: torch.device) -> dict[str, checks.Check]:
    runner = Runner(backend, device, torch.get_num_threads())
    found = [*sums.all_checks(runner, True), *steps.all_checks(runner, True)]
    return {check.name: check for check in found}


@pytest.mark.parametrize("name", doctors(None, CPU))
def test_the_doctors_checks(backend: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SIZES", tuple(SIZES))
    with checks.threads(1):  # as in the doctor: a team takes longer for small tensors
        doctors(backend, backend.device)[name].run()


class OneBit:
    """A sound backend, but for the last bit of one element."""

    device = CPU

    def __init__(self) -> None:
        self.own = backends.get("torch", CPU)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def accumulate(self, request: Add) -> None:
        self.own.accumulate(request)
        request.pairs[-1][0][3] *= 1 + 2.0**-23

    def step(self, request: Step) -> None:
        self.own.step(request)
        request.tensors[-1].states[0][3] *= 1 + 2.0**-23


@pytest.mark.parametrize("name", ["accumulate bf16, later", "step adam, bf16 with split master"])
def test_one_bit_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the comparison of bits."""
    monkeypatch.setattr(checks, "SIZES", (0, 1, 1025))
    sound = backends.get("torch", CPU)
    doctors(ToTheBit(sound, sound), CPU)[name].run()
    with pytest.raises(AssertionError) as found:
        doctors(ToTheBit(OneBit(), sound), CPU)[name].run()
    assert not isinstance(found.value, checks.Wrong)


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=case_id)
def test_mixed_dtypes_in_one_call(backend: Any, dtype: torch.dtype) -> None:
    accs = [torch.zeros(n, device=backend.device) for n in (5, 3000)]
    grads = [tensor(5, device=backend.device), tensor(3000, dtype, device=backend.device)]
    backend.accumulate(Add(list(zip(accs, grads, strict=True)), 1.0, True))
    for acc, grad in zip(accs, grads, strict=True):
        assert torch.equal(acc, grad.float())


def make_step(backend: Any, rule: str, keep: Keep) -> tuple[Step, list[tuple[Any, ...]]]:
    """A step of bf16 parameters with accumulated gradients, and its hyper-parameters."""
    step = steps.make_step(Memory(backend.device), RULES[rule], torch.bfloat16, keep)
    for each in step.tensors:
        each.acc.copy_(checks.normal(each.acc.numel(), 11))
    return step, [(1.0, *RULES[rule].family.hyper(group)) for group in steps.GROUPS]


def test_an_fp32_master_gives_way_to_a_written_parameter(backend: Any) -> None:
    (step, hyper), (other, _) = (make_step(backend, "sgd", Keep.FP32) for _ in range(2))
    for mine, theirs in zip(step.tensors, other.tensors, strict=True):
        assert mine.master is not None and theirs.master is not None
        theirs.master.copy_(theirs.param)
        mine.master.add_(1.0)  # as if the parameters had been overwritten since
    for each_step in (step, other):
        backend.finalize(Finalize([each_step], hyper, skip_nonfinite=True))
        backend.step(each_step)
    for a, b in zip(contents(step), contents(other), strict=True):
        assert equal_bits(a, b)


def test_an_overflow_skips_whatever_the_sums_are(backend: Any) -> None:
    step, hyper = make_step(backend, "adam", Keep.SPLIT)
    before = [t.clone() for t in contents(step)]
    partials = torch.tensor([1.0], device=backend.device)
    for overflow in (1.0, 0.0):
        correction = Correction(0.25, torch.tensor(overflow, device=backend.device))
        backend.finalize(Finalize([step], hyper, correction, partials, None, True))
        backend.step(step)
        same = [equal_bits(*pair) for pair in zip(contents(step), before, strict=True)]
        assert all(same) is bool(step.scalars.skip) is bool(overflow)
    assert float(step.scalars.norm) == 0.25


@pytest.mark.parametrize("rule", ["adam", "nadam"])
def test_an_update_that_others_make_leaves_its_norm(backend: Any, rule: str) -> None:
    """Where states are shared out, a process may update no parameter at all."""
    step, hyper = make_step(backend, rule, Keep.SPLIT)
    step.tensors.clear()
    kept = step.scalars.steps, step.scalars.scalars, step.scalars.memory
    before = [tensor.clone() for tensor in kept]
    partials = torch.tensor([4.0, 12.0], device=backend.device)
    backend.finalize(Finalize([step], hyper, Correction(), partials, 1.0, True))
    assert float(step.scalars.norm) == 4.0 and not bool(step.scalars.skip)
    assert all(map(torch.equal, kept, before))
