"""Accelerate with the wrapper: the same runs in fp32, better ones in bf16, exact checkpoints."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import frameworks as fw

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402

from fusedaccum import FusedAccumOptimizer  # noqa: E402
from tests.same_runs import are_equal  # noqa: E402
from tests.tolerances import equal_bits  # noqa: E402

RATE = 1e-2


@pytest.fixture(autouse=True)
def _own_state() -> Any:
    with fw.own_state():
        yield


def loader(data: list[fw.Batch]) -> Any:
    """Micro-batches in a fixed order."""
    dataset: Any = data
    return torch.utils.data.DataLoader(dataset, fw.MICRO_BATCH, collate_fn=fw.collate)


def adamw(model: Any, rate: float = RATE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)


def ours(model: Any, rate: float = RATE) -> torch.optim.Optimizer:
    return FusedAccumOptimizer(adamw(model, rate))


def nudged(model: Any, rate: float = RATE) -> torch.optim.Optimizer:
    return fw.Nudged(model.parameters(), lr=rate, weight_decay=0.1)


def faster(model: Any, rate: float = RATE) -> torch.optim.Optimizer:
    """Another learning rate by 1e-4 of itself: small, but no rounding."""
    return ours(model, rate * 1.0001)


class Loop:
    """The loop of Accelerate's documentation, with clipping to 1."""

    def __init__(
        self,
        make: Any,
        n: int,
        model: Any,
        rate: float = RATE,
        data: list[fw.Batch] | None = None,
        mixed: str = "no",
    ) -> None:
        self.accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=n, cpu=True, mixed_precision=mixed
        )
        optimizer = make(model, rate)
        schedule = LambdaLR(optimizer, lambda update: 1 - update / fw.UPDATES)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader(data or fw.sequences()), schedule
        )
        self.result = fw.Run(self.model, optimizer)
        self.micro_batches = 0
        self.pending: list[torch.Tensor] = []

    def run(self, stop: int) -> Loop:
        """Go on to `stop` micro-batches, counted over all epochs."""
        while self.micro_batches < stop:
            skip = self.micro_batches % len(self.loader)
            rest = self.accelerator.skip_first_batches(self.loader, skip)
            for batch in rest:
                self.micro_batch(batch)
                if self.micro_batches == stop:
                    break
        return self

    def micro_batch(self, batch: fw.Batch) -> None:
        accelerator, result = self.accelerator, self.result
        with accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self.pending.append(loss.detach())
            accelerator.backward(loss)
            rate = self.schedule.get_last_lr()[0]
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                result.norms.append(float(norm))
                result.losses.append(float(torch.stack(self.pending).mean()))
                result.rates.append(rate)
                self.pending.clear()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            assert not accelerator.optimizer_step_was_skipped
        self.micro_batches += 1


@functools.cache
def run(
    make: Any, n: int = 4, dtype: torch.dtype = torch.float32, rate: float = RATE, mixed: str = "no"
) -> fw.Run:
    """50 updates, kept for the tests that compare with them."""
    fw.reset()
    loop = Loop(make, n, fw.tiny_llama(dtype), rate, mixed=mixed)
    # Accelerate ends a window with the epoch: 39 micro-batches are 9 windows of 4 and one of 3.
    loop.run(fw.UPDATES if n == 1 else 5 * 39)
    assert len(loop.result.losses) == fw.UPDATES
    fw.reset()
    return loop.result


@pytest.mark.parametrize("n", [1, 4], ids="n{}".format)
def test_the_run_is_the_plain_optimizers(n: int) -> None:
    """Losses, norms, parameters; 50 updates, partial windows, clipping to 1."""
    mine, plain, off = run(ours, n), run(adamw, n), run(nudged, n)
    assert fw.differences(mine, plain, off) == []
    assert plain.losses[-1] < 0.8 * plain.losses[0]  # it learned, so there was something to differ
    assert max(plain.norms) > 1  # clipping did something
    assert float(mine.optimizer.state[next(mine.model.parameters())]["step"]) == fw.UPDATES
    assert len(fw.differences(run(faster, n), plain, off)) == 4


def test_accelerate_963_the_scheduler_steps_once_per_update() -> None:
    expected = [RATE * (1 - update / fw.UPDATES) for update in range(fw.UPDATES)]
    assert run(ours, 4).rates == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 4], ids="n{}".format)
def test_bf16_weights_stay_closer_to_fp32(n: int) -> None:
    """From the same weights at a rate where bf16 rounds updates away, as in fine-tuning."""
    exact = run(adamw, n, rate=1e-3)
    plain, mine = (run(make, n, torch.bfloat16, rate=1e-3) for make in (adamw, ours))
    assert fw.distance(mine.model, exact.model) < 0.5 * fw.distance(plain.model, exact.model)


