"""FusedAccumOptimizer as a user meets it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedaccum import FusedAccumOptimizer
from tests.cases import CASES, Case, Gradients, case_id, small_model
from tests.tolerances import U, equal_bits


class Native(torch.optim.RMSprop):
    """A subclass keeps its own step(): the native path, on a known optimizer."""


class NativeAdagrad(torch.optim.Adagrad):
    """One that makes its states in its constructor, in the parameter's dtype."""


def batches(n: int, dtype: torch.dtype = torch.float32, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 7, generator=generator).to(dtype) for _ in range(n)]


def loss(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def assert_models_close(a: torch.nn.Module, b: torch.nn.Module, rtol: float = 1e-5) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7)


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


def test_the_loop_owns_the_window() -> None:
    """None: step() takes the sum; zero_grad() of the optimizer and of the model both discard."""
    for by_model in (False, True):
        model = Gradients([torch.zeros(3)])
        opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        model.backward([torch.ones(3)])
        (model if by_model else opt).zero_grad()
        for value in (1.0, 2.0):
            model.backward([torch.full((3,), value)])
        opt.step()
        assert opt.window_closed
        assert model.params[0].tolist() == [-3.0] * 3
        model.backward([torch.full((3,), 4.0)])  # no zero_grad: torch goes on adding
        opt.step()
        assert model.params[0].tolist() == [-10.0] * 3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_inside_a_window_keeps_it(set_to_none: bool) -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    opt.zero_grad(set_to_none)
    for value in (1.0, 2.0):
        model.backward([torch.full((3,), value)])
        opt.step()
        model.zero_grad()  # as Trainer does: must not lose what was accumulated either
        opt.zero_grad(set_to_none)
    assert model.params[0].tolist() == [-1.5] * 3
    model.backward([torch.ones(3)])
    opt.flush()
    opt.zero_grad(set_to_none)
    grad = model.params[0].grad
    assert grad is None if set_to_none else not grad.any()


def test_without_zero_grad_the_next_window_starts_afresh() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    for value in (1.0, 3.0, 5.0, 7.0):
        model.backward([torch.full((3,), value)])
        opt.step()
    assert model.params[0].tolist() == [-8.0] * 3


def test_grad_is_the_accumulator() -> None:
    model = Gradients([torch.zeros(3, dtype=torch.bfloat16)])
    (param,) = model.params
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    addresses = set()
    for value in (1.0, 3.0, 1.0, 3.0):
        model.backward([torch.full((3,), value)])
        assert param.grad.dtype == torch.float32
        addresses.add(param.grad.data_ptr())
        opt.step()
        opt.zero_grad()
    assert len(addresses) == 1
    model.backward([torch.full((3,), 4.0)])
    assert param.grad.tolist() == [2.0] * 3


def test_what_people_do_to_gradients_works() -> None:
    """Clip in place, replace, assign, remove: what p.grad shows at step() is what is used."""
    model = Gradients([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    a, b, c = model.params
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=1e6)
    model.backward([torch.ones(2), torch.ones(2), torch.ones(2)])
    a.grad.mul_(5)
    b.grad = b.grad * 7
    c.grad = None
    opt.step()
    assert a.tolist() == [-5.0] * 2 and b.tolist() == [-7.0] * 2 and c.tolist() == [0.0] * 2
    assert opt.grad_norm.item() == pytest.approx((2 * 25 + 2 * 49) ** 0.5)
    opt.zero_grad()
    c.grad = torch.full((2,), 3.0)  # assigned without any backward
    opt.step()
    assert c.tolist() == [-3.0] * 2 and a.tolist() == [-5.0] * 2
    opt.zero_grad()
    model.backward([torch.ones(2), None, None])
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.25)
    opt.step()
    assert a.tolist() == [-5.25] * 2


