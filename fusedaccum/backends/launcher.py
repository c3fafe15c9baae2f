"""Launches of Triton's kernels that do not have Triton look for the compiled kernel each time.

`kernel[grid](...)` works out from all arguments, at every launch, which compiled kernel serves
them. That takes several times as long on the host as the launch itself. Here it does so once for
each set of constants; later launches are the `compiled[grid](...)` of Triton's own tutorials.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

# A kernel is compiled for pointers that are multiples of it, or for others.
POINTER_BYTES = 16


class Launcher:
    """Launches kernels on one device, which has to be the current one."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, CompiledKernel] = {}

    def launch(
        self,
        kernel: Any,
        n_programs: int,
        tensors: Sequence[Tensor],
        *numbers: float,
        num_warps: int,
        **constants: Any,
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: a `triton.jit` function.
            n_programs: the grid, of one dimension.
            tensors: its first arguments. Each has the same dtype at every launch.
            numbers: the next ones. No integers: Triton compiles for some values of those.
            num_warps: of a program.
            constants: its constexpr arguments, which are all others, in the order of the kernel.
        """
        bits = 0
        for tensor in tensors:
            bits |= tensor.data_ptr()
        is_usual = not bits & (POINTER_BYTES - 1)
        key = (kernel, num_warps, *constants.values())
        compiled = self._compiled.get(key) if is_usual else None
        if compiled is not None:
            compiled[n_programs, 1, 1](*tensors, *numbers, *constants.values())
            return
        found = kernel[(n_programs,)](*tensors, *numbers, num_warps=num_warps, **constants)
        # None of the interpreter, and of what stands in for a kernel.
        if is_usual and isinstance(found, CompiledKernel):
            n_others = len(tensors) + len(numbers)
            if kernel.arg_names[n_others:] == list(constants):
                self._compiled[key] = found