def test_bf16_autocast() -> None:
    """`mixed_precision="bf16"`: fp32 weights, where the plain optimizer is as precise."""
    mine, plain, exact = run(ours, mixed="bf16"), run(adamw, mixed="bf16"), run(adamw)
    assert next(mine.model.parameters()).dtype == torch.float32
    # One fp32 rounding of a weight may turn its rounding to bf16, now and then.
    of_autocast = fw.farthest(plain.losses, exact.losses)
    assert fw.farthest(mine.losses, plain.losses) < of_autocast


# --- checkpoints ---


def resumed(make: Any, dtype: torch.dtype, stop: int, out: Path) -> tuple[fw.Run, fw.Run]:
    """24 micro-batches straight, and saved at `stop`, loaded into new objects, and on to 24."""
    straight = Loop(make, 4, fw.tiny_llama(dtype)).run(24).result
    fw.reset()
    Loop(make, 4, fw.tiny_llama(dtype)).run(stop).accelerator.save_state(str(out))
    fw.reset()
    loop = Loop(make, 4, fw.tiny_llama(dtype, seed=9))
    loop.accelerator.load_state(str(out))
    loop.micro_batches = stop
    return straight, loop.run(24).result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stop", [12, 14], ids=["between-windows", "mid-window"])
def test_transformers_22143_resume_loses_nothing(
    dtype: torch.dtype, stop: int, tmp_path: Path
) -> None:
    """save_state() and load_state(), also inside a window: bit for bit."""
    straight, again = resumed(ours, dtype, stop, tmp_path)
    assert are_equal(straight.model, again.model)
    assert again.rates == straight.rates[stop // 4 :]


def test_the_plain_optimizer_loses_the_open_window(tmp_path: Path) -> None:
    assert are_equal(*(r.model for r in resumed(adamw, torch.float32, 12, tmp_path / "closed")))
    fw.reset()
    assert not are_equal(*(r.model for r in resumed(adamw, torch.float32, 14, tmp_path / "open")))


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


def test_accelerate_4242_a_nan_window() -> None:
    """The weights survive; Accelerate does not learn of it, so the prepared scheduler steps."""
    loop = Loop(ours, 2, fw.tiny_llama())
    batches = list(loop.loader)
    opt = loop.result.optimizer
    loop.run(2)
    before = copy.deepcopy(loop.model)
    hook = loop.model.lm_head.register_forward_hook(lambda m, i, out: out * float("nan"))
    loop.micro_batch(batches[2])
    hook.remove()
    loop.micro_batch(batches[3])
    assert are_equal(before, loop.model)
    assert int(opt.skipped_steps) == 1
    assert not loop.accelerator.optimizer_step_was_skipped
    assert loop.schedule.get_last_lr() == pytest.approx([RATE * (1 - 2 / fw.UPDATES)])
    loop.run(6)
    assert not are_equal(before, loop.model)
    assert float(opt.state[next(loop.model.parameters())]["step"]) == 2


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
    data = fw.sequences(24)[12:]
    batches = list(loader(data))
    exact = [fw.window_gradients(window) for window in (batches[:4], batches[4:])]
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=rate), 4)
    schedule = LambdaLR(opt, lambda update: 0.5**update)
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared, feed = accelerator.prepare(model, opt, loader(data))
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


def test_accumulate_divides_a_partial_window_by_n() -> None:
    """What accumulate() does, with any optimizer: 2 micro-batches of 4 count half."""
    for make in (ours, adamw):
        fw.reset()
        data = fw.sequences(24)[12:]
        loop = Loop(make, 4, fw.tiny_llama(), 2.0**-30, data).run(6)
        mean_of_means = fw.window_gradients(list(loader(data))[4:], by_tokens=False)
        size = torch.cat([g.flatten() for g in mean_of_means]).norm()
        assert loop.result.norms[1] == pytest.approx(float(size) / 2, rel=fw.GRADIENT_RTOL)


def test_two_who_count_are_refused() -> None:
    """A wrapper of N in a loop that calls step() once per accumulate() window."""
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(adamw(model), 4)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    words = r"steps=4\) counts .* Accelerator\(gradient_accumulation_steps=2\).*steps=None"
    with pytest.raises(ValueError, match=words):
        accelerator.prepare(model, opt)
    fw.reset()
    accelerate.Accelerator(cpu=True).prepare(model, opt)  # the wrapper alone counts


def test_a_model_that_moved_after_it_was_wrapped() -> None:
    """prepare(model, optimizer) moves the model to a GPU; another dtype does the same to hooks."""
    results = []
    for dtype_first in (True, False):
        fw.reset()
        model = fw.tiny_llama(torch.bfloat16 if dtype_first else torch.float32)

        def make(model: Any, rate: float) -> Any:
            opt = ours(model, rate)
            model.to(torch.bfloat16)
            return opt

        results.append(Loop(make, 4, model).run(12).result)
    assert are_equal(results[0].model, results[1].model)
    assert "split master" in repr(results[1].optimizer)
