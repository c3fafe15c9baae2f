"""Nothing is silent: what an exception in the middle of an operation leaves.

Every line of every operation takes `python -m tests.interruptions`; here is a part of them, and the
ordinary causes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fusedaccum
from fusedaccum.window import blocks, weights
from tests import custom_rules, interrupted
from tests.interrupted import ADAFACTOR, COUNTED, LINKED, LOOP, MUON_LOOP, SCENARIOS, SPLIT
from tests.interruptions import KEPT, Scenario, examine, survey
from tests.runs import Kind, Op, Run, differences
from tests.traps import AtCall, AtLine, Broken, Trap

# Lines between two interruptions, primes: a scenario's loops are shorter or longer. Loading has the
# most lines, and each costs the most runs.
STRIDE, LOAD_STRIDE = 61, 157


def ends(found: Iterator[tuple[str, str, str]]) -> dict[str, int]:
    """How many ended how.

    Raises:
        AssertionError: if one broke the promise.
    """
    counts: dict[str, int] = {}
    broken = []
    for how, where, detail in found:
        counts[how] = counts.get(how, 0) + 1
        if how not in KEPT:
            broken.append(f"at {where}: {detail}")
    assert not broken, "\n".join(broken[:5])
    return counts


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name.replace(" ", "-"))
def test_some_lines(scenario: Scenario) -> None:
    # Each scenario starts elsewhere, so that all together see more lines of what they share.
    first = SCENARIOS.index(scenario) * 17 % 13
    stride = LOAD_STRIDE if scenario.op[0] == "load" else STRIDE

    def at_line(k: int) -> Trap:
        return AtLine(k, (KeyboardInterrupt, MemoryError)[k % 2], scenario.folders)

    counts = ends(survey(scenario, at_line, stride, first))
    assert sum(counts.values()) > 0


@pytest.mark.parametrize("kind", ["adamw-bf16-weighted", "adamw-fp32-loop-weighted"])
def test_every_line_of_a_micro_batch_block(kind: str) -> None:
    """Also its last: what tells zero_grad() that the block is being run must not stay behind."""
    (scenario,) = (s for s in SCENARIOS if s.name == f"{kind} backward after 2")
    files = (blocks.__file__, weights.__file__)
    counts = ends(survey(scenario, lambda k: AtLine(k, KeyboardInterrupt, files)))
    assert sum(counts.values()) > 15


def _allocations(_: Run) -> list[tuple[Any, str]]:
    names = ("zeros", "empty", "ones", "full", "zeros_like", "empty_like", "full_like")
    return [(torch, name) for name in names]


def scenario_of(kind: Kind, name: str) -> Scenario:
    return next(s for s in SCENARIOS if s.name == f"{kind.name} {name}")


@pytest.mark.parametrize(
    "scenario",
    [
        scenario_of(COUNTED, "step after 2"),
        scenario_of(SPLIT, "step after 2"),
        scenario_of(SPLIT, "load after 0 new"),
        scenario_of(LOOP, "step after 2"),
        scenario_of(LINKED, "step after 2"),
        scenario_of(ADAFACTOR, "step after 2"),
        scenario_of(ADAFACTOR, "load after 3 trained"),
        scenario_of(MUON_LOOP, "step after 2"),
    ],
    ids=lambda s: s.name.replace(" ", "-"),
)
def test_out_of_memory_for_states(scenario: Scenario) -> None:
    def allocating(k: int) -> Trap:
        return AtCall(k, _allocations, torch.OutOfMemoryError("out of memory, says the test"))

    assert sum(ends(survey(scenario, allocating)).values()) > 0


def test_out_of_memory_for_accumulators() -> None:
    program = (("backward", 0), *COUNTED.update(0)[1:], *COUNTED.update(2))
    scenario = Scenario("backward", COUNTED, program, 0)

    def allocating(k: int) -> Trap:
        return AtCall(k, _allocations, torch.OutOfMemoryError("out of memory, says the test"))

    assert ends(survey(scenario, allocating)).keys() == {"refused"}


class InHook(Trap):
    """Raises in a step hook of the user's, before or after the update."""

    def __init__(self, register: str) -> None:
        super().__init__()
        self.register = register

    @contextmanager
    def armed(self, run: Run) -> Iterator[None]:
        def hook(*_: Any) -> None:
            self.spring(ValueError("the hook's"), self.register)

        handle = getattr(run.opt, self.register)(hook)
        try:
            yield
        finally:
            handle.remove()


