"""Libraries of compiled loops: built once with the system's C compiler, then kept on disk.

Stock ATen adds a bf16 tensor to an fp32 one at about a fifth of the memory rate, and blocks through
a scratch buffer take 1.2 times a copy; one compiled pass takes 0.7 (benchmarks/README.md). A
compile takes about 0.2 s, once per machine. Whatever goes wrong on the way, from no compiler to a
cache that is damaged, the torch backend says once why and uses blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from . import compiler, store
from .compiler import CompilerMissing


@lru_cache(maxsize=1)
def _machine() -> str:
    """What -march=native depends on: a home directory may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = ""
    return f"{platform.machine()} {platform.processor()} {flags}"


class _Libraries:
    """The libraries of this process, and the sources that cannot be had; each is tried once.

    Threads that want one source wait for the first of them; two sources compile side by side.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._results: dict[str, ctypes.CDLL | CompilerMissing] = {}
        self._warned: set[str] = set()
        self.after_fork()

    def after_fork(self) -> None:
        """New locks: a thread that held one does not exist in a forked process."""
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def get(self, source: str) -> ctypes.CDLL:
        with self._guard:
            lock = self._locks.setdefault(source, threading.Lock())
        with lock:
            if source not in self._results:
                try:
                    self._results[source] = _find_or_build(source)
                except CompilerMissing as error:
                    self._results[source] = error
                except OSError as error:
                    self._results[source] = CompilerMissing(f"compiled loops: {error}")
        result = self._results[source]
        if isinstance(result, CompilerMissing):
            raise result
        return result

    def is_news(self, text: str) -> bool:
        """Whether nobody has warned of this."""
        with self._guard:
            is_new = text not in self._warned
            self._warned.add(text)
        return is_new


_libraries = _Libraries()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_libraries.after_fork)


def load(source: str) -> ctypes.CDLL:
    """The compiled library of a C source, from the cache on disk where it is there.

    Raises:
        CompilerMissing: if it cannot be had, for whatever reason.
    """
    return _libraries.get(source)


def forget() -> None:
    """Look for a compiler and for libraries again, and warn again."""
    compiler.find.cache_clear()
    compiler.hung.clear()
    compiler_version.cache_clear()
    _libraries.forget()


def _find_or_build(source: str) -> ctypes.CDLL:
    """The library of a source: kept code where it is sound and loads, else built anew."""
    command = compiler.require()
    text = "\n".join((source, *command, compiler_version(command), *compiler.FLAGS, _machine()))
    name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    code = None
    try:
        code = store.read(name)
    except store.Untrusted as error:
        _warn(f"{error}; it is not used, and every process compiles its loops anew")
    if code is not None:
        with suppress(OSError, CompilerMissing):
            return _open(code)
    with _scratch() as folder:
        code = compiler.build(command, source, folder)
    library = _open(code)
    with suppress(OSError):  # a read-only home: every process compiles for itself
        store.write(name, code)
    return library


@lru_cache(maxsize=1)
def compiler_version(command: compiler.Command) -> str:
    """What the compiler says of itself.

    Raises:
        CompilerMissing, OSError: if it does not end, or cannot be run.
    """
    with _scratch() as folder:
        return compiler.version(command, folder)


def _open(code: bytes) -> ctypes.CDLL:
    """Load code, from a file of its own that nobody can change or cut afterwards.

    Raises:
        CompilerMissing: if it cannot be loaded from anywhere, or is a library of something else.
    """
    problem = ""
    for place in _places():
        try:
            with _own_folder(place) as folder:
                library = _library_of(folder / "loops.so", code)
        except OSError as error:
            problem = str(error)
            continue
        if not hasattr(library, "run_share"):
            raise CompilerMissing("the C compiler made a library without the loops in it")
        return library
    raise CompilerMissing(f"compiled loops cannot be loaded: {problem}")


def _library_of(path: Path, code: bytes) -> ctypes.CDLL:
    path.write_bytes(code)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # mounted noexec, say. A warning must not name a new folder each time.
        why = str(error).replace(str(path), path.name)
        raise OSError(f"{why} (in a folder of {path.parent.parent})") from None


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder of this process's own, in the first place that has room for one."""
    with ExitStack() as stack:
        problem = OSError("no folder can be written")
        for place in _places():
            try:
                folder = stack.enter_context(_own_folder(place))
            except OSError as error:
                problem = error
                continue
            yield folder
            return
        raise problem


def _places() -> Iterator[Path | None]:
    """Where this process may make folders: the system's place, then that of the kept code."""
    yield None
    if not store.why_not():
        yield store.folder()


@contextmanager
def _own_folder(place: Path | None) -> Iterator[Path]:
    """A new folder that only this user can enter. (A TemporaryDirectory would be removed a second
    time, too early, where a process that was forked meanwhile ends.)"""
    parent = place or Path(tempfile.gettempdir())
    try:
        folder = Path(tempfile.mkdtemp(prefix="fusedaccum-", dir=parent))
    except OSError as error:
        raise OSError(f"{parent} cannot be written ({error.strerror})") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def warn_missing(reason: str) -> None:
    """Say once for each reason that the slower path is taken."""
    if os.environ.get(compiler.VARIABLE, "").strip() != "0":
        _warn(
            f"{reason}; the torch backend falls back to blocks of ATen operations, which take "
            "about 2.5 times as long to accumulate bf16 and 8.5 times to step. Install a C "
            "compiler, or set FUSEDACCUM_CC=0 to silence this"
        )


def _warn(text: str) -> None:
    if _libraries.is_news(text):
        warnings.warn(f"fusedaccum: {text}", RuntimeWarning, stacklevel=3)
