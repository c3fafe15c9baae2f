"""The Triton backend: the only caller of the kernels. Nothing here waits for the device."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..kernels.accumulate import accumulate_kernel
from ..kernels.layout import CHUNK
from ..kernels.norm import finalize_kernel, sum_of_squares_kernel
from ..kernels.step import step_kernel
from ..rules.rule import Family
from .launcher import Launcher
from .operations import Add, Finalize, Step, SumOfSquares
from .tables import Tables

# Elements a program has in flight. 2048 over 4 warps is four 64-bit loads of bf16 and four 128-bit
# ones of fp32 per thread; the step keeps more values alive, so half of that has it without spills.
ACCUMULATE_BLOCK = 2048
STEP_BLOCK = 1024
FINALIZE_BLOCK = 1024
NUM_WARPS = 4
# Elements that a thread accesses at once: 128 bits of fp32, 64 of bf16. With 8, which is 128 bits
# of bf16 too, a bf16 tensor lies over the threads in another way than an fp32 one, and every block
# goes through shared memory to meet it: 8 barriers, and 10 to 30 registers more.
VECTOR = 4
# Where a tensor meets no other one: 128 bits of each dtype.
LONE_VECTOR = 8
# One program of float64 arithmetic: with fewer warps a thread holds more than its registers.
FINALIZE_WARPS = 16

_HERE: AbstractContextManager[Any] = nullcontext()
_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _kernel_function(family: Family, name: str) -> Any:
    """A Triton function of a rule."""
    return getattr(importlib.import_module(family.kernels), name)


class TritonBackend:
    """One launch per operation, on a GPU or (slowly, for tests) in Triton's interpreter."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables, self._launcher = Tables(device), Launcher()
        self._nothing = torch.zeros(1, dtype=torch.float32, device=device)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, which need not be the tensors'."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            return torch.cuda.device(self.device)
        return _HERE

    def accumulate(self, request: Add) -> None:
        """See `Backend.accumulate`."""
        sums, control = request.sums, request.control
        with self._on_device():
            for table in self._tables.of_add(request):
                tensors = (
                    table.rows,
                    table.chunks,
                    self._nothing if sums is None else sums,
                    self._nothing if control is None else control,
                )
                self._launcher.launch(
                    accumulate_kernel,
                    table.n_chunks,
                    tensors,
                    float(request.scale),
                    GRAD_DTYPE=_TRITON_DTYPES[table.dtype],
                    IS_FIRST=request.stores,
                    HAS_NORM=sums is not None,
                    HAS_CONTROL=control is not None,
                    VECTOR=VECTOR if table.is_aligned else 0,
                    CHUNK=CHUNK,
                    BLOCK=ACCUMULATE_BLOCK,
                    num_warps=NUM_WARPS,
                )

    def sum_of_squares(self, request: SumOfSquares) -> None:
        """See `Backend.sum_of_squares`."""
        with self._on_device():
            for table in self._tables.of_sums(request):
                self._launcher.launch(
                    sum_of_squares_kernel,
                    table.n_chunks,
                    (table.rows, table.chunks, request.sums),
                    DTYPE=_TRITON_DTYPES[table.dtype],
                    VECTOR=LONE_VECTOR if table.is_aligned else 0,
                    CHUNK=CHUNK,
                    BLOCK=ACCUMULATE_BLOCK,
                    num_warps=NUM_WARPS,
                )

    def finalize(self, request: Finalize) -> None:
        """See `Backend.finalize`."""
        family, scalars, sums = request.family, request.scalars, request.sums
        with self._on_device():
            tensors = scalars.tensors.set(request.rows_and_groups())
            finalize_kernel[(1,)](
                self._nothing if sums is None else sums,
                tensors,
                self._hyper_table(request),
                scalars.steps,
                scalars.scalars,
                scalars.memory,
                scalars.norm,
                scalars.skip,
                scalars.skipped,
                0 if sums is None else sums.numel(),
                tensors.shape[0],
                SCALARS=_kernel_function(family, f"{family.name}_scalars"),
                N_HYPER=family.n_hyper,
                N_SCALARS=family.n_scalars,
                N_MEMORY=len(family.memory),
                HAS_NORM=sums is not None,
                HAS_CLIP=sums is not None and request.max_norm is not None,
                SKIP_NONFINITE=request.skip_nonfinite,
                BLOCK=FINALIZE_BLOCK,
                num_warps=FINALIZE_WARPS,
            )

    def _hyper_table(self, request: Finalize) -> Tensor:
        """fp64 [1 + n_groups, 1 + n_hyper], uploaded where a number changed.

        A hyper-parameter that is a tensor of one element (lr under a CUDA graph) is copied on the
        device.
        """
        host = np.zeros((1 + len(request.hyper), 1 + request.family.n_hyper))
        correction = request.correction.product()
        host[0, :2] = 0 if isinstance(correction, Tensor) else correction, request.max_norm or 0.0
        for i, row in enumerate(request.hyper, start=1):
            host[i] = [0.0 if isinstance(x, Tensor) else float(x) for x in row]
        table = request.scalars.hyper.set(host)
        if isinstance(correction, Tensor):
            table[0, 0].copy_(correction.view(()), non_blocking=True)
        for i, row in enumerate(request.hyper, start=1):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    table[i, j].copy_(value.view(()), non_blocking=True)
        return table

    def step(self, request: Step) -> None:
        """See `Backend.step`."""
        rule, scalars = request.rule, request.scalars
        with self._on_device():
            for table in self._tables.of_step(request):
                self._launcher.launch(
                    step_kernel,
                    table.n_chunks,
                    (table.rows, table.chunks, scalars.scalars, scalars.skip),
                    RULE=_kernel_function(rule.family, rule.name),
                    N_STATES=len(rule.states),
                    N_SCALARS=rule.family.n_scalars,
                    PARAM_DTYPE=_TRITON_DTYPES[table.dtype],
                    MASTER=request.keep.value,
                    VECTOR=VECTOR if table.is_aligned else 0,
                    CHUNK=CHUNK,
                    BLOCK=STEP_BLOCK,
                    num_warps=NUM_WARPS,
                )
