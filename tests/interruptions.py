"""An exception at every line of an operation, and what the wrapper is afterwards.

    python -m tests.interruptions            every line of every scenario, and how each ended
    python -m tests.interruptions adam       scenarios with that in their name
    python -m tests.interruptions --stride 9 --first 2

The promise: nothing is silent. After an operation that raised in its middle, either

nothing   the operation did nothing: repeated, all comes out as if it had never been disturbed; or
done      the operation did all it had to: the loop that goes on with the next one does; or
refused   step(), flush() and state_dict() raise a RuntimeError that names zero_grad(), and after
          zero_grad() the windows that follow are right against a float64 oracle. zero_grad()
          ends a load_state_dict() that raised, and load_state_dict() may be called again.

In the first two, zero_grad() brings back a wrapper that trains as well, and what state_dict() hands
out goes on in a new process. Anything else raises `Broken`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tests.runs import Kind, Op, Oracle, Run, differences
from tests.threads import one_thread
from tests.traps import OPTIMIZERS, PACKAGE, AtLine, Broken, Trap

PATIENCE = 60  # seconds


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
        """Where the operation is left out; nothing where that is refused."""
        try:
            return self.start().all(list(self.program[self.at + 1 :])).saved()
        except RuntimeError as error:
            if "zero_grad()" not in str(error):
                raise
            return {}


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

    def again() -> Run:
        return _disturb(scenario, trap.again() or make(), is_again=True)

    try:
        with warnings.catch_warnings(), one_thread(), _watchdog():
            warnings.simplefilter("ignore")
            outcome = _examine(
                scenario, trap, lambda: _disturb(scenario, trap.again() or make(), True)
            )
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


def _disturb(scenario: Scenario, trap: Trap, is_again: bool = False) -> Run:
    run = scenario.start()
    try:
        with trap.set(run):
            run.do(scenario.op)
    except Exception as error:
        raise Broken("replaced", f"by {error!r}") from error
    if is_again and not trap.fired:
        raise Broken("unsteady", "the same place was not reached again")
    return run


def _check_loads(scenario: Scenario, again: Callable[[], Run]) -> None:
    """Two ways out of a load_state_dict() that raised: once more, and zero_grad() to the end.

    The latter discards the window that was loaded, as it does after a backward().
    """
    window: list[Op] = [("zero_grad",), *scenario.kind.update(60)]
    ended = scenario.start().all([scenario.op, ("backward", 58), *window]).saved()
    for ops, expected in (
        (list(scenario.program[scenario.at :]), scenario.undisturbed),
        (window, ended),
    ):
        wrong = _end(again(), ops, expected)
        if wrong is not None:
            raise Broken("no way out", f"{ops[0][0]}: {wrong.text}")


def _examine(scenario: Scenario, trap: Trap, again: Callable[[], Run]) -> str | None:
    run = _disturb(scenario, trap)
    if not trap.fired:
        return None
    if refusal(run.opt.state_dict) is not None:
        for operation in (run.step, run.flush) if run.kind.steps is not None else (run.step,):
            if refusal(operation) is None:
                raise Broken("silent", f"state_dict() refuses, and {operation.__name__}() does not")
        recover(run)
        if scenario.op[0] == "load":
            _check_loads(scenario, again)
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
        if half is not None and not (half.is_error and "zero_grad()" in half.text):
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
