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
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

import torch

# No FMA contraction: the same bits as the reference. No errno: sqrtf becomes one instruction.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
# Handing work to a second thread costs about 30 us, as long as one thread needs for this many
# elements.
MIN_PARALLEL_ELEMENTS = 1 << 18


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


_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, "fusedaccum")
        return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


# A forked child has the executor's state but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def parallel(n_chunks: int, n_elements: int, work: Callable[[int, int], None]) -> None:
    """Run `work(begin, end)` over the chunks on as many threads as torch would use.

    ctypes lets go of the GIL, so plain threads serve; OpenMP would bring a second runtime beside
    torch's own.
    """
    n = min(torch.get_num_threads(), n_chunks)
    if n <= 1 or n_elements < MIN_PARALLEL_ELEMENTS:
        work(0, n_chunks)
        return
    bounds = [n_chunks * i // n for i in range(n + 1)]
    others = [_threads().submit(work, bounds[i], bounds[i + 1]) for i in range(1, n)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


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
