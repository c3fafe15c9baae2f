"""Parameters that somebody writes from outside, in real loops, on every backend.

A parameter written from outside shows exactly what was written. Its precise value is then that
number (fp32 masters), or within half a bf16 step of it (split masters, which keep their remainder).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from fusedaccum.backends import reference
from tests.cases import Gradients, WithoutCompiler, forget_compiled, small_model
from tests.tolerances import equal_bits

MODES = ["split", "fp32"]
KINDS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "plain-sgd": (torch.optim.SGD, {"lr": 1e-3}),
}
Write = Callable[[Tensor], Any]
Params = list[torch.nn.Parameter]


class Native(torch.optim.SGD):
    """A subclass keeps its own step(): the native path."""


@pytest.fixture(params=["triton", "compiled", "aten", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """A backend's name and its device."""
    if request.param == "aten":
        WithoutCompiler(monkeypatch)
    on_gpu = request.param == "gpu"
    yield "triton" if request.param in ("triton", "gpu") else "torch", "cuda" if on_gpu else "cpu"
    forget_compiled()


class Run:
    """A model of given gradients and its wrapper.

    Args:
        place: see the fixture.
        mode: `master_weights`, or "true": fp32 parameters.
        kind: of `KINDS`.
    """

    def __init__(self, place: tuple[str, str], mode: str, kind: str = "adamw") -> None:
        name, self.device = place
        generator = torch.Generator().manual_seed(3)
        start = [torch.randn(n, generator=generator).bfloat16() for n in (1030, 7)]
        if mode == "true":
            start = [s.float() for s in start]
        self.model = Gradients([s.to(self.device) for s in start])
        self.params: Params = list(self.model.params)
        optimizer, options = KINDS[kind]
        inner = optimizer(self.params, **options)  # type: ignore[operator]
        masters = "none" if mode == "true" else mode
        self.opt = FusedAccumOptimizer(inner, 1, master_weights=masters, backend=name)
        self.steps = 0

    def update(self, n: int = 1) -> None:
        """Updates with gradients that the count of updates chooses."""
        for _ in range(n):
            self.steps += 1
            generator = torch.Generator().manual_seed(self.steps)
            grads = [torch.randn(p.shape, generator=generator) for p in self.params]
            self.model.backward([g.bfloat16().to(self.device) for g in grads])
            self.opt.step()
            self.opt.zero_grad()

    def masters(self) -> list[Tensor]:
        """Precise values, as a checkpoint would hold them."""
        state = self.opt.state_dict()["state"]
        return [state[i].get("master_param", p.detach()) for i, p in enumerate(self.params)]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert equal_bits(a, b)


def assert_shows(run: Run) -> None:
    """Each master is finite where the parameter is, and within half a bf16 step of it."""
    for master, param in zip(run.masters(), run.params, strict=True):
        numbers = ~param.isnan()
        assert torch.equal(master.isnan(), ~numbers)
        high, _ = reference.split_master(master[numbers])
        rounded = master[numbers].bfloat16()
        shown = param.detach()[numbers]
        assert ((high == shown) | (rounded == shown)).all()


