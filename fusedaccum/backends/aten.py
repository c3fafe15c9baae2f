"""The torch backend: the CPU, and any device that Triton does not serve.

On a CPU with a C compiler the loops of `cgen.py` run, at the memory rate. Everywhere else the
reference runs in blocks that stay in the cache. Numbers of an update are read on the host here:
free on a CPU, one wait per update on another device.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import CHUNK
from ..rules.as_torch import as_torch
from ..rules.rule import Family, Rule
from . import reference
from .compiled import engine as native
from .compiled import source as cgen
from .compiled.compiler import CompilerMissing
from .operations import StepBatch, TableBackend, UpdateRequest, UpdateScalars
from .rounding import random_bits, round_stochastic
from .tables import LaunchTable, count_chunks
from .tensors import is_dense

# Elements. fp32 scratch of 512 KiB: with its gradient and accumulator it fits a core's L2 cache.
ATEN_BLOCK = 1 << 17


@cache
def _library(source: str) -> ctypes.CDLL | None:
    """The compiled library, or None (and a warning, once) where it cannot be had."""
    try:
        return native.load(source)
    except CompilerMissing as error:
        native.warn_missing(str(error))
        return None


@cache
def _reduce_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    return _library(cgen.reduce_source(dtype))


@cache
def _step_library(rule: Rule, dtype: torch.dtype, master: str) -> ctypes.CDLL | None:
    return _library(cgen.step_source(rule, dtype, master))


def _torch_function(family: Family, name: str) -> Any:
    """A function of a rule in torch."""
    return getattr(as_torch(family.kernels), name)


class TorchBackend:
    """Compiled loops where they can be had, blocks of ATen operations elsewhere."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loops = _NativeLoops(device) if device.type == "cpu" else None

    def _reduce_loops(self, tensors: Sequence[Tensor]) -> _NativeLoops | None:
        """The compiled loops if they serve every dtype of `tensors`: all of a call or nothing."""
        if self._loops and all(_reduce_library(dtype) for dtype in {t.dtype for t in tensors}):
            return self._loops
        return None

    def accumulate(
        self,
        accs: Sequence[Tensor],
        grads: Sequence[Tensor],
        scale: float,
        first: bool,
        partials: Tensor | None = None,
        cells: Sequence[int] | None = None,
        control: Tensor | None = None,
    ) -> None:
        """See `Backend.accumulate`."""
        if control is not None:
            factor, keeps = control.tolist()
            scale, first = float(_fp32(scale) * factor), first or not keeps
        if loops := self._reduce_loops(grads):
            loops.accumulate(accs, grads, scale, first, partials, cells)
            return
        for acc, grad in zip(accs, grads, strict=True):
            for a, g in _blocks(acc, grad):
                a.copy_(reference.accumulate(a, g, scale, first))
        if partials is not None and cells is not None:
            self.sum_of_squares(accs, partials, cells)

    def sum_of_squares(
        self, tensors: Sequence[Tensor], partials: Tensor, cells: Sequence[int]
    ) -> None:
        """See `Backend.sum_of_squares`."""
        if loops := self._reduce_loops(tensors):
            loops.sum_of_squares(tensors, partials, cells)
            return
        for tensor, cell in zip(tensors, cells, strict=True):
            flat = _flat(tensor)
            for i in range(count_chunks(tensor.numel())):
                chunk = flat[i * CHUNK : (i + 1) * CHUNK].float()
                partials[cell + i] = torch.dot(chunk, chunk)

    def finalize(
        self, request: UpdateRequest, batches: Sequence[StepBatch], scalars: UpdateScalars
    ) -> None:
        """See `Backend.finalize`; in Python floats, which are float64."""
        correction = coef = float(request.correction)
        skip = False
        if request.partials is not None:
            total = float(request.partials.cpu().double().sum())
            norm = correction * math.sqrt(total) if total == total else math.nan
            coef *= reference.clip_coefficient(norm, request.max_norm)
            skip = request.skip_nonfinite and not math.isfinite(norm)
            scalars.norm.fill_(norm)
        scalars.skip.fill_(skip)
        scalars.skipped += skip
        if skip:
            return
        rule_scalars = lru_cache(_torch_function(request.family, f"{request.family.name}_scalars"))
        hyper = [tuple(float(value) for value in row) for row in request.hyper]
        steps = scalars.steps.tolist()
        rows = scalars.scalars.tolist()
        memory = scalars.memory.tolist()
        for batch in batches:
            for row, group in zip(batch.rows, batch.groups, strict=True):
                steps[row] += 1.0
                sign, *values = hyper[group]
                own, memory[row] = rule_scalars(tuple(values), steps[row], tuple(memory[row]))
                rows[row] = [coef * sign, steps[row], *own]
        scalars.steps.copy_(_fp32(steps))
        scalars.scalars.copy_(_fp32(rows))
        if request.family.memory:
            scalars.memory.copy_(_fp32(memory))

    def step(self, batch: StepBatch, scalars: UpdateScalars) -> None:
        """See `Backend.step`."""
        if bool(scalars.skip):
            return
        dtype = batch.params[0].dtype
        if self._loops and _step_library(batch.rule, dtype, batch.master):
            self._loops.step(batch, scalars)
            return
        rule = _torch_function(batch.rule.family, batch.rule.name)
        rows = scalars.scalars.tolist()
        for i, param in enumerate(batch.params):
            coef, step, *values = rows[batch.rows[i]]
            masters = batch.masters[i : i + 1]
            start = 0
            for p, acc, *rest in _blocks(param, batch.accs[i], *masters, *batch.states[i]):
                master, states = rest[: len(masters)], rest[len(masters) :]
                full = _load_master(p, master)
                full, updated = rule(full, acc * coef, tuple(states), tuple(values))
                if batch.master == "stochastic":
                    random = random_bits(batch.keys[i], int(step), start, p.numel())
                    p.copy_(round_stochastic(full, random.to(p.device)))
                else:
                    _store_master(full, p, master, batch.master)
                start += p.numel()
                for state, new in zip(states, updated, strict=True):
                    state.copy_(new)