CLOSING = [
    scenario_of(COUNTED, "step after 4"),
    scenario_of(SPLIT, "step after 2"),
    scenario_of(LOOP, "step after 4"),
    scenario_of(LINKED, "step after 4"),
    scenario_of(ADAFACTOR, "step after 4"),
    scenario_of(MUON_LOOP, "step after 2"),
]


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
@pytest.mark.parametrize("scenario", CLOSING, ids=lambda s: s.name.replace(" ", "-"))
def test_a_step_hook_that_raises(scenario: Scenario, register: str) -> None:
    assert examine(scenario, lambda: InHook(register)) is not None


class BadRate(Trap):
    """A learning rate that is no number, which the loop mends after the error."""

    def __init__(self, rate: Any) -> None:
        super().__init__()
        self.rate = rate

    @contextmanager
    def armed(self, run: Run) -> Iterator[None]:
        group = run.opt.param_groups[1]
        before, group["lr"] = group["lr"], self.rate
        try:
            yield
        except (TypeError, ValueError) as error:
            self.fired, self.where, self.error = True, f"lr={self.rate!r}", error
            raise
        finally:
            group["lr"] = before


@pytest.mark.parametrize("rate", ["fast", None])
@pytest.mark.parametrize("scenario", CLOSING, ids=lambda s: s.name.replace(" ", "-"))
def test_a_learning_rate_that_is_no_number(scenario: Scenario, rate: Any) -> None:
    assert examine(scenario, lambda: BadRate(rate)) is not None, f"lr={rate!r} was taken"


@pytest.mark.parametrize("kind", [COUNTED, LOOP], ids=lambda k: k.name)
@pytest.mark.parametrize("k", [0, 1], ids=["before-backward", "after-backward"])
def test_a_closure_that_raises(kind: Kind, k: int) -> None:
    program: list[Op] = []
    for i in range(6):
        program += [("closure", i), ("zero_grad",)]
    scenario = Scenario("closure", kind, (*program, *kind.update(20)), 6)

    def raising() -> Trap:
        return AtCall(k, lambda run: [(run, "in_closure")], ValueError("the closure's"))

    found = examine(scenario, raising)
    assert found is not None
    assert found[0] == ("nothing", "refused")[k]


@pytest.mark.parametrize("evaluation", [0, 1, 3])
def test_a_closure_that_raises_in_lbfgs(evaluation: int) -> None:
    """What plain LBFGS does from there on, an error from its half-made state included."""
    start, target = torch.randn(40), torch.randn(40)
    ends: list[list[Any]] = []
    for wrapped in (False, True):
        param = torch.nn.Parameter(start.clone())
        opt: Any = torch.optim.LBFGS([param], line_search_fn="strong_wolfe", max_iter=4)
        if wrapped:
            opt = fusedaccum.FusedAccumOptimizer(opt)
        left = [evaluation]

        def closure(opt: Any = opt, param: Any = param, left: list[int] = left) -> Any:
            opt.zero_grad()
            loss = ((param - target) ** 4).sum()
            loss.backward()
            left[0] -= 1
            if left[0] == -1:
                raise ValueError("the closure's")
            return loss

        with pytest.raises(ValueError, match="the closure's"):
            opt.step(closure)
        opt.zero_grad()
        trace: list[Any] = []
        for _ in range(3):
            try:
                opt.step(closure)
            except TypeError as error:
                trace.append(str(error))
                opt.zero_grad()
                opt.state.clear()  # the way out, with either
            trace.append(param.detach().clone())
        ends.append(trace)
    assert not list(differences(*ends))
    assert not torch.equal(ends[1][-1], start)


