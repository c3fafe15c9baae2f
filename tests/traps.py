"""What raises in the middle of an operation: at a line, or in a call."""

from __future__ import annotations

import collections
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedaccum
from tests.runs import Run

PACKAGE = str(Path(fusedaccum.__file__).resolve().parent)
OPTIMIZERS = str(Path(torch.optim.__file__).resolve().parent)


def _name(code: CodeType) -> str:
    """With its class; Python 3.10 does not know that."""
    return str(getattr(code, "co_qualname", code.co_name))


class Broken(AssertionError):
    """A state that the promise excludes. `how` is one word for it; `where` was interrupted."""

    where = ""

    def __init__(self, how: str, detail: str) -> None:
        super().__init__(f"{how}: {detail}")
        self.how = how


class Trap(ABC):
    """Raises once, somewhere in the operation. `fired` and `where` say whether, and where."""

    def __init__(self) -> None:
        self.fired = False
        self.where = ""
        self.error: BaseException | None = None

    @contextmanager
    def set(self, run: Run) -> Iterator[None]:
        """Let it raise inside this block, and take what it raised."""
        try:
            with self.armed(run):
                yield
        except BaseException as error:
            if error is not self.error:
                raise
        else:
            if self.fired:
                raise Broken("swallowed", f"what was raised at {self.where} did not come out")

    @abstractmethod
    def armed(self, run: Run) -> AbstractContextManager[None]:
        """Let it raise inside this block."""

    def again(self) -> Trap | None:
        """One that raises at the very same place, if that has to be said."""
        return None

    def spring(self, error: BaseException, where: str) -> None:
        self.fired, self.where, self.error = True, where, error
        raise error


class AtLine(Trap):
    """Raises at the `k`-th line that runs in files under `folders`, counted from 0.

    Autograd runs CPU hooks in the thread that called backward(), so its lines count as well.
    """

    def __init__(
        self,
        k: int,
        error: type[BaseException],
        folders: Sequence[str],
        place: tuple[object, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.left, self.kind, self.folders = k, error, tuple(folders)
        self.thread = threading.get_ident()
        self.place = place  # code, line and how often it ran: instead of `k`
        self.visits: collections.Counter[tuple[object, int]] = collections.Counter()

    def again(self) -> Trap:
        # Not the same number: some lines run once for each frame of the caller's.
        return AtLine(-1, self.kind, self.folders, self.place)

    @contextmanager
    def armed(self, run: Run) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.folders) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not self.fired:
            assert threading.get_ident() == self.thread, "a hook in another thread"
            code, line = frame.f_code, frame.f_lineno
            self.visits[code, line] += 1
            place = (code, line, self.visits[code, line])
            if self.left == 0 or place == self.place:
                self.place = place
                where = f"{Path(code.co_filename).name}:{line} {_name(code)}"
                self.spring(self.kind(f"raised by the test at {where}"), where)
            self.left -= 1
        return self._line


class AtCall(Trap):
    """Raises at the `k`-th call of some functions."""

    def __init__(
        self,
        k: int,
        functions: Callable[[Run], list[tuple[Any, str]]],
        error: Exception,
    ) -> None:
        super().__init__()
        self.left, self.functions, self.to_raise = k, functions, error

    @contextmanager
    def armed(self, run: Run) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in self.functions(run):
                patch.setattr(owner, name, self._counted(getattr(owner, name), name))
            yield

    def _counted(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                caller = _name(sys._getframe(1).f_code)
                self.spring(self.to_raise, f"{name} called by {caller}")
            return function(*args, **kwargs)

        return call


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Whatever reads a tensor's value on the host raises AssertionError("a host read")."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a host read")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        if find_spec("triton"):  # whose interpreter copies its arguments to and from numpy
            patch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *_, **__: None)
        yield
