"""What only transformers' Trainer has; what it shares is in test_framework_laws.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import frameworks as fw
from tests.adapters import RATE, UNUSED, Plan, by_trainer
from tests.frameworks import finished
from tests.frameworks import own_state as own_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from fusedaccum import FusedAccumOptimizer  # noqa: E402
from tests.tolerances import equal_bits  # noqa: E402


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


def test_fp16_weights_without_a_scaler() -> None:
    """Plain AdamW's eps of 1e-8 is zero in fp16, and many second moments are: NaN.

    On a CPU the Trainer's fp16=True gives neither autocast nor GradScaler (a scaler around the
    wrapper: test_accelerate.py and test_scaler.py).
    """
    ours, plain, exact = (
        by_trainer(Plan(fw.tiny_llama(dtype), fw.WRAPS[how]))
        for how, dtype in (
            ("ours", torch.float16), ("plain", torch.float16), ("plain", torch.float32),
        )
    )  # fmt: skip
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


def test_a_model_that_knows_nothing_of_token_counts_gets_the_mean_of_means() -> None:
    """The other half of the law in test_framework_laws.py, where the Trainer weighs by tokens."""
    data = fw.sequences(24)[12:]
    model, seen = fw.tiny_llama(), list[Any]()
    plan = Plan(
        MeanLoss(model), FusedAccumOptimizer, updates=2, rate=2.0**-30, clip=None, data=data
    )
    plan.before = lambda: seen.append([p.grad.clone() for p in model.parameters()])
    by_trainer(plan)
    batches = [*plan.loader()]
    for grads, window in zip(seen, (batches[:4], batches[4:]), strict=True):
        exact, other = (fw.window_gradients(window, flag) for flag in (False, True))
        assert fw.relative_error(grads, exact) < fw.GRADIENT_RTOL
        assert fw.relative_error(grads, other) > 1e-2


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