def mask_of(param: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(param.numel())
    return (torch.rand(param.shape, generator=generator) < 0.5).to(param)


# What pruning and clipping loops do to a parameter after every update. Each does the same to an
# fp32 number and to its rounded value, unless it makes it zero.
WRITES: dict[str, Write] = {
    "zero": lambda p: p.zero_(),
    "prune": lambda p: p.mul_(mask_of(p)),
    "clamp-min-0": lambda p: p.clamp_(min=0),
    "no-op-clamp": lambda p: p.clamp_(-50, 50),
    "slice": lambda p: p[:3].zero_(),
}


@pytest.mark.parametrize("through", ["data", "no_grad"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_after_every_update_is_that_of_fp32_parameters(
    place: tuple[str, str], write: str, kind: str, mode: str, through: str
) -> None:
    """What an update makes of it is what true fp32 parameters become, to the bit.

    A zeroed element's remainder is less than 1e-40, which any update rounds away.
    """
    ours, true = Run(place, mode, kind), Run(place, "true", kind)
    for _ in range(5):
        for run in (ours, true):
            for param in run.params:
                with torch.no_grad():
                    WRITES[write](param.data if through == "data" else param)
        if ours.steps:  # the first update makes the masters
            assert_shows(ours)
        ours.update()
        true.update()
        assert_same(ours.masters(), [p.detach() for p in true.params])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, Native])
def test_no_op_clamps_do_not_freeze_the_parameter(
    place: tuple[str, str], kind: type[torch.optim.Optimizer], mode: str
) -> None:
    """Updates of a fortieth of a bf16 step: every one counts, whatever moves the version."""
    backend, device = place
    models = [Gradients([torch.ones(8, dtype=d, device=device)]) for d in (torch.bfloat16, None)]
    opts = [
        FusedAccumOptimizer(kind(m.parameters(), lr=1e-4), 1, master_weights=how, backend=backend)  # type: ignore[call-arg]
        for m, how in zip(models, (mode, "none"), strict=True)
    ]
    n = 45 if backend == "triton" else 130  # one bf16 step, or three: the interpreter is slow
    for _ in range(n):
        for model, opt in zip(models, opts, strict=True):
            model.backward([torch.ones(8, device=device)])
            opt.step()
            opt.zero_grad()
            with torch.no_grad():
                model.params[0].clamp_(-5, 5)
    master = opts[0].state_dict()["state"][0]["master_param"]
    assert equal_bits(master, models[1].params[0].detach())
    torch.testing.assert_close(master, torch.full_like(master, 1 - n * 1e-4), rtol=1e-4, atol=0)
    assert torch.equal(models[0].params[0], master.bfloat16())


@pytest.mark.parametrize("through", ["data", "no_grad"])
@pytest.mark.parametrize("mode", MODES)
def test_an_ema_swap_and_restore_changes_no_bit(
    place: tuple[str, str], mode: str, through: str
) -> None:
    """Also with a checkpoint of the swapped weights saved meanwhile."""
    swapped, straight = Run(place, mode), Run(place, mode)
    ema = [p.detach().clone() for p in swapped.params]

    def write(values: list[Tensor]) -> None:
        for param, value in zip(swapped.params, values, strict=True):
            with torch.no_grad():
                (param.data if through == "data" else param).copy_(value)

    for _ in range(6):
        swapped.update()
        straight.update()
        for average, param in zip(ema, swapped.params, strict=True):
            average.lerp_(param.detach(), 0.3)
        kept = [p.detach().clone() for p in swapped.params]
        write(ema)
        assert_shows(swapped)
        copy.deepcopy(swapped.opt.state_dict())
        write(kept)
        assert_same(swapped.masters(), straight.masters())


@pytest.mark.parametrize("mode", MODES)
def test_inf_and_nan_stay_where_they_are_written_and_finite_values_end_them(
    place: tuple[str, str], mode: str
) -> None:
    """By plain SGD: a NaN parameter with weight decay is a NaN in the states of other rules."""
    ours, straight = Run(place, mode, "plain-sgd"), Run(place, mode, "plain-sgd")
    for run in (ours, straight):
        run.update(3)
    bad = [float("inf"), -float("inf"), float("nan")]
    first, second = ours.params
    first.data[:900] = torch.tensor(bad).repeat(300).to(first)
    assert_shows(ours)
    for run in (ours, straight):
        run.update()
    assert not first[:900].isfinite().any()
    assert_shows(ours)
    first.data[:900] = 0.375
    assert_shows(ours)
    for run in (ours, straight):
        run.update()
    master, other = ours.masters()
    assert master.isfinite().all()
    # Half a bf16 step of 0.375, and less than 0.01 for one update.
    assert ((master[:900] - 0.375).abs() <= 2.0**-10 + 0.01).all()
    assert equal_bits(master[900:], straight.masters()[0][900:])
    assert equal_bits(other, straight.masters()[1])
    assert second.isfinite().all()


@pytest.mark.parametrize("through", ["data", "no_grad"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, Native])
def test_what_was_not_written_keeps_its_master(
    place: tuple[str, str], kind: type[torch.optim.Optimizer], mode: str, through: str
) -> None:
    backend, device = place
    model = Gradients([torch.full((6,), 1.25, device=device).bfloat16()])
    (param,) = model.params
    inner = kind([param], lr=1e-4)  # type: ignore[call-arg]
    opt = FusedAccumOptimizer(inner, 1, master_weights=mode, backend=backend)
    for _ in range(3):
        model.backward([torch.ones(6)])
        opt.step()
    kept = opt.state_dict()["state"][0]["master_param"]
    (param.data if through == "data" else param.detach())[:3] = 7.0
    opt.zero_grad()
    model.backward([torch.zeros(6)])
    opt.step()
    assert param[:3].tolist() == [7.0] * 3
    master = opt.state_dict()["state"][0]["master_param"]
    assert equal_bits(master[3:], kept[3:])
    if mode == "fp32" or kind is Native:
        assert torch.equal(master[:3], torch.full_like(master[:3], 7.0))
    else:
        assert ((master[:3] - 7.0).abs() <= 2.0**-6).all()  # half of bf16's step from 4 to 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", ["load_state_dict", *WRITES])
def test_a_checkpoint_after_a_write_holds_what_the_next_update_starts_from(
    place: tuple[str, str], write: str, mode: str
) -> None:
    ours, other = Run(place, mode), Run(place, mode)
    ours.update(3)
    for param in other.params:
        param.data.mul_(1.7)
    if write == "load_state_dict":
        ours.model.load_state_dict(other.model.state_dict())
        assert_same([p.detach() for p in ours.params], [p.detach() for p in other.params])
    else:
        for param in ours.params:
            WRITES[write](param.data)
    assert_shows(ours)
    if mode == "fp32" and write == "load_state_dict":
        assert_same(ours.masters(), [p.detach().float() for p in other.params])
    resumed = Run(place, mode)
    resumed.opt.load_state_dict(copy.deepcopy(ours.opt.state_dict()))
    resumed.model.load_state_dict(ours.model.state_dict())
    assert_same(resumed.masters(), ours.masters())
    resumed.steps = ours.steps
    for run in (ours, resumed):
        run.update(2)
    assert_same(resumed.masters(), ours.masters())


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_without_masters_leaves_nothing_of_the_last_run(
    place: tuple[str, str], mode: str
) -> None:
    """Plain torch's, or one from before the first update: a used wrapper is as a new one."""
    used, new = Run(place, mode), Run(place, mode)
    weights, state = new.model.state_dict(), new.opt.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    assert not state["state"]
    used.update(3)
    used.opt.load_state_dict(state)
    used.model.load_state_dict(weights)
    used.steps = 0
    for run in (used, new):
        run.update(2)
    assert_same(used.masters(), new.masters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Native])
def test_saving_between_loading_and_the_first_update_changes_nothing(kind: Any, mode: str) -> None:
    """state_dict() only looks: the optimizer may be loaded, and saved, before the weights are."""
    model = small_model(torch.bfloat16)
    first = FusedAccumOptimizer(kind(model.parameters(), lr=1e-3), 1, master_weights=mode)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 7, generator=generator).bfloat16() for _ in range(4)]

    def update(model: torch.nn.Module, opt: Any, x: Tensor) -> None:
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()

    for x in data[:3]:
        update(model, first, x)
    state = copy.deepcopy(first.state_dict())
    second = small_model(torch.bfloat16, seed=9)
    opt = FusedAccumOptimizer(kind(second.parameters(), lr=1e-3), 1, master_weights=mode)
    opt.load_state_dict(state)
    opt.state_dict()
    second.load_state_dict(model.state_dict())
    opt.state_dict()
    update(model, first, data[3])
    update(second, opt, data[3])
    mine, theirs = (o.state_dict()["state"] for o in (opt, first))
    for index, entry in theirs.items():
        assert equal_bits(mine[index]["master_param"], entry["master_param"])