class _NativeLoops(TableBackend):
    """The compiled loops, launched over the same tables as the Triton kernels."""

    def _launch_accumulate(
        self,
        table: LaunchTable,
        dtype: torch.dtype,
        scale: float,
        first: bool,
        partials: Tensor | None,
        control: Tensor | None,
    ) -> None:
        name = cgen.accumulate_name(dtype, first, partials is not None)
        _run(_reduce_library(dtype), name, table, partials, scale)

    def _launch_sum_of_squares(
        self, table: LaunchTable, dtype: torch.dtype, partials: Tensor
    ) -> None:
        _run(_reduce_library(dtype), cgen.sum_of_squares_name(dtype), table, partials)

    def _launch_step(
        self, table: LaunchTable, batch: StepBatch, dtype: torch.dtype, scalars: UpdateScalars
    ) -> None:
        library = _step_library(batch.rule, dtype, batch.master)
        _run(library, "step", table, scalars.scalars)


def _run(
    library: ctypes.CDLL | None,
    name: str,
    table: LaunchTable,
    third: Tensor | None,
    scale: float = 1.0,
) -> None:
    """One compiled loop over a table."""
    assert library is not None, "callers ask first whether there are loops"
    third_address = None if third is None else third.data_ptr()
    addresses = (table.rows.data_ptr(), table.chunks.data_ptr(), third_address)
    native.run(library, name, addresses, scale, table.n_chunks, table.n_elements)


def _fp32(numbers: Any) -> Tensor:
    """Numbers as a tensor of the host, whatever torch's default dtype and device are."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, without a copy."""
    assert is_dense(tensor), "callers lay tensors out first"
    return tensor.as_strided((tensor.numel(),), (1,))


def _blocks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Matching blocks of dense tensors of one layout."""
    return zip(*(_flat(t).split(ATEN_BLOCK) for t in tensors), strict=True)


def _load_master(param: Tensor, master: list[Tensor]) -> Tensor:
    """fp32 value of a block of parameters."""
    return reference.precise(param, master[0]) if master else param.float()


def _store_master(value: Tensor, param: Tensor, master: list[Tensor], kind: str) -> None:
    """Write an fp32 block back to parameters and masters."""
    if kind == "split":
        high, remainder = reference.split_master(value)
        param.copy_(high)
        master[0].copy_(remainder)
        return
    param.copy_(value)
    if kind == "fp32":
        master[0].copy_(value)
