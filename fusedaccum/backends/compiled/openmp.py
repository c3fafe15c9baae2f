"""Runs a compiled loop on the threads of torch's own OpenMP runtime."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# Waking a team of threads costs some 10 us, in which one thread does this many elements.
MIN_PARALLEL_ELEMENTS = 1 << 16
# The threads of an OpenMP team do not exist in a forked process, but the runtime waits for them
# there without end. The loops take one thread then.
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Job(ctypes.Structure):
    """`job` of the C source: one call of a loop."""

    _fields_ = (
        ("loop", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("third", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("n_chunks", ctypes.c_int64),
        ("thread_num", ctypes.c_void_p),
        ("n_threads", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class OpenMP:
    """Entry points of the OpenMP runtime that torch itself has loaded."""

    parallel: Any
    thread_num: int
    n_threads: int


@lru_cache(maxsize=1)
def runtime() -> OpenMP | None:
    """torch's own OpenMP runtime, or None where it cannot be found (its team is not idle: after
    each ATen operation its threads spin for some time, and threads of ours would wait for them)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line}
    own = sorted(paths, key=lambda path: "torch" not in path)
    if not own:
        return None
    try:
        library = ctypes.CDLL(own[0])
    except OSError:  # its file was replaced since
        return None
    library.GOMP_parallel.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    ]  # fmt: skip
    library.GOMP_parallel.restype = None
    return OpenMP(
        library.GOMP_parallel,
        _address(library.omp_get_thread_num),
        _address(library.omp_get_num_threads),
    )


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def run(
    library: ctypes.CDLL,
    name: str,
    addresses: tuple[int, int, int | None],
    scale: float,
    n_chunks: int,
    n_elements: int,
) -> None:
    """Run the loop `name` over all chunks, on as many threads as torch would use.

    ctypes lets go of the GIL meanwhile.

    Args:
        library: of `libraries.load`.
        addresses: of the table, the chunks, and the loop's third array.
        scale: for the loops that take one.
        n_chunks, n_elements: how much there is to do.
    """
    loop = getattr(library, name)
    n = min(torch.get_num_threads(), n_chunks)
    is_worth_it = n > 1 and n_elements >= MIN_PARALLEL_ELEMENTS and not _is_forked
    openmp = runtime() if is_worth_it else None
    if openmp is None:
        pointers = [ctypes.c_void_p(address) for address in addresses]
        loop(*pointers, ctypes.c_float(scale), ctypes.c_int64(0), ctypes.c_int64(n_chunks))
        return
    job = _Job(
        _address(loop), *addresses, scale, n_chunks, openmp.thread_num, openmp.n_threads
    )  # fmt: skip
    openmp.parallel(_address(library.run_share), ctypes.addressof(job), n, 0)
