"""FusedAccumOptimizer as a user meets it."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedaccum import FusedAccumOptimizer
from tests.cases import (
    CASES,
    Case,
    Gradients,
    assert_models_close,
    batches,
    case_id,
    loss,
    small_model,
)


class Native(torch.optim.RMSprop):
    """A subclass keeps its own step(): the native path, on a known optimizer."""


class NativeAdagrad(torch.optim.Adagrad):
    """One that makes its states in its constructor, in the parameter's dtype."""


def test_the_readme_loop() -> None:
    """N micro-batches are one big batch, with clipping and a scheduler stepped per update."""
    ours, big = small_model(), small_model()
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(ours.parameters(), lr=1e-2), gradient_accumulation_steps=4,
        max_grad_norm=0.1,
    )  # fmt: skip
    plain = torch.optim.AdamW(big.parameters(), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (opt, plain)]
    data = batches(24)
    updates = 0
    for i, x in enumerate(data):
        loss(ours, x).backward()
        opt.step()
        opt.zero_grad()
        assert opt.window_closed is (i % 4 == 3)
        assert opt.micro_batches == (i + 1) % 4
        if opt.window_closed:
            updates += 1
            loss(big, torch.cat(data[i - 3 : i + 1])).backward()
            norm = torch.nn.utils.clip_grad_norm_(big.parameters(), 0.1)
            plain.step()
            plain.zero_grad()
            for schedule in schedules:
                schedule.step()
            assert opt.grad_norm is not None
            torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-5, atol=0)
            assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert updates == 6 and int(opt.skipped_steps) == 0
    assert_models_close(ours, big)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("owner", [1, None])
def test_one_micro_batch_is_the_plain_optimizer(case: Case, owner: int | None) -> None:
    """With given gradients: a rule that divides by their size would amplify a model's rounding."""
    start = [torch.randn(33, 7), torch.randn(5)]
    ours, theirs = Gradients(start), Gradients(start)
    opt = FusedAccumOptimizer(case.make(ours.parameters()), owner, skip_nonfinite=False)
    plain = case.make(theirs.parameters())
    assert f"fused rule {case.rule!r}" in repr(opt)
    for _ in range(8):
        grads = [torch.randn_like(value) for value in start]
        for model, optimizer in ((ours, opt), (theirs, plain)):
            model.backward(list(grads))
            optimizer.step()
            optimizer.zero_grad()
    assert_models_close(ours, theirs)


def test_it_is_the_wrapped_optimizer() -> None:
    inner = torch.optim.SGD(small_model().parameters(), lr=0.1)
    opt = FusedAccumOptimizer(inner, 2)
    assert isinstance(opt, torch.optim.Optimizer) and opt.optimizer is inner
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state and opt.defaults is inner.defaults
    assert issubclass(type("Sub", (FusedAccumOptimizer,), {}), torch.optim.Optimizer)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_setstate_is_that_of_the_wrapped_optimizer(
    key: str, kind: type[torch.optim.Optimizer]
) -> None:
    """It wrote into the wrapper's own attributes, which nobody reads."""
    ours, theirs = (Gradients([torch.ones(3)]) for _ in range(2))
    for model in (ours, theirs):
        inner: Any = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
        opt: Any = FusedAccumOptimizer(inner, 1) if model is ours else inner
        for step in range(4):
            if step == 2:
                new: Any = defaultdict(dict)
                if key == "param_groups":
                    new = [{**group, "lr": 0.5} for group in opt.param_groups]
                opt.__setstate__({key: new})
                assert getattr(opt, key) is new
            model.backward([torch.full((3,), 1.0 + step)])
            opt.step()
            opt.zero_grad()
    assert_models_close(ours, theirs)


def test_hooks_run_once_per_update() -> None:
    calls: list[str] = []
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    for kind in (torch.optim.SGD, Native):
        model = Gradients([torch.zeros(3)])
        inner = kind(model.parameters(), lr=1.0)
        opt = FusedAccumOptimizer(inner, 2)
        opt.register_step_pre_hook(lambda *_: calls.append("pre"))
        inner.register_step_post_hook(lambda *_: calls.append("post"))
        for _ in range(4):
            model.backward([torch.ones(3)])
            opt.step()
    everywhere.remove()
    assert calls == ["pre", "post", "global"] * 4


def test_add_param_group_and_changed_hyper_parameters() -> None:
    ours, theirs = (Gradients([torch.ones(3), torch.ones(4)]) for _ in range(2))
    optimizers = []
    for model in (ours, theirs):
        inner: torch.optim.Optimizer = torch.optim.AdamW([model.params[0]], lr=0.1)
        opt = FusedAccumOptimizer(inner, 1) if model is ours else inner
        optimizers.append(opt)
        for step in range(4):
            if step == 1:
                opt.add_param_group({"params": [model.params[1]], "lr": 0.3, "weight_decay": 0.5})
            if step == 2:
                opt.param_groups[0]["lr"] = 0.01
                opt.param_groups[1]["betas"] = (0.5, 0.6)
                opt.param_groups[1]["maximize"] = True
            model.backward([torch.full((3,), 1.0 + step), torch.full((4,), 2.0 - step)])
            opt.step()
            opt.zero_grad()
            model.zero_grad()
    assert_models_close(ours, theirs)
    assert "group 1" in repr(optimizers[0])


