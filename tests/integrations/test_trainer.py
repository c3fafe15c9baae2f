"""transformers' Trainer with the wrapper: the same runs in fp32, better ones in bf16."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import frameworks as fw
from tests.frameworks import finished

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from fusedaccum import FusedAccumOptimizer  # noqa: E402
from tests.tolerances import equal_bits  # noqa: E402

RATE = 1e-2
UNUSED = tempfile.TemporaryDirectory()  # the Trainer makes its folder, saved to or not


@pytest.fixture(autouse=True)
def _own_state() -> Any:
    with fw.own_state():
        yield


def arguments(out: Path | None = None, **changes: Any) -> Any:
    """Training arguments of a short run on the CPU, with everything logged."""
    settings = fw.trainer_settings(out or UNUSED.name) | {"learning_rate": RATE} | changes
    return transformers.TrainingArguments(**settings)


def trainer(
    model: Any, wrap: fw.Wrap | None = None, out: Path | None = None, **changes: Any
) -> Any:
    """A Trainer; `wrap` gets the optimizer that the Trainer itself would use."""
    kwargs = {k: changes.pop(k) for k in ("eval_dataset", "callbacks") if k in changes}
    data = changes.pop("data", None) or fw.sequences()
    made = transformers.Trainer(model, arguments(out, **changes), train_dataset=data, **kwargs)
    if wrap is not None:
        made.optimizer = wrap(made.create_optimizer())
    return made


@functools.cache
def run(
    how: str,
    n: int = 4,
    dtype: torch.dtype = torch.float32,
    rate: float = RATE,
    autocast: bool = False,
) -> fw.Run:
    """50 updates, kept for the tests that compare with them."""
    model = fw.tiny_llama(dtype)
    settings: dict[str, Any] = {"gradient_accumulation_steps": n, "learning_rate": rate}
    made = trainer(model, fw.WRAPS[how], bf16=autocast, **settings)
    result = finished(made)
    assert made.state.global_step == fw.UPDATES == len(result.losses)
    fw.reset()
    return result


@pytest.mark.parametrize("n", [1, 4], ids="n{}".format)
def test_the_run_is_the_plain_optimizers(n: int) -> None:
    """Losses, logged norms, parameters; 50 updates, 5 partial windows, clipping to 1."""
    ours, plain, nudged = run("ours", n), run("plain", n), run("nudged", n)
    assert fw.differences(ours, plain, nudged) == []
    assert plain.losses[-1] < 0.8 * plain.losses[0]  # it learned, so there was something to differ
    assert max(plain.norms) > 1  # clipping did something
    # Once per update and not per micro-batch: 50 steps down from the first rate to the last.
    assert ours.rates == pytest.approx([RATE * (1 - i / 50) for i in range(50)])
    assert float(ours.optimizer.state[next(ours.model.parameters())]["step"]) == fw.UPDATES
    assert len(fw.differences(run("faster", n), plain, nudged)) == 4


@pytest.mark.parametrize("n", [1, 4], ids="n{}".format)
def test_bf16_weights_stay_closer_to_fp32(n: int) -> None:
    """From the same weights at a rate where bf16 rounds updates away, as in fine-tuning.

    Forward and backward are bf16 in both, so a distance remains, which grows with the rate.
    """
    exact = run("plain", n, rate=1e-3)
    plain = run("plain", n, torch.bfloat16, rate=1e-3)
    ours = run("ours", n, torch.bfloat16, rate=1e-3)
    assert next(ours.model.parameters()).dtype == torch.bfloat16
    assert "split master" in repr(ours.optimizer)
    assert fw.distance(ours.model, exact.model) < 0.5 * fw.distance(plain.model, exact.model)


def test_bf16_autocast() -> None:
    """`bf16=True`: fp32 weights and gradients, where the plain optimizer is as precise."""
    ours, plain, exact = run("ours", autocast=True), run("plain", autocast=True), run("plain")
    assert ours.model.dtype == torch.float32
    # One fp32 rounding of a weight may turn its rounding to bf16, now and then: the runs are not as
    # close as in fp32, but closer than autocast is to fp32.
    of_autocast = fw.farthest(plain.losses, exact.losses)
    assert fw.farthest(ours.losses, plain.losses) < of_autocast


def test_fp16_weights_without_a_scaler() -> None:
    """Plain AdamW's eps of 1e-8 is zero in fp16, and many second moments are: NaN.

    On a CPU the Trainer's fp16=True gives neither autocast nor GradScaler (a scaler around the
    wrapper: test_accelerate.py and test_scaler.py).
    """
    ours, plain, exact = (
        run("ours", dtype=torch.float16),
        run("plain", dtype=torch.float16),
        run("plain"),
    )
    assert fw.farthest(ours.losses, exact.losses) < 2**-8 * exact.losses[0]  # a few fp16 roundings
    assert not torch.tensor(plain.norms).isfinite().all()


class FusedAdamW(FusedAccumOptimizer):
    """As the README has it, for `optimizer_cls_and_kwargs`."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(torch.optim.AdamW(params, **options))


