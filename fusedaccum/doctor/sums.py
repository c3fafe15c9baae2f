"""Checks of accumulation, sums of squares and the norm, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from ..backends import (
    Add,
    Correction,
    Finalize,
    Keep,
    Step,
    StepTensor,
    SumOfSquares,
    UpdateScalars,
    reference,
)
from ..backends.operations import GRAD_DTYPES
from ..backends.tables import count_chunks
from ..kernels.layout import CHUNK
from ..rules.as_torch import as_torch
from ..rules.builtin import RULES
from . import checks
from .checks import Check, Memory, Runner, Wrong, host, normal, short

FP32 = torch.float32
SCALE = 0.3  # no power of two: the product is rounded
HYPER = (1e-2, 0.9, 0.99, 1e-8, 0.1, 1.0)  # of finalize, for Adam


def all_checks(backend: Runner, full: bool) -> Iterator[Check]:
    """Every variant of every operation here; control in one dtype, or with `full` in each."""
    for dtype in GRAD_DTYPES:
        for offset in (0, 1):
            for first, norm in product((True, False), repeat=2):
                yield _accumulate(backend, dtype, offset, first, norm, None)
            yield _sum_of_squares(backend, dtype, offset)
    for dtype in GRAD_DTYPES if full else (torch.bfloat16,):
        for keeps in (True, False):
            yield _accumulate(backend, dtype, 0, False, True, keeps)
    yield Check("NaN and Inf show in the sums", lambda: _nonfinite(backend))
    for value, max_norm, skip in product((1.0, math.nan, math.inf), (0.5, None), (True, False)):
        yield _finalize(backend, value, max_norm, skip)
    yield Check("a skipped step writes nothing", lambda: _skipped(backend))


def sums_for(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Partial sums of squares of which none was written yet, and where each tensor's begin."""
    cells, end = [], 0
    for tensor in tensors:
        cells.append(end)
        end += count_chunks(tensor.numel())
    return torch.full((end,), math.nan, dtype=FP32, device=tensors[0].device), cells


def _accumulate(
    backend: Runner, dtype: torch.dtype, offset: int, first: bool, norm: bool, keeps: bool | None
) -> Check:
    """With `keeps` a factor of 1/4 on the scale, and whether to keep, are read on the device."""

    def run() -> None:
        memory = Memory(backend.device, offset)
        stores = first or keeps is False
        accs = [memory.holding(normal(n, 1), FP32, "accumulator") for n in checks.SIZES]
        grads = [memory.holding(normal(n, 2), dtype, "gradient") for n in checks.SIZES]
        before, kept = [host(acc) for acc in accs], [grad.clone() for grad in grads]
        if stores:  # what is left behind there must not be read
            for acc in accs:
                acc.fill_(math.nan if first else math.inf)
        partials, cells = sums_for(accs)
        control, scale = None, float(torch.tensor(SCALE, dtype=FP32, device="cpu"))
        if keeps is not None:
            control = torch.tensor([0.25, float(keeps)], dtype=FP32, device=backend.device)
            scale *= 0.25
        pairs = list(zip(accs, grads, strict=True))
        backend.accumulate(Add(pairs, SCALE, first, partials if norm else None, cells, control))
        for acc, grad, old in zip(accs, grads, before, strict=True):
            expected = reference.accumulate(old, host(grad), scale, stores)
            terms = (scale * host(grad)).abs() + (0.0 if stores else old.abs())
            allowed = checks.ACCUMULATE_ROUNDINGS * checks.U * terms + checks.TINY
            checks.require_close("accumulator", host(acc), expected, allowed)
        if norm:
            _require_sums(accs, partials, cells)
        for grad, old in zip(grads, kept, strict=True):
            checks.require_same("gradient", grad, old)
        memory.check()

    name = f"accumulate {short(dtype)}, {'first' if first else 'later'}"
    name += ", with norm" if norm else ""
    if keeps is not None:
        name += f", GradScaler that {'goes on' if keeps else 'starts afresh'}"
    return Check(name + (", unaligned" if offset else ""), run)


def _require_sums(tensors: Sequence[Tensor], partials: Tensor, cells: Sequence[int]) -> None:
    for tensor, cell in zip(tensors, cells, strict=True):
        chunks = host(tensor).split(CHUNK) if tensor.numel() else ()
        for i, chunk in enumerate(chunks):
            checks.require_number(
                f"sum of squares of chunk {i} of {tensor.numel():,} elements",
                float(partials[cell + i]),
                float(chunk.square().sum()),
                checks.SUM_ROUNDINGS * checks.U,
            )