def test_unfreezing_and_freezing() -> None:
    ours, theirs = small_model(), small_model()
    for model in (ours, theirs):
        for p in model[0].parameters():
            p.requires_grad_(False)
        opt: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is ours:
            opt = FusedAccumOptimizer(opt, 1)
        for step, x in enumerate(batches(4)):
            if step == 1:
                for p in model[0].parameters():
                    p.requires_grad_(True)
            if step == 3:
                model[3].weight.requires_grad_(False)
            loss(model, x).backward()
            opt.step()
            opt.zero_grad()
    assert_models_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("kind", [Native, NativeAdagrad, torch.optim.Adafactor])
def test_native_step_on_fp32_masters(kind: Any, dtype: torch.dtype) -> None:
    """An optimizer without a fused rule steps fp32 masters: fp32 training, rounded to be seen."""
    ours, exact = small_model(dtype), small_model(dtype).float()
    opt = FusedAccumOptimizer(kind(ours.parameters(), lr=1e-2), 2, max_grad_norm=0.5)
    plain = kind(exact.parameters(), lr=1e-2)
    assert "native step" in repr(opt)
    for x in batches(6, dtype):
        for _ in range(2):
            loss(ours, x).backward()
            opt.step()
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.clone()  # already clipped, in place
        plain.step()
        opt.zero_grad()
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q.to(dtype).float(), rtol=1e-6, atol=1e-7)
        for name, value in opt.state[p].items():
            if isinstance(value, Tensor) and value.dim():
                assert value.dtype == torch.float32, name


def test_options_that_make_it_another_algorithm_take_the_native_step() -> None:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    params = list(small_model().parameters())
    plain = FusedAccumOptimizer(lion_pytorch.Lion(params))
    assert "fused rule 'lion'" in repr(plain)
    plain.detach()
    odd = FusedAccumOptimizer(lion_pytorch.Lion(params, decoupled_weight_decay=True))
    assert "native step" in repr(odd)


@pytest.mark.parametrize("shape", [(3,), (1, 3), ()], ids=str)
def test_a_state_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """It was broadcast, where torch's own step() refuses it."""
    p = torch.nn.Parameter(torch.ones(2, 3))
    opt = FusedAccumOptimizer(torch.optim.Adam([p], lr=0.1))
    for _ in range(2):
        p.sum().backward()
        opt.step()
        opt.zero_grad()
    opt.state[p]["exp_avg"] = torch.full(shape, 5.0)
    before = p.detach().clone()
    p.sum().backward()
    with pytest.raises(ValueError, match=r"a 'exp_avg' of shape .* parameter of shape \(2, 3\)"):
        opt.step()
    assert torch.equal(p, before)
    del opt.state[p]
    opt.step()
    assert float(opt.state[p]["step"]) == 1


def test_detach_gives_everything_back() -> None:
    model = small_model(torch.bfloat16)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = FusedAccumOptimizer(inner, 2)
    for x in batches(2, torch.bfloat16):
        loss(model, x).backward()
        opt.step()
    assert opt.detach() is inner
    for p in model.parameters():
        assert p.grad is None and p.grad_dtype == torch.bfloat16
        assert inner.state[p]["exp_avg"].dtype == torch.bfloat16
        assert float(inner.state[p]["step"]) == 1
    for x in batches(2, torch.bfloat16):
        loss(model, x).backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    inner.step()


def test_a_dropped_wrapper_is_freed() -> None:
    """No reference cycle through autograd's nodes, which Python's collector could not see."""
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
    loss(model, batches(1)[0]).backward()
    gone = weakref.ref(opt._core.collector)
    del opt
    gc.collect()
    assert gone() is None
    model.zero_grad()
    loss(model, batches(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_repr_explains_itself() -> None:
    model = small_model(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    text = repr(FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 8, max_grad_norm=1.0))
    for expected in (
        "FusedAccumOptimizer(AdamW)", "8 micro-batches", "backend: torch (parameters are on the",
        "max_grad_norm: 1", "fused rule 'adam'", "bfloat16 with split master",
        "1 bfloat16 (frozen)",
    ):  # fmt: skip
        assert expected in text
    subclass = type("Mine", (torch.optim.AdamW,), {})
    assert "subclass of AdamW" in repr(FusedAccumOptimizer(subclass(model.parameters())))