class Signum(torch.optim.Optimizer):
    """What the rule in `tests.custom_rules` does, in plain torch."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                state["product"] = state.get("product", 1.0) * momentum
                buffer.mul_(momentum).add_(p.grad, alpha=1.0 - momentum)
                p.mul_(1.0 - lr * weight_decay)
                p.sub_(lr / (1.0 - state["product"]) * buffer / buffer.abs().clamp(min=0.01))


def rate_of(group: dict[str, Any]) -> Any:
    return group["lr"]


@pytest.fixture
def signum() -> Iterator[Kind]:
    fusedaccum.register_rule(
        Signum,
        "signum_soft",
        family="signum",
        kernels=custom_rules,
        hyper=lambda group: (rate_of(group), group["momentum"], group["weight_decay"]),
        n_hyper=3,
        states=("momentum_buffer",),
        memory={"product": 1.0},
        step_key=None,
    )
    yield Kind("signum", Signum, torch.bfloat16)
    fusedaccum.unregister_rules(Signum)


def test_a_rule_that_raises(signum: Kind) -> None:
    """Its function of the group is the user's own code."""
    program = [*signum.update(0), *signum.update(2), *signum.update(4)]
    scenario = Scenario("signum", signum, tuple(program), len(program) - 2 - 6)
    assert scenario.op == ("step",)

    def raising(k: int) -> Trap:
        functions = [(sys.modules[__name__], "rate_of")]
        return AtCall(k, lambda _: functions, ZeroDivisionError("the rule's"))

    assert sum(ends(survey(scenario, raising)).values()) == len(signum.groups(signum.params()))


# --- the harness itself must be able to fail ---


class Sabotage(AtCall):
    """An interruption that leaves a defect behind."""

    def __init__(self, defect: Callable[[Run], None]) -> None:
        super().__init__(0, lambda run: [(run.opt, "flush")], ValueError("the test's"))
        self.defect = defect

    @contextmanager
    def armed(self, run: Run) -> Iterator[None]:
        with super().armed(run):
            try:
                yield
            finally:
                self.defect(run)


def _half_of_a_gradient(run: Run) -> None:
    grad = run.params[1].grad
    assert grad is not None
    grad[:3].zero_()


def _another_parameter(run: Run) -> None:
    run.opt.param_groups[1]["params"][0] = torch.nn.Parameter(torch.ones(3, 3))


def _no_hooks(run: Run) -> None:
    run.opt._core.collector.attached.detach()


@pytest.mark.parametrize("defect", [_half_of_a_gradient, _another_parameter, _no_hooks])
def test_the_harness_sees_a_defect(defect: Callable[[Run], None]) -> None:
    scenario = scenario_of(COUNTED, "flush after 3")
    with pytest.raises(Broken):
        examine(scenario, lambda: Sabotage(defect))
    ended, where = examine(scenario, lambda: Sabotage(lambda _: None))
    assert ended == "nothing"
    assert where in ("flush called by Run.flush", "flush called by flush")  # Python 3.10


def test_the_harness_sees_an_exception_that_is_swallowed() -> None:
    scenario = scenario_of(COUNTED, "step after 3")

    class Swallowing(AtCall):
        @contextmanager
        def armed(self, run: Run) -> Iterator[None]:
            with super().armed(run):
                step = run.step

                def quiet() -> None:
                    with contextlib.suppress(ValueError):
                        step()

                run.step = quiet  # type: ignore[method-assign]
                yield

    trap = Swallowing(0, lambda run: [(run.opt, "step")], ValueError("the test's"))
    with pytest.raises(Broken, match="swallowed"):
        examine(scenario, lambda: trap)


def test_every_kind_of_operation_is_interrupted() -> None:
    operations = {(s.kind.name, s.op[0]) for s in SCENARIOS}
    assert {name for _, name in operations} >= {
        "backward", "step", "flush", "zero_grad", "load", "clip", "save",
    }  # fmt: skip
    assert {name for name, op in operations if op == "step"} == {
        kind.name for kind in vars(interrupted).values() if isinstance(kind, Kind)
    }