def test_assigned_gradients_are_micro_gradients_where_the_wrapper_counts() -> None:
    model = Gradients([torch.zeros(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    for value in (1.0, 3.0):
        model.params[0].grad = torch.full((2,), value)
        opt.step()
        opt.zero_grad()
    assert model.params[0].tolist() == [-2.0] * 2


@pytest.mark.parametrize("owner", [2, None])
def test_clip_grad_norm_(owner: int | None) -> None:
    """Folded into the update, for this window only; the return value is the norm so far."""
    ours, theirs = small_model(), small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=1.0), owner)
    plain = torch.optim.SGD(theirs.parameters(), lr=1.0)
    first, second = batches(2)
    share = 1.0 if owner else 0.5
    for x in (first, second):
        (loss(ours, x) * share).backward()
        norm = opt.clip_grad_norm_(1e-3)
        if owner:
            opt.step()
            opt.zero_grad()
    if owner is None:
        opt.step()
        opt.zero_grad()
    (loss(theirs, first) / 2 + loss(theirs, second) / 2).backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e-3)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    plain.step()
    assert_models_close(ours, theirs)
    before = [p.clone() for p in ours.parameters()]
    for _ in range(owner or 1):
        loss(ours, first).backward()
        opt.step()
    moves = [(p - b).detach() for p, b in zip(ours.parameters(), before, strict=True)]
    moved = sum(float(move.square().sum()) for move in moves)
    assert moved**0.5 > 1e-2  # no longer clipped


def test_flush_divides_by_what_arrived() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 8)
    opt.flush()  # nothing to do
    assert not opt.window_closed
    for value in (1.0, 2.0, 6.0):
        model.backward([torch.full((3,), value)])
        opt.step()
    opt.flush()
    assert opt.window_closed and opt.micro_batches == 0
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -3.0), rtol=4 * U, atol=0)


def test_flush_counts_a_backward_without_step() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 4)
    model.backward([torch.full((3,), 1.0)])
    opt.step()
    model.backward([torch.full((3,), 5.0)])
    opt.flush()
    assert model.params[0].tolist() == [-3.0] * 3


@pytest.mark.parametrize("owner", [3, None])
def test_token_weights(owner: int | None) -> None:
    """sum w g / sum w, whoever owns the window."""
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), owner)
    for _ in range(2):
        for weight, value in ((2, 1.0), (5, 2.0), (1, 4.0)):
            with opt.micro_batch(weight=weight):
                model.backward([torch.full((3,), value)])
            if owner:
                opt.step()
                opt.zero_grad()
        if owner is None:
            assert opt.micro_batches == 3
            opt.step()
            opt.zero_grad()
    assert opt.window_closed
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -4.0), rtol=8 * U, atol=0)


def test_token_weights_equal_the_token_mean() -> None:
    """Padded micro-batches of different lengths against one batch of all tokens."""
    ours, big = small_model(), small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), 3)
    plain = torch.optim.SGD(big.parameters(), lr=0.1)
    lengths = [3, 17, 6]
    data = [torch.randn(n, 7) for n in lengths]
    for x in data:
        with opt.micro_batch(weight=len(x)):
            loss(ours, x).backward()
        opt.step()
        opt.zero_grad()
    loss(big, torch.cat(data)).backward()
    plain.step()
    assert_models_close(ours, big)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_a_nonfinite_window_changes_nothing(value: float, dtype: torch.dtype, kind: Any) -> None:
    model = Gradients([torch.ones(5), torch.ones(9)]).to(dtype)
    opt = FusedAccumOptimizer(kind(model.parameters(), lr=0.1), 2, max_grad_norm=1.0)

    def window(bad: float) -> None:
        for grad in (1.0, bad):
            model.backward([torch.full((5,), 1.0), torch.full((9,), grad)])
            opt.step()
            opt.zero_grad()

    def everything() -> list[Tensor]:
        state = opt.state_dict()["state"]
        tensors = [v for e in state.values() for v in e.values() if isinstance(v, Tensor)]
        return [t.clone() for t in [*model.parameters(), *tensors]]

    window(1.0)
    before = everything()
    window(value)
    assert int(opt.skipped_steps) == 1 and opt.window_closed
    assert not opt.grad_norm.isfinite()
    assert all(equal_bits(a, b) for a, b in zip(before, everything(), strict=True))
    window(1.0)
    assert int(opt.skipped_steps) == 1
    assert not any(equal_bits(a, b) for a, b in zip(before[:2], everything()[:2], strict=True))