def test_three_ways_to_hand_it_over() -> None:
    """`trainer.optimizer`, `optimizers=`, `optimizer_cls_and_kwargs`: one run, to the rounding of
    the forward, which is another where the model's memory lies elsewhere (`model_init`)."""
    args = arguments(max_steps=8)
    options: dict[str, Any] = {"train_dataset": fw.sequences(), "args": args}
    first = finished(trainer(fw.tiny_llama(), FusedAccumOptimizer, max_steps=8))
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0))
    scheduler = transformers.get_linear_schedule_with_warmup(opt, 0, 8)
    second = finished(transformers.Trainer(model, optimizers=(opt, scheduler), **options))
    kind = (FusedAdamW, {"lr": RATE})
    third = finished(
        transformers.Trainer(fw.tiny_llama(), optimizer_cls_and_kwargs=kind, **options)
    )
    fourth = finished(
        transformers.Trainer(
            model_init=lambda: fw.tiny_llama(), optimizer_cls_and_kwargs=kind, **options
        )
    )
    assert len(third.optimizer.param_groups) == 2  # the Trainer's: weights decay, norms do not
    nudged = finished(trainer(fw.tiny_llama(), fw.nudge, max_steps=8))
    for other in (second, third, fourth):
        assert fw.differences(other, first, nudged) == []


class MeanLoss(torch.nn.Module):
    """A model whose loss knows nothing of `num_items_in_batch`: the Trainer divides by N."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, labels: Any) -> Any:
        return {"loss": self.model(input_ids=input_ids, labels=labels).loss}


@pytest.mark.parametrize("windows", [1, 2], ids=["full", "full-and-partial"])
@pytest.mark.parametrize("by_tokens", [True, False], ids=["token-mean", "mean-of-means"])
def test_transformers_34191_37766_39659_what_a_window_is_divided_by(
    by_tokens: bool, windows: int
) -> None:
    """Unequal token counts, and a partial last window of 2: SGD moves by the exact mean gradient.

    A learning rate of 2**-30 leaves the weights where they are, so both windows are of one model.
    """
    data = fw.sequences(24)[12:]
    batches = [fw.collate(data[i : i + 2]) for i in range(0, 12, 2)]
    seen: list[Any] = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append([p.grad.clone() for p in model.parameters()])

    def sgd(optimizer: Any) -> Any:
        return FusedAccumOptimizer(torch.optim.SGD(optimizer.param_groups, lr=2.0**-30))

    model = fw.tiny_llama()
    made = trainer(
        model if by_tokens else MeanLoss(model),
        sgd,
        data=data,
        callbacks=[Watch],
        max_steps=-1,
        num_train_epochs=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        learning_rate=2.0**-30,
    )
    made.train()
    assert made.state.global_step == len(seen) == 2
    window = batches[4 * (windows - 1) :][:4]
    assert len({fw.n_tokens(batch) for batch in window}) > 1
    exact, other = (fw.window_gradients(window, flag) for flag in (by_tokens, not by_tokens))
    assert fw.relative_error(seen[windows - 1], exact) < fw.GRADIENT_RTOL
    assert fw.relative_error(seen[windows - 1], other) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers_22143_resume_loses_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """With evaluation in between; the Trainer saves between windows. Masters come back too."""
    settings: dict[str, Any] = {
        "max_steps": 12,
        "eval_dataset": fw.sequences(8),
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 7,
    }
    straight = trainer(fw.tiny_llama(dtype), FusedAccumOptimizer, tmp_path, **settings)
    whole = finished(straight)
    evaluations = [r["eval_loss"] for r in straight.state.log_history if "eval_loss" in r]
    checkpoint = tmp_path / "checkpoint-7"

    resumed = trainer(fw.tiny_llama(dtype, seed=9), FusedAccumOptimizer, tmp_path, **settings)
    half = finished(resumed, resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 12
    assert half.losses == whole.losses and half.rates == whole.rates
    assert [r["eval_loss"] for r in resumed.state.log_history if "eval_loss" in r] == evaluations
    for p, q in zip(whole.model.parameters(), half.model.parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())

    os.remove(checkpoint / "optimizer.pt")  # moments and masters
    without = trainer(fw.tiny_llama(dtype), FusedAccumOptimizer, tmp_path, **settings)
    assert finished(without, resume_from_checkpoint=str(checkpoint)).losses != whole.losses


def test_load_best_model_at_end(tmp_path: Path) -> None:
    """The best weights come back, and training goes on from them, not from the masters."""
    made = trainer(
        fw.tiny_llama(torch.bfloat16),
        FusedAccumOptimizer,
        tmp_path,
        max_steps=8,
        eval_dataset=fw.sequences(8),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, which is the first: later weights must be undone
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    stored = transformers.LlamaForCausalLM.from_pretrained(best)
    assert stored.dtype == torch.bfloat16
    for p, q in zip(made.model.parameters(), stored.parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())
    made.args.learning_rate = 2.0**-30
    for group in made.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 2.0**-30
    made.args.load_best_model_at_end = False
    made.train()  # at a rate that changes nothing
    assert fw.distance(made.model, stored) == 0


@pytest.mark.parametrize("n", [1, 4], ids="n{}".format)
def test_a_wrapper_that_counts_too_is_refused(n: int) -> None:
    """It would update at every fourth step() of the Trainer, which clips and counts each."""
    made = trainer(
        fw.tiny_llama(), lambda o: FusedAccumOptimizer(o, 4), gradient_accumulation_steps=n
    )
    with pytest.raises(ValueError, match=r"steps=4\) counts .* the Trainer.*steps=None"):
        made.train()
    fw.reset()
    one = trainer(
        fw.tiny_llama(), lambda o: FusedAccumOptimizer(o, 1), gradient_accumulation_steps=n
    )
    assert finished(one).losses == run("ours", n).losses  # a window of one step() is no other count


def test_a_model_that_moved_after_it_was_wrapped() -> None:
    """On a GPU the Trainer's constructor moves the model; another dtype does the same to hooks."""
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0))
    model.to(torch.bfloat16)
    data = fw.sequences()
    args = arguments(max_steps=8)
    moved = finished(transformers.Trainer(model, args, train_dataset=data, optimizers=(opt, None)))
    direct = trainer(fw.tiny_llama(torch.bfloat16), FusedAccumOptimizer, max_steps=8)
    assert moved.losses == finished(direct).losses


