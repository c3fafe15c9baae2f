"""What only Accelerate has; what it shares is in test_framework_laws.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import frameworks as fw
from tests.frameworks import own_state as own_state

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402

from fusedaccum import FusedAccumOptimizer  # noqa: E402
from tests.adapters import RATE, Loop, Plan  # noqa: E402
from tests.same_runs import are_equal  # noqa: E402
from tests.tolerances import equal_bits  # noqa: E402


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)


# --- checkpoints ---


def loop(how: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Loop:
    fw.reset()
    return Loop(Plan(fw.tiny_llama(dtype, seed), fw.WRAPS[how]))


def resumed(how: str, dtype: torch.dtype, stop: int, out: Path) -> tuple[fw.Run, fw.Run]:
    """24 micro-batches straight, and saved at `stop`, loaded into new objects, and on to 24."""
    straight = loop(how, dtype).run(24).result
    loop(how, dtype).run(stop).accelerator.save_state(str(out))
    return straight, loop(how, dtype, seed=9).load(out, stop).run(24).result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers_22143_resume_in_mid_window_loses_nothing(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """save_state() and load_state() inside a window: bit for bit."""
    straight, again = resumed("ours", dtype, 14, tmp_path)
    assert are_equal(straight.model, again.model)
    assert again.rates == straight.rates[3:]


def test_the_plain_optimizer_loses_the_open_window(tmp_path: Path) -> None:
    assert are_equal(*(r.model for r in resumed("plain", torch.float32, 12, tmp_path / "closed")))
    assert not are_equal(*(r.model for r in resumed("plain", torch.float32, 14, tmp_path / "open")))


def test_pytorch_43706_prepare_keeps_fp32_states_and_masters() -> None:
    """prepare() loads the state dict that it has just saved, which rounds plain torch's states."""
    model = fw.tiny_llama(torch.bfloat16)
    opt = FusedAccumOptimizer(adamw(model))
    batch = fw.collate(fw.sequences(2))

    def update(model: Any, opt: Any) -> None:
        model(**batch).loss.backward()
        opt.step()
        opt.zero_grad()

    update(model, opt)
    both = copy.deepcopy({"model": model, "opt": opt})
    other, untouched = both["model"], both["opt"]
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, opt)
    states = [opt.state[p] for p in model.parameters()]
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in states)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert equal_bits(opt.state[p][name].cpu(), untouched.state[q][name].cpu())
    for _ in range(3):
        update(model, prepared)
        update(other, untouched)
    assert are_equal(model, other)
    assert any((s["exp_avg_sq"].bfloat16().float() != s["exp_avg_sq"]).any() for s in states)

    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([weight])
    plain.state[weight] |= {"exp_avg": torch.randn(8), "step": torch.tensor(1.0)}
    accelerator.prepare(plain)
    assert plain.state[weight]["exp_avg"].dtype == torch.bfloat16


# --- skipped updates ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_accelerate_4242_a_scaler_that_overflows(dtype: torch.dtype) -> None:
    """With a GradScaler Accelerate sees the skip, and the scheduler waits.

    Accelerator(mixed_precision="fp16") makes a scaler on a GPU only; this is the optimizer that it
    makes then, around a scaler for the CPU.
    """
    accelerate.Accelerator(cpu=True)
    model = fw.tiny_llama(dtype)
    opt = FusedAccumOptimizer(adamw(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    prepared = AcceleratedOptimizer(opt, scaler=scaler)
    schedule = accelerate.scheduler.AcceleratedScheduler(
        LambdaLR(opt, lambda update: 0.5**update), prepared
    )
    batch = fw.collate(fw.sequences(2))
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        before = copy.deepcopy(model)
        scaler.scale(model(**batch).loss * factor).backward()
        prepared.step()
        schedule.step()
        prepared.zero_grad()
        skipped.append(prepared.step_was_skipped)
        assert are_equal(before, model) is prepared.step_was_skipped
    assert skipped == [False, True, False]
    assert schedule.get_last_lr() == pytest.approx([RATE / 4])
    assert float(opt.state[next(model.parameters())]["step"]) == 2


# --- who counts the window ---


def test_the_wrapper_counts_what_accelerate_cannot() -> None:
    """Unequal token counts and a partial last window, exactly: the wrapper owns the window."""
    rate = 2.0**-30  # changes nothing, so both windows are of one model
    plan = Plan(None, fw.WRAPS["plain"], data=fw.sequences(24)[12:])
    batches = list(plan.loader())
    exact = [fw.window_gradients(window) for window in (batches[:4], batches[4:])]
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=rate), 4)
    schedule = LambdaLR(opt, lambda update: 0.5**update)
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared, feed = accelerator.prepare(model, opt, plan.loader())
    found: list[list[torch.Tensor]] = []

    def updated() -> None:
        found.append([p.grad.clone() for p in model.parameters()])
        schedule.step()

    for batch in feed:
        with opt.micro_batch(weight=fw.n_tokens(batch)):
            accelerator.backward(model(**batch).loss)
        prepared.step()
        if opt.window_closed:
            updated()
        prepared.zero_grad()
    opt.flush()
    updated()
    assert schedule.get_last_lr() == [rate / 4]
    for grads, mean, window in zip(found, exact, (batches[:4], batches[4:]), strict=True):
        # p.grad is the mean up to the factor that the step applies: W_ref over the sum of weights.
        weights = [fw.n_tokens(batch) for batch in window]
        assert len(set(weights)) > 1
        factor = 4 * weights[0] / sum(weights)
        assert fw.relative_error([g * factor for g in grads], mean) < fw.GRADIENT_RTOL
    size = torch.cat([g.flatten() for g in exact[1]]).norm()
    assert float(opt.grad_norm) == pytest.approx(float(size), rel=fw.GRADIENT_RTOL)


def test_a_loop_that_does_not_accumulate_leaves_the_count_to_the_wrapper() -> None:
    """No other count is refused: there is none."""
    model = fw.tiny_llama()
    accelerate.Accelerator(cpu=True).prepare(model, FusedAccumOptimizer(adamw(model), 4))