def test_nonfinite_can_be_let_through() -> None:
    model = Gradients([torch.ones(5, dtype=torch.bfloat16)])
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters()), 1, skip_nonfinite=False, max_grad_norm=1.0
    )
    model.backward([torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])])
    opt.step()
    assert model.params[0].isnan().all()  # the norm is NaN, so all are, as in torch
    assert int(opt.skipped_steps) == 0


def test_a_first_window_that_is_skipped() -> None:
    """Step counts and bias corrections start with the first update that is applied."""
    ours, theirs = Gradients([torch.ones(5)]), Gradients([torch.ones(5)])
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})):
        opt = FusedAccumOptimizer(kind(ours.parameters(), lr=0.1, **options), 1)
        plain = kind(theirs.parameters(), lr=0.1, **options)
        ours.backward([torch.full((5,), float("inf"))])
        opt.step()
        opt.zero_grad()
        for model, optimizer in ((ours, opt), (theirs, plain)):
            for value in (1.0, 3.0):
                model.backward([torch.full((5,), value)])
                optimizer.step()
                optimizer.zero_grad()
        opt.detach()
    assert_models_close(ours, theirs)


def test_missing_gradients_are_zero_and_absent_parameters_are_left_alone() -> None:
    """As torch: no gradient in the whole window, no decay, no step count."""
    model = Gradients([torch.ones(2), torch.ones(2)])
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), 2, max_grad_norm=9.0)
    for grads in ([torch.ones(2), None], [None, None]):
        model.backward(grads)
        opt.step()
    assert model.params[1].tolist() == [1.0, 1.0] and model.params[1] not in opt.state
    assert float(opt.state[model.params[0]]["step"]) == 1
    assert opt.grad_norm.item() == pytest.approx(0.5 * 2**0.5)
    for _ in range(2):  # its history starts when it first takes part
        model.backward([None, torch.ones(2)])
        opt.step()
    assert float(opt.state[model.params[1]]["step"]) == 1
    assert float(opt.state[model.params[0]]["step"]) == 1
    assert opt.grad_norm.item() == pytest.approx(2**0.5)


@pytest.mark.parametrize("owner", [2, None])
def test_a_step_without_any_gradient_does_nothing(owner: int | None) -> None:
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), owner, max_grad_norm=1.0)
    for _ in range(2):
        opt.step()
    assert opt.window_closed
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not opt.state


def test_a_closure_runs_before_gradients_are_read() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)

    def closure() -> str:
        assert torch.is_grad_enabled()
        model.backward([torch.ones(3)])
        return "the loss"

    with torch.no_grad():
        assert opt.step(closure) == "the loss"
        assert opt.step(closure) == "the loss"
    assert model.params[0].tolist() == [-1.0] * 3


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


def test_lbfgs_evaluates_its_closure() -> None:
    ours, theirs = small_model(), small_model()
    x = batches(1)[0]
    for model in (ours, theirs):
        opt: torch.optim.Optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
        if model is ours:
            opt = FusedAccumOptimizer(opt)

        def closure(model: Any = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            value = loss(model, x)
            value.backward()
            return value

        for _ in range(2):
            opt.step(closure)
    assert_models_close(ours, theirs)


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
    gone = weakref.ref(opt._collector)
    del opt
    gc.collect()
    assert gone() is None
    model.zero_grad()
    loss(model, batches(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_stale_backward_is_caught() -> None:
    """The step writes behind autograd's back and says so."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = FusedAccumOptimizer(torch.optim.SGD([weight], lr=1.0), 1)
    out = (weight * weight).sum()
    out.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


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
