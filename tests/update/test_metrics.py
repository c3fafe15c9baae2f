"""`opt.metrics()`: what each value is, when it is there, that it stays, and that nothing waits."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from fusedaccum.integrations import measured
from tests.cases import small_model
from tests.traps import no_host_reads

U = 2.0**-24
ALWAYS = {"updates", "skipped_steps"}
NORM = {"grad_norm"}
CLIP = {"grad_norm", "clip_coefficient"}
WINDOW = {"micro_batches", "weight_sum"}


class Plain(torch.optim.SGD):
    """A subclass has no fused rule."""


RULES: dict[str, Any] = {
    "fused": lambda params: torch.optim.SGD(params, lr=0.1),
    "wrapped": lambda params: Plain(params, lr=0.1),
}


def gradient_of(opt: FusedAccumOptimizer, param: Tensor, *grads: float, n: int = 1) -> None:
    """Micro-batches with these gradients (of the one element); every `n`-th ends a window."""
    for i, grad in enumerate(grads):
        (param * grad).sum().backward()
        if opt.gradient_accumulation_steps is not None or (i + 1) % n == 0:
            opt.step()
            opt.zero_grad()


def scalar() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(1))


def read(opt: FusedAccumOptimizer) -> dict[str, float]:
    return {name: float(value) for name, value in opt.metrics().items()}


@pytest.mark.parametrize("rule", RULES)
def test_a_counted_window_that_clips(rule: str) -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES[rule]([param]), 2, max_grad_norm=1.0)
    assert opt.metrics().keys() == ALWAYS
    gradient_of(opt, param, 3.0, 5.0)
    found = opt.metrics()
    assert found.keys() == ALWAYS | CLIP | WINDOW
    kinds = {k: v.dtype if isinstance(v, Tensor) else type(v) for k, v in found.items()}
    assert kinds == {
        "updates": int,
        "skipped_steps": torch.int64,
        "grad_norm": torch.float32,
        "clip_coefficient": torch.float32,
        "micro_batches": int,
        "weight_sum": float,
    }
    assert all(v.dim() == 0 for v in found.values() if isinstance(v, Tensor))
    assert read(opt) == {
        "updates": 1,
        "skipped_steps": 0,
        "grad_norm": 4.0,
        "clip_coefficient": pytest.approx(1 / (4 + 1e-6), rel=4 * U),
        "micro_batches": 2,
        "weight_sum": 2.0,
    }
    # It is what the gradient was multiplied with: SGD's step shows that.
    step = 0.1 * 4.0 * float(found["clip_coefficient"])
    assert float(param.detach()) == pytest.approx(1 - step, rel=4 * U)


@pytest.mark.parametrize("rule", RULES)
def test_a_small_gradient_is_not_clipped(rule: str) -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES[rule]([param]), 1, max_grad_norm=10.0)
    gradient_of(opt, param, 2.0)
    assert read(opt)["clip_coefficient"] == 1.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_skipped_window(rule: str, bad: float) -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES[rule]([param]), 1, max_grad_norm=1.0)
    gradient_of(opt, param, 3.0, bad)
    found = read(opt)
    assert (found["updates"], found["skipped_steps"]) == (2, 1)
    if math.isnan(bad):
        assert math.isnan(found["grad_norm"]) and math.isnan(found["clip_coefficient"])
    else:
        assert found["grad_norm"] == math.inf and found["clip_coefficient"] == 0.0
    gradient_of(opt, param, 0.5)
    assert read(opt)["grad_norm"] == 0.5 and read(opt)["skipped_steps"] == 1


def test_what_is_absent_where_nobody_needs_it() -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES["fused"]([param]), skip_nonfinite=False)
    gradient_of(opt, param, 3.0, 4.0, n=2)
    assert opt.metrics() == {"updates": 1, "skipped_steps": torch.tensor(0)}
    opt.skip_nonfinite = True
    gradient_of(opt, param, 3.0, 4.0, n=2)
    assert opt.metrics().keys() == ALWAYS | NORM and read(opt)["grad_norm"] == 7.0
    opt.max_grad_norm = 1.0
    gradient_of(opt, param, 1.0)
    assert opt.metrics().keys() == ALWAYS | CLIP


def test_a_loop_that_clips_by_our_method_and_then_does_not() -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES["fused"]([param]))
    (param * 4.0).sum().backward()
    opt.clip_grad_norm_(2.0)
    assert "clip_coefficient" not in opt.metrics()  # the update is still to come
    opt.step()
    assert read(opt)["clip_coefficient"] == pytest.approx(0.5, rel=1e-6)
    opt.zero_grad()
    gradient_of(opt, param, 4.0)
    assert "clip_coefficient" not in opt.metrics()


@pytest.mark.parametrize("owner", [2, None], ids=["wrapper", "loop"])
def test_weights(owner: int | None) -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES["fused"]([param]), owner)
    for weight, grad in ((3, 1.0), (5, 2.0)):
        with opt.micro_batch(weight=weight):
            (param * grad).sum().backward()
        if owner is not None or weight == 5:
            opt.step()
    found = read(opt)
    assert (found["micro_batches"], found["weight_sum"]) == (2, 8.0)
    assert found["grad_norm"] == pytest.approx(13 / 8, rel=4 * U)


def test_a_short_window_and_a_changed_number() -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES["fused"]([param]), 4)
    gradient_of(opt, param, 1.0, 2.0, 3.0)
    assert opt.metrics().keys() == ALWAYS
    opt.flush()
    assert (read(opt)["micro_batches"], read(opt)["grad_norm"]) == (3, 2.0)
    opt.flush()  # without a window it is no update
    assert read(opt)["updates"] == 1
    opt.flush()
    opt.gradient_accumulation_steps = 1
    gradient_of(opt, param, 1.0)
    assert (read(opt)["updates"], read(opt)["micro_batches"]) == (2, 1)


def test_a_snapshot_stays_and_nothing_is_changed() -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES["fused"]([param]), 1, max_grad_norm=1.0)
    gradient_of(opt, param, 3.0)
    first = opt.metrics()
    kept = {name: float(value) for name, value in first.items()}
    gradient_of(opt, param, math.nan, 7.0)
    assert {name: float(value) for name, value in first.items()} == kept
    now, state = read(opt), copy.deepcopy(opt.state_dict())
    for value in opt.metrics().values():
        if isinstance(value, Tensor):
            value.fill_(77)  # whoever writes a snapshot writes nothing of ours
    assert read(opt) == now and now["grad_norm"] == 7.0
    assert torch.equal(state["fusedaccum"]["accumulators"].get(0, torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("kind", ["linked", "handed-over", "stock"])
def test_a_grad_scaler(kind: str) -> None:
    param = scalar()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    options: dict[str, Any] = {
        "linked": {"grad_scaler": scaler, "gradient_accumulation_steps": 1},
        "handed-over": {"fused_unscale": True},
        "stock": {},
    }[kind]
    opt = FusedAccumOptimizer(RULES["fused"]([param]), max_grad_norm=10.0, **options)
    for grad in (3.0, math.inf):
        scaler.scale((param * grad).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if grad == 3.0:
            assert read(opt)["grad_norm"] == 3.0
    found = read(opt)
    if kind == "stock":  # GradScaler did not call step()
        assert (found["updates"], found["skipped_steps"]) == (1, 0) and found["grad_norm"] == 3.0
    else:
        assert (found["updates"], found["skipped_steps"]) == (2, 1)
        assert not math.isfinite(found["grad_norm"])
    assert ("loss_scale" in found) is (kind == "linked")
    if kind == "linked":
        assert found["loss_scale"] == 2.0 == scaler.get_scale()


def test_a_closure_optimizer_counts() -> None:
    param = scalar()
    opt = FusedAccumOptimizer(torch.optim.LBFGS([param], max_iter=2))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert read(opt) == {"updates": 1, "skipped_steps": 0}


def test_a_resumed_run_goes_on_counting() -> None:
    param = scalar()
    opt = FusedAccumOptimizer(RULES["fused"]([param]), 1)
    gradient_of(opt, param, 1.0, math.nan, 2.0)
    for other in (FusedAccumOptimizer(RULES["fused"]([scalar()]), 1), copy.deepcopy(opt)):
        other.load_state_dict(opt.state_dict())
        assert read(other) == {"updates": 3, "skipped_steps": 1}
    older = opt.state_dict()
    del older["fusedaccum"]["updates"]
    other.load_state_dict(older)
    assert read(other) == {"updates": 0, "skipped_steps": 1}


def test_a_model_that_moved_keeps_its_metrics() -> None:
    model = small_model(torch.float32)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 1, max_grad_norm=1.0)

    def train() -> None:
        model(torch.ones(2, 7, dtype=next(model.parameters()).dtype)).sum().backward()
        opt.step()
        opt.zero_grad()

    train()
    before = read(opt)
    model.to(torch.bfloat16)
    opt.zero_grad()
    assert read(opt) == before
    train()
    assert read(opt)["updates"] == 2


@pytest.mark.parametrize("scaler", ["no-scaler", "linked-scaler"])
def test_metrics_do_not_wait_for_the_device(scaler: str) -> None:
    """On the kernels' path nothing reads a device value on the host, metrics() included."""
    model = small_model(torch.bfloat16)
    linked = torch.amp.GradScaler("cpu") if scaler == "linked-scaler" else None
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters()),
        2,
        max_grad_norm=1.0,
        backend="triton",
        grad_scaler=linked,
    )
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    logged: list[dict[str, Tensor | float]] = [opt.metrics()]

    def window() -> None:
        for weight in (3, 5):
            with opt.micro_batch(weight=weight):
                loss = model(x).sum()
                (loss if linked is None else linked.scale(loss)).backward()
            if linked is None:
                opt.step()
            else:
                linked.step(opt)
                linked.update()
            opt.zero_grad()
        logged.append(opt.metrics())

    window()

    with no_host_reads():
        window()
        with pytest.raises(AssertionError, match="a host read"):
            float(opt.metrics()["grad_norm"])  # the negative control
    assert [found["updates"] for found in logged] == [0, 1, 2]
    assert logged[-1]["weight_sum"] == 8.0
    assert ("loss_scale" in logged[-1]) is (linked is not None)


def test_the_example() -> None:
    result = doctest.testmod(measured)
    assert result.attempted and not result.failed
