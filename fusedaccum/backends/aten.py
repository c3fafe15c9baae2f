"""The torch backend: the CPU, and any device that Triton does not serve.

On a CPU with a C compiler the loops of `compiled/` run, at the memory rate. Everywhere else the
reference runs in blocks that stay in the cache. Numbers of an update are read on the host here:
free on a CPU, one wait per update on another device.
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import CHUNK
from ..rules.as_torch import as_torch
from ..rules.rule import Family
from . import reference
from .compiled.loops import Loops
from .keep import Keep
from .operations import Add, Finalize, Step, SumOfSquares
from .rounding import random_bits, round_stochastic
from .tables import count_chunks
from .tensors import is_dense

# Elements. fp32 scratch of 512 KiB: with its gradient and accumulator it fits a core's L2 cache.
ATEN_BLOCK = 1 << 17


def _torch_function(family: Family, name: str) -> Any:
    """A function of a rule in torch."""
    return getattr(as_torch(family.kernels), name)


class TorchBackend:
    """Compiled loops where they can be had, blocks of ATen operations elsewhere."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loops = Loops() if device.type == "cpu" else None

    def accumulate(self, request: Add) -> None:
        """See `Backend.accumulate`."""
        scale, stores = request.scale, request.stores
        if request.control is not None:
            factor, keeps = request.control.tolist()
            scale, stores = float(_fp32(scale) * factor), stores or not keeps
        if self._loops and self._loops.serve_add(request):
            self._loops.accumulate(request, scale, stores)
            return
        for acc, grad in request.pairs:
            for a, g in _blocks(acc, grad):
                a.copy_(reference.accumulate(a, g, scale, stores))
        if request.sums is not None and request.cells is not None:
            accs = [acc for acc, _ in request.pairs]
            self.sum_of_squares(SumOfSquares(accs, request.sums, request.cells))

    def sum_of_squares(self, request: SumOfSquares) -> None:
        """See `Backend.sum_of_squares`."""
        if self._loops and self._loops.serve(request.tensors):
            self._loops.sum_of_squares(request)
            return
        for tensor, cell in zip(request.tensors, request.cells, strict=True):
            flat = _flat(tensor)
            for i in range(count_chunks(tensor.numel())):
                chunk = flat[i * CHUNK : (i + 1) * CHUNK].float()
                request.sums[cell + i] = torch.dot(chunk, chunk)

    def finalize(self, request: Finalize) -> None:
        """See `Backend.finalize`; in Python floats, which are float64."""
        family, scalars = request.family, request.scalars
        correction = coef = float(request.correction.product())
        skip = False
        if request.sums is not None:
            total = float(request.sums.cpu().sum(dtype=torch.float64))
            norm = correction * math.sqrt(total) if total == total else math.nan
            coef *= reference.clip_coefficient(norm, request.max_norm)
            skip = request.skip_nonfinite and not math.isfinite(norm)
            scalars.norm.fill_(norm)
        scalars.skip.fill_(skip)
        if skip:
            scalars.skipped += 1
            return
        rows, groups = request.rows_and_groups().T
        if not len(rows):  # other processes update all
            return
        counts = (scalars.steps.cpu().numpy()[rows].astype(np.float64) + 1.0).tolist()
        numbers = scalars.memory.cpu().numpy()[rows].tolist() if family.memory else repeat(())
        # Once for all tensors of a group that have come as far: nearly always all of them.
        kinds: dict[tuple[int, float, tuple[float, ...]], int] = {}
        alike = zip(groups.tolist(), counts, map(tuple, numbers), strict=False)
        of_each = [kinds.setdefault(kind, len(kinds)) for kind in alike]
        rule_scalars = _torch_function(family, f"{family.name}_scalars")
        found, kept = [], []
        for group, count, before in kinds:
            sign, *values = map(float, request.hyper[group])
            own, after = rule_scalars(tuple(values), count, before)
            found.append((coef * sign, count, *own))
            kept.append(after)
        with np.errstate(over="ignore"):  # what fp32 cannot hold is Inf
            _write(scalars.steps, rows, counts)
            _write(scalars.scalars, rows, np.array(found)[of_each])
            if family.memory:
                _write(scalars.memory, rows, np.array(kept)[of_each])

    def step(self, request: Step) -> None:
        """See `Backend.step`."""
        scalars = request.scalars
        if bool(scalars.skip):
            return
        if self._loops and self._loops.serve_step(request):
            self._loops.step(request)
            return
        rule = _torch_function(request.rule.family, request.rule.name)
        rows = scalars.scalars.tolist()
        for tensor in request.tensors:
            coef, step, *values = rows[tensor.row]
            masters = [] if tensor.master is None else [tensor.master]
            start = 0
            for p, acc, *rest in _blocks(tensor.param, tensor.acc, *masters, *tensor.states):
                master, states = rest[: len(masters)], rest[len(masters) :]
                full = reference.precise(p, master[0]) if master else p.float()
                full, updated = rule(full, acc * coef, tuple(states), tuple(values))
                if request.keep is Keep.STOCHASTIC:
                    random = random_bits(tensor.key, int(step), start, p.numel())
                    p.copy_(round_stochastic(full, random.to(p.device)))
                elif request.keep is Keep.SPLIT:
                    high, remainder = reference.split_master(full)
                    p.copy_(high)
                    master[0].copy_(remainder)
                else:
                    p.copy_(full)
                    if request.keep is Keep.FP32:
                        master[0].copy_(full)
                start += p.numel()
                for state, new in zip(states, updated, strict=True):
                    state.copy_(new)


def _fp32(numbers: Any) -> Tensor:
    """Numbers as a tensor of the host, whatever torch's default dtype and device are."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _write(tensor: Tensor, rows: Any, numbers: Any) -> None:
    """Numbers into some rows of a tensor on any device."""
    host = tensor.cpu()  # the tensor itself on a CPU
    host.numpy()[rows] = numbers
    if host is not tensor:
        tensor.copy_(host)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, without a copy."""
    assert is_dense(tensor), "callers lay tensors out first"
    return tensor.as_strided((tensor.numel(),), (1,))


def _blocks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Matching blocks of dense tensors of one layout."""
    return zip(*(_flat(t).split(ATEN_BLOCK) for t in tensors), strict=True)
