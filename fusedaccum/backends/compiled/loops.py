"""The compiled loops of the CPU, over the tables that the Triton kernels use."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...rules.rule import Rule
from ..keep import Keep
from ..operations import Add, Step, SumOfSquares
from ..tables import LaunchTable, Tables
from . import libraries, openmp, source
from .compiler import CompilerMissing


@cache
def reduce_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loops that add and sum tensors of a dtype; None where they cannot be had."""
    return _library(source.reduce_source(dtype))


@cache
def step_library(rule: Rule, dtype: torch.dtype, keep: Keep) -> ctypes.CDLL | None:
    """The loop of a rule for parameters of a dtype; None where it cannot be had."""
    return _library(source.step_source(rule, dtype, keep))


@cache
def _library(text: str) -> ctypes.CDLL | None:
    """The compiled library, or None (and a warning, once) where it cannot be had."""
    try:
        return libraries.load(text)
    except CompilerMissing as error:
        libraries.warn_missing(str(error))
        return None


def forget() -> None:
    """Look for a compiler and for libraries again."""
    libraries.forget()
    for function in (reduce_library, step_library, _library):
        function.cache_clear()


class Loops:
    """The operations of a `Backend` that have loops; each is asked for first by `serve...`."""

    def __init__(self) -> None:
        self._tables = Tables(torch.device("cpu"))

    def serve(self, tensors: Sequence[Tensor]) -> bool:
        """Whether there are loops for the dtypes of all `tensors`: all of a request or nothing."""
        return all(reduce_library(dtype) for dtype in {t.dtype for t in tensors})

    def serve_add(self, request: Add) -> bool:
        """Whether there are loops for an accumulation."""
        if request.launch is not None and request.launch.table is not None:
            return reduce_library(request.launch.table.dtype) is not None
        return self.serve([grad for _, grad in request.pairs])

    def serve_step(self, request: Step) -> bool:
        """Whether there is a loop for a step."""
        dtype = request.tensors[0].param.dtype
        return step_library(request.rule, dtype, request.keep) is not None

    def accumulate(self, request: Add, scale: float, stores: bool) -> None:
        """See `Add`; `scale` and `stores` are what they are together with `control`."""
        for table in self._tables.of_add(request):
            name = source.accumulate_name(table.dtype, stores, request.sums is not None)
            _run(reduce_library(table.dtype), name, table, request.sums, scale)

    def sum_of_squares(self, request: SumOfSquares) -> None:
        """See `SumOfSquares`."""
        for table in self._tables.of_sums(request):
            name = source.sum_of_squares_name(table.dtype)
            _run(reduce_library(table.dtype), name, table, request.sums)

    def step(self, request: Step) -> None:
        """See `Step`."""
        for table in self._tables.of_step(request):
            library = step_library(request.rule, table.dtype, request.keep)
            _run(library, "step", table, request.scalars.scalars)


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
    openmp.run(library, name, addresses, scale, table.n_chunks, table.n_elements)