def _sum_of_squares(backend: Runner, dtype: torch.dtype, offset: int) -> Check:
    def run() -> None:
        memory = Memory(backend.device, offset)
        tensors = [memory.holding(normal(n, 3), dtype) for n in checks.SIZES]
        partials, cells = sums_for(tensors)
        backend.sum_of_squares(SumOfSquares(tensors, partials, cells))
        _require_sums(tensors, partials, cells)
        norm, right = float(host(partials).sum().sqrt()), float(reference.global_norm(tensors))
        checks.require_number("norm", norm, right, checks.SUM_ROUNDINGS * checks.U / 2)
        memory.check()

    return Check(f"norm {short(dtype)}{', unaligned' if offset else ''}", run)


def _nonfinite(backend: Runner) -> None:
    for value in (math.nan, math.inf, -math.inf):
        n = CHUNK + 1817
        acc = normal(n, 1).to(backend.device)
        grad = normal(n, 2).to(backend.device, torch.bfloat16)
        grad[n - 1] = value
        partials = torch.zeros(2, dtype=FP32, device=backend.device)
        backend.accumulate(Add([(acc, grad)], 1.0, False, partials, [0]))
        if partials.isfinite().tolist() != [True, False]:
            raise Wrong(
                f"a gradient with {value} in its second chunk left the sums {partials.tolist()}"
            )


def _finalize(backend: Runner, value: float, max_norm: float | None, skip: bool) -> Check:
    """Norm, clip coefficient, skip flag, step counts and scalars of an update of two tensors."""

    def run() -> None:
        rule, device = RULES["adam"], backend.device
        scalars = UpdateScalars(3, rule.family.n_scalars, device)
        scalars.steps += 4
        nothing = torch.zeros(0, dtype=FP32, device=device)
        # Two tensors in two groups; the row between theirs takes no part.
        tensors = [StepTensor(nothing, nothing, (), row, row // 2) for row in (0, 2)]
        partials = torch.tensor([4.0, 12.0 * value], dtype=FP32, device=device)
        hyper = [(1.0, *HYPER), (-1.0, *HYPER)]
        steps = [Step(rule, Keep.PARAM, tensors, scalars)]
        backend.finalize(Finalize(steps, hyper, Correction(0.25), partials, max_norm, skip))
        norm = 0.25 * math.sqrt(4.0 + 12.0 * value) if value == value else math.nan
        relative = checks.SCALAR_ROUNDINGS * checks.U
        checks.require_number("norm", float(scalars.norm), norm, relative)
        skipped = skip and not math.isfinite(norm)
        found = (bool(scalars.skip), int(scalars.skipped), scalars.steps.tolist())
        wanted = (skipped, int(skipped), [4.0, 4.0, 4.0] if skipped else [5.0, 4.0, 5.0])
        if found != wanted:
            raise Wrong(f"skip flag, skipped updates and step counts are {found}, not {wanted}")
        if skipped:
            return
        coef = 0.25 * reference.clip_coefficient(norm, max_norm)
        own = as_torch(rule.family.kernels).adam_scalars(HYPER, 5.0, ())[0]
        rows = [(coef, 5.0, *own), (0.0,) * (2 + len(own)), (-coef, 5.0, *own)]
        for row, numbers in enumerate(rows):
            for i, number in enumerate(numbers):
                got = float(scalars.scalars[row, i])
                checks.require_number(f"scalars[{row}][{i}]", got, number, relative)

    clip = "no clipping" if max_norm is None else f"clipped to {max_norm}"
    name = f"finalize, {clip}, {'finite' if value == 1.0 else value}"
    return Check(name + ("" if skip else ", not skipped"), run)


def _skipped(backend: Runner) -> None:
    rule, n, device = RULES["adam"], CHUNK + 1, backend.device
    param = normal(n, 4).to(device, torch.bfloat16)
    master = torch.ones(n, dtype=torch.int16, device=device)
    states = (normal(n, 6).to(device), torch.ones(n, dtype=FP32, device=device))
    tensor = StepTensor(param, normal(n, 5).to(device), states, 0, 0, master)
    written = [param, master, *states]
    before = [tensor.clone() for tensor in written]
    step = Step(rule, Keep.SPLIT, [tensor], UpdateScalars(1, rule.family.n_scalars, device))
    partials = torch.tensor([math.inf], dtype=FP32, device=device)
    backend.finalize(Finalize([step], [(1.0, *HYPER)], Correction(), partials, 0.5, True))
    backend.step(step)
    for got, old in zip(written, before, strict=True):
        checks.require_same("tensor of a skipped update", got, old)