def test_out_of_memory_with_auto_find_batch_size() -> None:
    """The first attempt dies in a backward; the next ones, with smaller batches, do not."""
    model = fw.tiny_llama()
    calls = []

    def fails_at_first(grad: Any) -> None:
        calls.append(grad)
        if len(calls) == 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def watch(module: Any, args: Any, output: Any) -> None:
        output.register_hook(fails_at_first)

    watching = model.model.layers[0].mlp.register_forward_hook(watch)
    settings: dict[str, Any] = {"max_steps": 6, "auto_find_batch_size": True}
    made = trainer(model, FusedAccumOptimizer, per_device_train_batch_size=4, **settings)
    recovered = finished(made)
    watching.remove()
    assert len(calls) > 6 and made._train_batch_size == 3
    # One update was made before the error: the run goes on from there with fresh data.
    assert made.state.global_step == 6 == len(recovered.losses)
    assert float(made.optimizer.state[next(model.parameters())]["step"]) == 7
    assert torch.tensor(recovered.losses).isfinite().all()


class Poisoned(torch.nn.Module):
    """A model whose fourth micro-batch has a NaN loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, input_ids: Any, labels: Any) -> Any:
        self.calls += 1
        loss = self.model(input_ids=input_ids, labels=labels).loss
        return {"loss": loss * float("nan") if self.calls == 4 else loss}


def test_accelerate_4242_a_nan_window() -> None:
    """The weights survive. The Trainer does not learn of it: it counts, and steps the scheduler."""
    states: list[Any] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            states.append([p.detach().clone() for p in model.parameters()])

    settings: dict[str, Any] = {
        "max_steps": 4, "gradient_accumulation_steps": 2, "callbacks": [Watch],
    }  # fmt: skip
    model = fw.tiny_llama()
    made = trainer(Poisoned(model), FusedAccumOptimizer, **settings)
    ours = finished(made)
    assert all(equal_bits(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(equal_bits(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert int(ours.optimizer.skipped_steps) == 1
    assert float(ours.optimizer.state[next(model.parameters())]["step"]) == 3
    assert made.state.global_step == 4 and not made.accelerator.optimizer_step_was_skipped
    assert ours.rates == pytest.approx([RATE * (1 - i / 4) for i in range(4)])
    model = fw.tiny_llama()
    finished(trainer(Poisoned(model), lambda o: o, **settings))
    assert not any(p.isfinite().all() for p in model.parameters())
