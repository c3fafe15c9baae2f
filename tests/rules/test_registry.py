"""Rules of users: registered, they step on every backend as the class itself does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedaccum
from fusedaccum.rules.rule import Rule
from tests import custom_rules, tolerances
from tests.cases import Gradients, WithoutCompiler, forget_compiled

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "tests.custom_rules"


class Signum(torch.optim.Optimizer):
    """Softened sign of the momentum, warmed up; without momentum the sign of the gradient."""

    def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["product"] = 0, 1.0
                state["step"] += 1
                state["product"] *= momentum
                direction = p.grad.sign()
                if momentum:
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.mul_(momentum).add_(p.grad, alpha=1 - momentum)
                    direction = buffer / buffer.abs().clamp(min=0.01)
                rate = lr / (1 - state["product"])
                p.sub_(lr * group["weight_decay"] * p + rate * direction)


class Unregistered(Signum):
    """A subclass, which keeps its own step()."""


def register(name: str = "signum_soft", **changes: Any) -> Rule:
    options: dict[str, Any] = {
        "kernels": custom_rules,
        "family": "signum",
        "hyper": ("lr", "momentum", "weight_decay"),
        "states": ("momentum_buffer",),
        "memory": {"product": 1.0},
        "when": lambda optimizer, group: group["momentum"] > 0,
    }
    return fusedaccum.register_rule(Signum, name, **{**options, **changes})


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    with suppress(KeyError):
        fusedaccum.unregister_rules(Signum)
    forget_compiled()


def register_both() -> None:
    register()
    register("signum_none", states=(), when=lambda optimizer, group: group["momentum"] == 0)


def run(momentum: float, backend: str, is_fused: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    model = Gradients([torch.randn(n, generator=generator) for n in (5, 1030)])
    opt = fusedaccum.FusedAccumOptimizer(
        Signum(model.parameters(), momentum=momentum), 2, backend=backend
    )
    assert ("fused rule 'signum" in repr(opt)) is is_fused
    for _ in range(10):
        model.backward([torch.randn(n, generator=generator) for n in (5, 1030)])
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("backend", ["torch", "triton", "without-compiler"])
def test_a_registered_rule_steps_as_the_class_does(
    backend: str, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "without-compiler":
        WithoutCompiler(monkeypatch)
        backend = "torch"
    native = run(momentum, "torch", is_fused=False)
    register_both()
    fused = run(momentum, backend)
    for a, b in zip(native, fused, strict=True):
        # Five updates of at most lr / (1 - momentum) each; fp32 in another order of operations.
        moved = torch.full_like(a, 0.5).double()
        assert ((a.double() - b).abs() <= tolerances.update_bound(a.double(), moved, 2, 5)).all()


def test_another_momentum_differs() -> None:
    """The negative control of the test above."""
    register_both()
    a, b = run(0.9, "torch")[1], run(0.8, "torch")[1]
    moved = torch.full_like(a, 0.5).double()
    assert ((a.double() - b).abs() > tolerances.update_bound(a.double(), moved, 2, 5)).any()


def test_subclasses_and_unserved_groups_step_natively() -> None:
    register()  # with momentum only
    params = [torch.nn.Parameter(torch.ones(3))]
    for inner in (Unregistered(params), Signum(params, momentum=0.0)):
        opt = fusedaccum.FusedAccumOptimizer(inner)
        assert "native step" in repr(opt)
        opt.detach()
    assert "no registered rule of Signum serves these options" in repr(
        fusedaccum.FusedAccumOptimizer(Signum(params, momentum=0.0))
    )


def test_a_step_that_was_assigned_is_taken() -> None:
    """The fused rule of the class took its place, silently. What a scheduler assigns only looks."""
    param = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([param], lr=1.0)
    torch.optim.lr_scheduler.ConstantLR(inner, 1.0)
    opt = fusedaccum.FusedAccumOptimizer(inner)
    assert "fused rule 'sgd'" in repr(opt)
    before, calls = inner.step, []

    @functools.wraps(before)
    def step(closure: Any = None) -> Any:
        calls.append(1)
        param.grad.neg_()  # type: ignore[union-attr]
        return before(closure)

    inner.step = step  # type: ignore[method-assign]
    torch.optim.lr_scheduler.ConstantLR(inner, 1.0)
    assert "native step on fp32 gradients (somebody assigned the step() of this SGD)" in repr(opt)
    param.sum().backward()
    opt.step()
    assert calls and param.tolist() == [2.0] * 3
    inner.step = types.MethodType(torch.optim.SGD.step, inner)  # type: ignore[method-assign]
    assert "fused rule 'sgd'" in repr(opt)


def test_unregistering_gives_the_native_step_back() -> None:
    register()
    model = Gradients([torch.ones(3)])
    opt = fusedaccum.FusedAccumOptimizer(Signum(model.parameters()))
    assert "fused rule 'signum_soft'" in repr(opt)
    fusedaccum.unregister_rules(Signum)
    assert "native step" in repr(opt)
    with pytest.raises(KeyError):
        fusedaccum.unregister_rules(Signum)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"name": "nothing"}, LookupError, "no function 'nothing'; it has: signum_scalars"),
        ({"kernels": "no.such.module"}, LookupError, "has no source file"),
        ({"family": "other"}, LookupError, "no function 'other_scalars'"),
        ({"states": ()}, ValueError, "unpacks 1 states and returns 1, but 0 are named"),
        ({"states": "m"}, TypeError, "states must be a sequence of names.*got 'm'"),
        ({"states": None}, TypeError, "states must be a sequence of names.*got None"),
        ({"states": {"momentum_buffer": "x"}}, TypeError, "starts as a number.*got 'x'"),
        ({"hyper": "abc"}, TypeError, "hyper must be a sequence of names.*got 'abc'"),
        ({"hyper": (1, 2, 3)}, TypeError, "hyper must be a sequence of names"),
        ({"hyper": None}, TypeError, "hyper must be a sequence of names"),
        ({"memory": ["mu"]}, TypeError, "memory must map each name"),
        ({"memory": {"mu": None}}, TypeError, "starts as a number.*got None"),
        ({"kernels": None}, TypeError, "kernels must be a module or its name, got None"),
        ({"when": True}, TypeError, "when must be a function"),
        ({"hyper": ("lr",)}, ValueError, "cannot take 1 hyper-parameters"),
        (
            {"family": "indexed", "hyper": lambda group: (1.0,)},
            ValueError,
            "say with n_hyper",
        ),
        ({"step_key": "momentum_buffer"}, ValueError, "name 'momentum_buffer' twice"),
        ({"memory": {"step": 1.0}}, ValueError, "name 'step' twice"),
        ({"memory": {}}, ValueError, "cannot take 3 hyper-parameters and 0 numbers of memory"),
        (
            {"name": "loops", "family": "loops", "hyper": ("lr",), "states": (), "memory": {}},
            ValueError,
            "cannot be translated",
        ),
        (
            {"name": "swapped", "family": "swapped", "hyper": ("lr",), "states": (), "memory": {}},
            ValueError,
            "'grad, param, states, scalars' cannot be translated",
        ),
        (
            {"name": "named", "family": "named", "hyper": ("lr",), "states": (), "memory": {}},
            ValueError,
            "propagate_nan=tl.PropagateNan.ALL.* cannot be translated",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        register(**changes)
    with pytest.raises(KeyError):
        fusedaccum.unregister_rules(Signum)


@pytest.mark.parametrize("mode", ["split", "none", "stochastic"])
@pytest.mark.parametrize("backend", ["torch", "triton", "without-compiler"])
def test_a_rule_may_use_any_names(
    backend: str, mode: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """`i` was the loop's in C, so that its number was the element's index."""
    if backend == "without-compiler":
        WithoutCompiler(monkeypatch)
    register("hidden", family="hidden", hyper=("lr",), states=("a", "b"), memory={}, when=None)
    name, is_stochastic = "triton" if backend == "triton" else "torch", mode == "stochastic"
    ends = []
    for rule in (True, False):
        model = Gradients([torch.ones(300, dtype=torch.bfloat16)])
        opt = fusedaccum.FusedAccumOptimizer(
            Signum(model.parameters(), 0.25)
            if rule
            else torch.optim.SGD(model.parameters(), 0.25, 0.5),
            backend=name,
            master_weights="none" if is_stochastic else mode,
            stochastic_rounding=is_stochastic,
        )
        for i in range(3):
            model.backward([torch.linspace(-1, 1, 300) + i])
            opt.step()
            opt.zero_grad()
        ends.append(model.params[0].detach())
        if rule:
            assert opt.state[model.params[0]]["b"].tolist() == [12.0] * 300
    torch.testing.assert_close(*ends, rtol=2**-7 if is_stochastic else 2**-8, atol=1e-3)
    assert "falls back" not in str([str(w.message) for w in recwarn] * (backend == "torch"))


def test_a_key_that_no_param_group_has_is_named() -> None:
    register(hyper=("lr", "momentum", "decay"))
    model = Gradients([torch.ones(3)])
    opt = fusedaccum.FusedAccumOptimizer(Signum(model.parameters(), momentum=0.9))
    model.backward([torch.ones(3)])
    with pytest.raises(KeyError, match="rule signum_soft: hyper names 'decay', no key of a group"):
        opt.step()
    opt.param_groups[0]["decay"] = 0.0
    opt.step()
    assert not torch.equal(model.params[0], torch.ones(3))


def test_a_class_has_one_family_and_each_rule_once() -> None:
    register()
    with pytest.raises(ValueError, match="'signum_soft' of family 'signum' already"):
        register()
    with pytest.raises(ValueError, match="names of their own and the same family"):
        register("signum_none", states=(), step_key=None)
    register("signum_none", states=(), when=lambda optimizer, group: True)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.nn.Linear, "AdamW"])
def test_classes_that_are_served_or_no_optimizers_are_refused(kind: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"already|must be a subclass"):
        fusedaccum.register_rule(kind, "signum_soft", kernels=KERNELS, hyper=())


def test_a_rule_of_the_package_stays() -> None:
    with pytest.raises(KeyError):
        fusedaccum.unregister_rules(torch.optim.AdamW)


def test_a_function_that_reads_hyper_parameters_is_counted_by_the_text() -> None:
    register(hyper=lambda group: (group["lr"], group["momentum"], group["weight_decay"]))
    by_function = run(0.9, "torch")
    fusedaccum.unregister_rules(Signum)
    register()
    assert all(
        tolerances.equal_bits(a, b) for a, b in zip(by_function, run(0.9, "torch"), strict=True)
    )
    fusedaccum.unregister_rules(Signum)
    register(hyper=lambda group: (group["lr"],))
    with pytest.raises(ValueError, match="hyper returned 1 numbers, and 3 are taken"):
        run(0.9, "torch")


def test_the_example_checks_itself() -> None:
    done = subprocess.run(
        [sys.executable, "examples/custom_rule.py"],
        cwd=ROOT,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fused rule 'ademamix'" in done.stdout


@pytest.mark.parametrize("mode", ["split", "fp32"])
def test_masters_outlive_the_end_of_the_fused_rule(mode: str) -> None:
    """An option that the rule does not serve takes the class's step() on the same fp32 numbers."""
    register()
    models = [Gradients([torch.ones(40, dtype=d)]) for d in (torch.bfloat16, torch.float32)]
    opts = []
    for model in models:
        opts.append(
            fusedaccum.FusedAccumOptimizer(
                Signum(model.parameters(), lr=1e-4), 1, master_weights=mode
            )
        )
    for momentum in (0.9, 0.9, 0.9, 0.0, 0.0):
        for model, opt in zip(models, opts, strict=True):
            opt.param_groups[0]["momentum"] = momentum
            model.backward([torch.linspace(-1, 1, 40).bfloat16()])
            opt.step()
            opt.zero_grad()
    assert not opts[0]._core.updater.is_fused
    master = opts[0].state_dict()["state"][0]["master_param"]
    assert tolerances.equal_bits(master, models[1].params[0].detach())
    assert not torch.equal(master, models[0].params[0].float())


