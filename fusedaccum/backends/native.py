"""Compiled loops for the CPU: built once with the system's C compiler, then kept on disk.

Stock ATen adds a bf16 tensor to an fp32 one at about a fifth of the memory rate, and blocks through
a scratch buffer take 1.2 times a copy; one compiled pass takes 0.7 (benchmarks/README.md). A
compile takes about 0.2 s, once per machine. Without a compiler the torch backend says so once and
uses blocks. FUSEDACCUM_CC=0 turns the loops off, FUSEDACCUM_CC=<command> names a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

# No FMA contraction: the same bits as the reference. No errno: sqrtf becomes one instruction.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
# Waking a team of threads costs some 10 us, in which one thread does this many elements.
MIN_PARALLEL_ELEMENTS = 1 << 16


class CompilerMissing(RuntimeError):
    """There is no C compiler, or it does not compile what it is given."""


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C compiler's command, or None where there is none or it is turned off."""
    wanted = os.environ.get("FUSEDACCUM_CC")
    if wanted == "0":
        return None
    if wanted:
        return shutil.which(wanted)
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fusedaccum"


@lru_cache(maxsize=1)
def _machine() -> str:
    """What -march=native depends on: a home directory may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    return f"{platform.machine()} {platform.processor()} {flags}"


@cache
def load(source: str) -> ctypes.CDLL:
    """The compiled library of a C source, from the cache on disk where it is there.

    Raises:
        CompilerMissing: if there is no compiler or it fails.
    """
    command = compiler()
    if command is None:
        raise CompilerMissing("no C compiler (cc, gcc or clang) was found")
    version = _compiler_version(command)
    text = "\n".join((source, command, version, " ".join(_FLAGS), _machine()))
    name = hashlib.sha256(text.encode()).hexdigest()[:32] + ".so"
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if not path.exists():
            _compile(command, source, path)
    except OSError:
        # A read-only home: a folder of this process's own.
        path = Path(tempfile.mkdtemp(prefix="fusedaccum-")) / name
        _compile(command, source, path)
    return ctypes.CDLL(str(path))


@lru_cache(maxsize=1)
def _compiler_version(command: str) -> str:
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _compile(command: str, source: str, path: Path) -> None:
    """Compile to a name of this process's own and rename: other processes see all or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        c_file, so_file = Path(folder, "loops.c"), Path(folder, "loops.so")
        c_file.write_text(source, encoding="utf-8")
        done = subprocess.run(
            [command, *_FLAGS, str(c_file), "-o", str(so_file), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CompilerMissing(f"{command} failed: {done.stderr.strip()[-500:]}")
        os.replace(so_file, path)


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
class _OpenMP:
    """Entry points of the OpenMP runtime that torch itself has loaded."""

    parallel: Any
    thread_num: int
    n_threads: int


@lru_cache(maxsize=1)
def _openmp() -> _OpenMP | None:
    """torch's own OpenMP runtime, or None where it cannot be found (its team is not idle: after
    each ATen operation its threads spin for some time, and threads of ours would wait for them)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    own = sorted(paths, key=lambda path: "torch" not in path)
    if not own:
        return None
    library = ctypes.CDLL(own[0])
    library.GOMP_parallel.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    ]  # fmt: skip
    library.GOMP_parallel.restype = None
    return _OpenMP(
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
        library: of `load`.
        addresses: of the table, the chunks, and the loop's third array.
        scale: for the loops that take one.
        n_chunks, n_elements: how much there is to do.
    """
    loop = getattr(library, name)
    n = min(torch.get_num_threads(), n_chunks)
    openmp = _openmp() if n > 1 and n_elements >= MIN_PARALLEL_ELEMENTS else None
    if openmp is None:
        pointers = [ctypes.c_void_p(address) for address in addresses]
        loop(*pointers, ctypes.c_float(scale), ctypes.c_int64(0), ctypes.c_int64(n_chunks))
        return
    job = _Job(
        _address(loop), *addresses, scale, n_chunks, openmp.thread_num, openmp.n_threads
    )  # fmt: skip
    openmp.parallel(_address(library.run_share), ctypes.addressof(job), n, 0)


@lru_cache(maxsize=1)
def warn_missing(reason: str) -> None:
    """Say once that the slower path is taken."""
    if os.environ.get("FUSEDACCUM_CC") != "0":
        warnings.warn(
            f"fusedaccum: {reason}; the torch backend falls back to blocks of ATen operations, "
            "which take about 1.7 times as long to accumulate bf16 and 4 times to step. Install a "
            "C compiler, or set FUSEDACCUM_CC=0 to silence this",
            RuntimeWarning,
            stacklevel=3,
        )
