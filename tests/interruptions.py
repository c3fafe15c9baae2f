"""An exception at every line of an operation, and what the wrapper is afterwards.

    python -m tests.interruptions            every line of every scenario, and how each ended
    python -m tests.interruptions adam       scenarios with that in their name
    python -m tests.interruptions --stride 9 --first 2

The promise: nothing is silent. After an operation that raised in its middle, either

nothing   the operation did nothing: repeated, all comes out as if it had never been disturbed; or
done      the operation did all it had to: the loop that goes on with the next one does; or
refused   step(), flush() and state_dict() raise a RuntimeError that names zero_grad(), and after
          zero_grad() the windows that follow are right against a float64 oracle.

In all three, zero_grad() brings back a wrapper that trains, and what state_dict() hands out where
it does not refuse goes on in a new process. Anything else raises `Broken`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import fusedaccum
from tests.runs import Kind, Op, Oracle, Run, differences
from tests.threads import one_thread

PACKAGE = str(Path(fusedaccum.__file__).resolve().parent)
PATIENCE = 60  # seconds
OPTIMIZERS = str(Path(torch.optim.__file__).resolve().parent)


class Broken(AssertionError):
    """A state that the promise excludes. `how` is one word for it; `where` was interrupted."""

    where = ""

    def __init__(self, how: str, detail: str) -> None:
        super().__init__(f"{how}: {detail}")
        self.how = how


class Trap:
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

    @contextmanager
    def armed(self, run: Run) -> Iterator[None]:
        raise NotImplementedError
        yield

    def spring(self, error: BaseException, where: str) -> None:
        self.fired, self.where, self.error = True, where, error
        raise error


class AtLine(Trap):
    """Raises at the `k`-th line that runs in files under `folders`, counted from 0.

    Autograd runs CPU hooks in the thread that called backward(), so its lines count as well.
    """

    def __init__(self, k: int, error: type[BaseException], folders: Sequence[str]) -> None:
        super().__init__()
        self.left, self.kind, self.folders = k, error, tuple(folders)
        self.thread = threading.get_ident()

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
            if self.left == 0:
                code = frame.f_code
                where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_qualname}"
                self.spring(self.kind(f"raised by the test at {where}"), where)
            self.left -= 1
        return self._line


@dataclass(frozen=True)
class Scenario:
    """A loop, and the operation of it that is interrupted.

    Args:
        program: all operations, with full windows after the interrupted one.
        at: its number.
    """

    name: str
    kind: Kind
    program: tuple[Op, ...]
    at: int
    traces_torch: bool = False  # whether lines of torch.optim count too: a native step()

    @property
    def op(self) -> Op:
        return self.program[self.at]

    @property
    def folders(self) -> list[str]:
        return [PACKAGE, OPTIMIZERS] if self.traces_torch else [PACKAGE]

    def start(self) -> Run:
        """Up to the operation."""
        return Run(self.kind).all(list(self.program[: self.at]))

    @functools.cached_property
    def undisturbed(self) -> dict[str, Any]:
        return self.start().all(list(self.program[self.at :])).saved()

    @functools.cached_property
    def without(self) -> dict[str, Any]:
        """Where the operation is left out."""
        return self.start().all(list(self.program[self.at + 1 :])).saved()


def refusal(call: Callable[[], Any]) -> str | None:
    """The text with which `call` refuses, or None if it does not.

    Raises:
        Broken: for another exception, and for a text that does not name the way out.
    """
    try:
        call()
    except RuntimeError as error:
        if "zero_grad()" not in str(error):
            raise Broken("unhelpful", f"{error!r}") from error
        return str(error)
    except Exception as error:
        raise Broken("crash", f"{error!r}") from error
    return None


def recover(run: Run) -> None:
    """zero_grad(), and everything after it is right.

    Raises:
        Broken: if it is not.
    """
    kind, opt = run.kind, run.opt
    try:
        opt.zero_grad()
    except Exception as error:
        raise Broken("no way out", f"zero_grad(): {error!r}") from error
    real = [p for group in opt.param_groups for p in group["params"]]
    if list(map(id, real)) != list(map(id, run.params)):
        raise Broken("param_groups", "they do not hold the model's parameters")
    for param in opt.state:
        if not any(param is p for p in run.params):
            raise Broken("state", "it is of something that is no parameter of the model")
    if any(name in opt.__dict__ for name in ("found_inf", "grad_scale")):
        raise Broken("scaler", "what GradScaler set on the optimizer is still there")
    try:
        if run.scaler is not None and run.scaler._found_inf_per_device(opt):
            run.scaler.update()  # the loop's, which comes after a step() that it caught
        if opt.micro_batches:
            opt.flush()  # a window that was whole, and is kept
        skipped = int(opt.skipped_steps)
        for i in (50, 52, 54):
            oracle = Oracle(kind, run.saved())
            for op in kind.update(i):
                run.do(op)
                if op[0] == "backward":
                    _check_shown(run, i, op[1])
            if not opt.window_closed:
                raise Broken("stuck", f"window {i} did not close")
            oracle.update([i, i + 1])
            oracle.check(run.saved())
    except Broken:
        raise
    except AssertionError as error:
        raise Broken("wrong", f"after zero_grad(): {error}") from error
    except Exception as error:
        raise Broken("stuck", f"after zero_grad(): {error!r}") from error
    if int(opt.skipped_steps) != skipped:
        raise Broken("skipped", "a finite window was skipped")


def _check_shown(run: Run, first: int, last: int) -> None:
    """What `p.grad` shows in a window: fp32, and a multiple of the sum so far."""
    kind = run.kind
    weights = {i: kind.weight(i) for i in range(first, last + 1)}
    for j, param in enumerate(run.params):
        exact = sum(w * kind.grads(i)[j].double() for i, w in weights.items())
        shown = param.grad
        if shown is None or shown.dtype is not torch.float32:
            raise Broken("grad", f"p.grad of parameter {j} is {shown}")
        factor = float((shown.double() * exact).sum() / (exact * exact).sum())
        if factor <= 0 or not torch.allclose(shown.double(), factor * exact, rtol=1e-5, atol=1e-6):
            raise Broken("grad", f"p.grad of parameter {j} is not the sum of what arrived")


def examine(scenario: Scenario, make: Callable[[], Trap]) -> tuple[str, str] | None:
    """Disturb the scenario's operation once: how that ended, and where it was.

    Returns:
        "nothing", "done" or "refused"; None if the trap was never reached.

    Raises:
        Broken: for all else.
    """
    trap = make()
    try:
        with warnings.catch_warnings(), one_thread(), _watchdog():
            warnings.simplefilter("ignore")
            outcome = _examine(scenario, trap, lambda: _disturb(scenario, make()))
    except Exception as error:
        broken = error if isinstance(error, Broken) else Broken("crash", repr(error))
        broken.where = trap.where
        raise broken from error
    return None if outcome is None else (outcome, trap.where)


@contextmanager
def _watchdog() -> Iterator[None]:
    """A lock that is never released would hang the test; a trial takes a small part of a second."""

    def bark(*_: Any) -> None:
        raise Broken("hangs", f"for {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _disturb(scenario: Scenario, trap: Trap) -> Run:
    run = scenario.start()
    try:
        with trap.set(run):
            run.do(scenario.op)
    except Exception as error:
        raise Broken("replaced", f"by {error!r}") from error
    return run


def _examine(scenario: Scenario, trap: Trap, again: Callable[[], Run]) -> str | None:
    run = _disturb(scenario, trap)
    if not trap.fired:
        return None
    if refusal(run.opt.state_dict) is not None:
        if refusal(run.step) is None:
            raise Broken("silent", "state_dict() refuses, and step() does not")
        if run.kind.steps is not None and refusal(run.opt.flush) is None:
            raise Broken("silent", "state_dict() refuses, and flush() does not")
        recover(run)
        if scenario.op[0] == "load":
            wrong = _end(again(), list(scenario.program[scenario.at :]), scenario.undisturbed)
            if wrong is not None:
                raise Broken("no way out", f"loading again: {wrong.text}")
        return "refused"
    saved = run.saved()
    # Repeated, or gone on from; in the first case the operation had done nothing.
    rest = list(scenario.program[scenario.at :])
    how, ops, repeated = "nothing", rest, _end(run, rest, scenario.undisturbed)
    if repeated is not None:
        how, ops = "done", rest[1:]
        wrong = _end(again(), ops, scenario.undisturbed)
        if wrong is not None:
            ends = f"repeated, {repeated.text}; not repeated, {wrong.text}"
            raise Broken("stuck" if repeated.is_error and wrong.is_error else "silent", ends)
    if scenario.op[0] == "load" and _end(again(), rest[1:], scenario.undisturbed) is not None:
        half = _end(again(), rest[1:], scenario.without)
        if half is not None:
            raise Broken("silent", f"half of the checkpoint was loaded: {half.text}")
    if how == "nothing" or not scenario.kind.scaled:  # a new GradScaler wants to have seen a step()
        resumed = _end(Run(scenario.kind).resumed(saved), ops, scenario.undisturbed)
        if resumed is not None:
            raise Broken("checkpoint", f"state_dict() handed out what goes wrong: {resumed.text}")
    recover(again())
    return how


class Wrong(NamedTuple):
    """What is wrong with the end of a run: an error that an operation raised, or a difference."""

    text: str
    is_error: bool


def _end(run: Run, ops: list[Op], expected: dict[str, Any]) -> Wrong | None:
    """Do what is left of the program, and compare with the undisturbed run to the bit."""
    for op in [*ops, ("save",)]:
        try:
            run.do(op)
        except Exception as error:
            return Wrong(f"{op[0]}: {error!r}", True)
    difference = next(differences(run.saved(), expected), None)
    return None if difference is None else Wrong(difference, False)


def survey(
    scenario: Scenario, trap: Callable[[int], Trap], stride: int = 1, first: int = 0
) -> Iterator[tuple[str, str, str]]:
    """Disturb with `trap(first)`, `trap(first + stride)`, ... until one is not reached.

    Yields how each ended, where it was, and details.
    """
    for k in itertools.count(first, stride):
        try:
            outcome = examine(scenario, functools.partial(trap, k))
        except Broken as broken:
            yield broken.how, broken.where, str(broken)
        else:
            if outcome is None:
                return
            yield (*outcome, "")


KEPT = ("nothing", "done", "refused")


def main(argv: Sequence[str] | None = None) -> int:
    from tests.interrupted import SCENARIOS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="scenarios with this in their name")
    parser.add_argument("--stride", type=int, default=1, help="every so many lines (1: all)")
    parser.add_argument("--first", type=int, default=0, help="the first line")
    parser.add_argument("--details", action="store_true", help="each broken line, not each place")
    args = parser.parse_args(argv)
    total: collections.Counter[str] = collections.Counter()
    for scenario in SCENARIOS:
        if args.name not in scenario.name:
            continue
        started = time.monotonic()
        counts: collections.Counter[str] = collections.Counter()
        places: dict[tuple[str, str], list[str]] = {}
        for error in (KeyboardInterrupt, MemoryError):
            at_line = functools.partial(AtLine, error=error, folders=scenario.folders)
            for how, where, detail in survey(scenario, at_line, args.stride, args.first):
                counts[how] += 1
                if how not in KEPT:
                    places.setdefault((how, where), []).append(f"{error.__name__}: {detail}")
        total += counts
        ends = ", ".join(f"{n} {how}" for how, n in counts.most_common())
        seconds = time.monotonic() - started
        print(f"{scenario.name}: {counts.total()} interruptions: {ends} ({seconds:.0f} s)")
        for (how, where), details in places.items():
            print(f"    {how} at {where} ({len(details)}): {details[0]:.300}")
            for detail in details[1:] if args.details else ():
                print(f"        {detail}")
        sys.stdout.flush()
    ends = ", ".join(f"{n} {how}" for how, n in total.most_common())
    broken = sum(n for how, n in total.items() if how not in KEPT)
    print(f"{total.total()} interruptions: {ends}; {broken} break the promise")
    return 1 if broken or not total else 0


if __name__ == "__main__":
    raise SystemExit(main())