def test_the_package_trains_from_a_zip_file(tmp_path: Path) -> None:
    """Rules are read as text, which lies in no file of its own there."""
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for folder, inside in (("fusedaccum", "fusedaccum"), ("kernels", "fusedaccum/kernels")):
            for path in sorted((ROOT / folder).rglob("*.py")):
                archive.write(path, f"{inside}/{path.relative_to(ROOT / folder)}")
    program = """
import torch, fusedaccum
param = torch.nn.Parameter(torch.ones(3))
opt = fusedaccum.FusedAccumOptimizer(torch.optim.AdamW([param], lr=0.5))
(2 * param.sum()).backward()
opt.step()
print(fusedaccum.__file__, param.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "package.zip")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, _, values = done.stdout.partition(" ")
    assert "package.zip" in where
    assert json.loads(values) == pytest.approx([0.495] * 3, rel=1e-5)


def test_the_built_in_rules_can_be_reloaded() -> None:
    program = """
import importlib, torch, fusedaccum
from fusedaccum.rules import builtin, registry
names = set(builtin.RULES)
importlib.reload(builtin)
assert set(builtin.RULES) == names
params = [torch.nn.Parameter(torch.ones(3))]
assert registry.serve(torch.optim.AdamW(params)), "no rule"
try:
    registry.unregister_rules(torch.optim.AdamW)
except KeyError:
    print("reloaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "reloaded\n", done.stderr
