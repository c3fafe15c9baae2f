"""torch.amp.GradScaler around the wrapper."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import case_id, small_model
from tests.tolerances import equal_bits


def window(model: Any, opt: Any, scaler: Any, xs: list[Tensor], clip: bool, unscale: bool) -> None:
    """The loop of torch's documentation, with the loop owning the window."""
    for x in xs:
        loss = model(x).float().square().mean() / len(xs)
        scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(opt)
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def inputs(n: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 7, generator=generator).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_the_stock_loop(dtype: torch.dtype, clip: bool) -> None:
    """fp16 parameters too: their accumulators are fp32, so unscale_ takes them."""
    ours, exact = small_model(dtype), small_model(dtype).float()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1))
    plain = torch.optim.SGD(exact.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for start in range(0, 12, 4):
        xs = inputs(12, dtype)[start : start + 4]
        window(ours, opt, scaler, xs, clip, unscale=clip)
        for x in xs:
            (exact(x.float()).square().mean() / 4).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.1)
        plain.step()
        plain.zero_grad()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unscale", [True, False])
def test_overflow_skips_the_window_and_lowers_the_scale(unscale: bool) -> None:
    model = small_model(torch.float16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    xs = inputs(4, torch.float16)
    window(model, opt, scaler, xs, False, unscale)
    before = [p.detach().clone() for p in model.parameters()]
    bad = [*xs[:3], xs[3] * float("inf")]
    window(model, opt, scaler, bad, False, unscale)
    assert scaler.get_scale() == 32.0
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    assert float(opt.state[next(model.parameters())]["step"]) == 1
    window(model, opt, scaler, xs, False, unscale)
    assert float(opt.state[next(model.parameters())]["step"]) == 2


def wrap(model: Any, steps: int | None, scaler: Any, **options: Any) -> FusedAccumOptimizer:
    kind = options.pop("kind", torch.optim.SGD)
    inner = kind(model.parameters(), lr=options.pop("lr", 0.1))
    return FusedAccumOptimizer(inner, steps, grad_scaler=scaler, **options)


def micro_batches(model: Any, opt: Any, scaler: Any, xs: list[Tensor], unscale: bool) -> None:
    """torch's stock loop around one micro-batch each; the wrapper counts the window."""
    for x in xs:
        scaler.scale(model(x).float().square().mean()).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


def exactly(model: Any, xs: list[Tensor], n: int, clip: float | None = None) -> None:
    """The same windows by plain torch in fp32."""
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in range(0, len(xs), n):
        for x in xs[start : start + n]:
            (model(x.float()).square().mean() / n).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        plain.step()
        plain.zero_grad()


def assert_close(ours: Any, exact: Any, tolerance: float) -> None:
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.float(), q, rtol=tolerance, atol=tolerance)


# fp32: rounding of the windows; fp16: forward and backward are in fp16.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale", "no-unscale"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_the_wrapper_counts_the_window(dtype: torch.dtype, backend: str, unscale: bool) -> None:
    """The scale grows inside the windows: each micro-batch is divided by its own."""
    ours, exact = small_model(dtype), small_model(dtype).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    opt = wrap(ours, 4, scaler, max_grad_norm=0.1, backend=backend)
    xs = inputs(12, dtype)
    micro_batches(ours, opt, scaler, xs, unscale)
    exactly(exact, xs, 4, clip=0.1)
    assert scaler.get_scale() == 64.0 * 2**4 and opt.window_closed
    assert_close(ours, exact, TOLERANCES[dtype])
    assert float(opt.skipped_steps) == 0


def test_scales_that_change_inside_a_window_matter() -> None:
    """The negative control: dividing all by the last scale is far off."""
    ours, exact = small_model(), small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), None)
    xs = inputs(4, torch.float32)
    for i, x in enumerate(xs):
        (ours(x).square().mean() * 64.0 * (2 if i == 3 else 1) / 4).backward()
    for p in ours.parameters():
        assert p.grad is not None
        p.grad.div_(128.0)
    opt.step()
    exactly(exact, xs, 4)
    with pytest.raises(AssertionError):
        assert_close(ours, exact, TOLERANCES[torch.float32])


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale", "no-unscale"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_an_overflow_costs_one_window_and_lowers_the_scale_once(
    skip_nonfinite: bool, where: int, backend: str, unscale: bool
) -> None:
    ours, exact = small_model(torch.float16), small_model(torch.float16).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(
        ours, 4, scaler, backend=backend, skip_nonfinite=skip_nonfinite, kind=torch.optim.SGD
    )
    xs = inputs(12, torch.float16)
    micro_batches(ours, opt, scaler, xs[:4], unscale)
    before = [p.detach().clone() for p in ours.parameters()]
    bad = [x * float("inf") if i == where else x for i, x in enumerate(xs[4:8])]
    micro_batches(ours, opt, scaler, bad, unscale)
    assert opt.window_closed and int(opt.skipped_steps) == 1
    assert scaler.get_scale() == 32.0
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, ours.parameters(), strict=True))
    micro_batches(ours, opt, scaler, xs[8:], unscale)
    assert int(opt.skipped_steps) == 1 and scaler.get_scale() == 32.0
    exactly(exact, xs[:4] + xs[8:], 4)
    assert_close(ours, exact, TOLERANCES[torch.float16])


def test_two_overflows_lower_it_twice_and_the_step_count_stays() -> None:
    model = small_model(torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(model, 4, scaler, kind=torch.optim.AdamW)
    xs = inputs(4, torch.float16)
    micro_batches(model, opt, scaler, xs, False)
    bad = [x * float("inf") if i in (0, 2) else x for i, x in enumerate(xs)]
    micro_batches(model, opt, scaler, bad, False)
    assert scaler.get_scale() == 16.0
    assert float(opt.state[next(model.parameters())]["step"]) == 1


def test_a_native_optimizer_is_served_too() -> None:
    ours, exact = small_model(torch.float16), small_model(torch.float16).float()

    class Subclass(torch.optim.SGD):
        """Keeps its own step()."""

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    opt = wrap(ours, 4, scaler, kind=Subclass, skip_nonfinite=False)
    xs = inputs(8, torch.float16)
    micro_batches(ours, opt, scaler, xs, True)
    exactly(exact, xs, 4)
    assert_close(ours, exact, TOLERANCES[torch.float16])
    before = [p.detach().clone() for p in ours.parameters()]
    micro_batches(ours, opt, scaler, [x * float("inf") for x in xs[:4]], False)
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, ours.parameters(), strict=True))


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "fused-unscale"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_the_loop_owns_the_window_without_a_pass(
    dtype: torch.dtype, clip: bool, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, exact = small_model(dtype), small_model(dtype).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(ours, None, scaler if linked else None, fused_unscale=not linked)
    passes: list[int] = []
    backend = opt._collector.backend
    stock = backend.sum_of_squares
    monkeypatch.setattr(backend, "sum_of_squares", lambda *a: (passes.append(1), stock(*a)))
    xs = inputs(12, dtype)
    for start in range(0, 12, 4):
        window(ours, opt, scaler, xs[start : start + 4], clip, unscale=clip)
    exactly(exact, xs, 4, clip=0.1 if clip else None)
    assert_close(ours, exact, TOLERANCES[dtype])
    assert bool(passes) is clip  # torch's clip_grad_norm_ writes p.grad, nothing else does
    window(ours, opt, scaler, [xs[0] * float("nan")], clip, unscale=clip)
    assert int(opt.skipped_steps) == 1 and scaler.get_scale() == 32.0


def test_fp16_autocast() -> None:
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt = wrap(ours, 2, scaler)
    xs = inputs(6, torch.float32)
    for x in xs:
        with torch.autocast("cpu", torch.float16):
            loss = ours(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    exactly(exact, xs, 2)
    assert_close(ours, exact, TOLERANCES[torch.float16])


def test_gradients_show_unscaled_at_all_times() -> None:
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(ours, 2, scaler)
    (x,) = inputs(1, torch.float32)
    scaler.scale(ours(x).square().mean()).backward()
    (exact(x).square().mean() / 2).backward()
    for _ in range(2):
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        scaler.unscale_(opt)
        scaler.update()


def test_an_overflow_survives_a_checkpoint_inside_the_window() -> None:
    xs = inputs(4, torch.float16)

    def start() -> tuple[Any, FusedAccumOptimizer, Any]:
        model = small_model(torch.float16)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        return model, wrap(model, 4, scaler), scaler

    model, opt, scaler = start()
    micro_batches(model, opt, scaler, [xs[0] * float("inf"), xs[1]], False)
    resumed, opt2, scaler2 = start()
    opt2.load_state_dict(opt.state_dict())
    before = [p.detach().clone() for p in resumed.parameters()]
    micro_batches(resumed, opt2, scaler2, xs[2:], False)
    assert opt2.window_closed and int(opt2.skipped_steps) == 1
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, resumed.parameters(), strict=True))
    micro_batches(resumed, opt2, scaler2, xs, False)
    assert int(opt2.skipped_steps) == 1


def test_other_optimizers_of_the_scaler_stay_stock_and_it_can_be_copied() -> None:
    models = [small_model() for _ in range(3)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt, other = wrap(models[0], 1, scaler), torch.optim.SGD(models[1].parameters(), lr=0.1)
    scaler = copy.deepcopy(scaler)  # still linked to nothing of ours: a copy
    opt = wrap(models[2], 1, scaler)
    (x,) = inputs(1, torch.float32)
    for model in (models[1], models[2]):
        scaler.scale(model(x).square().mean()).backward()
    for each in (opt, other):
        scaler.unscale_(each)
        scaler.step(each)
    scaler.update()
    for p, q in zip(models[1].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert pickle.loads(pickle.dumps(scaler)).get_scale() == 64.0


def test_a_disabled_scaler_scales_nothing() -> None:
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    xs = inputs(4, torch.float32)
    micro_batches(ours, wrap(ours, 2, scaler), scaler, xs, True)
    exactly(exact, xs, 2)
    assert_close(ours, exact, TOLERANCES[torch.float32])


@pytest.mark.parametrize("unscale", [True, False])
def test_without_a_link_it_is_refused_where_the_wrapper_counts(unscale: bool) -> None:
    """It would divide the whole sum by the scale at every micro-batch."""
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(model(inputs(1, torch.float32)[0]).square().mean()).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
        scaler.step(opt)
    assert all(equal_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    opt.zero_grad()
    for x in inputs(2, torch.float32):
        model(x).square().mean().backward()
        opt.step()
    assert opt.window_closed


def test_a_step_that_raised_leaves_no_scale_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """GradScaler would multiply its next scale with what it finds."""
    ours, exact = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(ours, None, None, fused_unscale=True)
    (x,) = inputs(1, torch.float32)
    scaler.scale(ours(x).square().mean()).backward()

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(opt._updater, "run", fail)
        with pytest.raises(MemoryError):
            scaler.step(opt)
    scaler.step(opt)
    exactly(exact, [x], 1)
    assert_close(ours, exact, TOLERANCES[torch.float32])


def test_wrong_use_of_a_link() -> None:
    model = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = wrap(model, 2, scaler)
    (x,) = inputs(1, torch.float32)
    with pytest.raises(RuntimeError, match="loss that it did not scale"):
        model(x).square().mean().backward()
    opt.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    with pytest.raises(RuntimeError, match=r"Call scaler\.step\(optimizer\)"):
        opt.step()
    assert opt.micro_batches == 0
    scaler.step(opt)  # nothing was lost
    assert opt.micro_batches == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grad_scaler": 64.0}, "must be a torch.amp.GradScaler or None, got float"),
        ({"fused_unscale": 1}, "fused_unscale must be True or False, got 1"),
        ({"fused_unscale": True, "gradient_accumulation_steps": 2}, "is for gradient_acc"),
        (
            {"fused_unscale": True, "grad_scaler": torch.amp.GradScaler("cpu")},
            "grad_scaler=GradScaler",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    inner = torch.optim.SGD(small_model().parameters())
    with pytest.raises((TypeError, ValueError), match=says):
        FusedAccumOptimizer(inner, **options)


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("how", ["max_grad_norm", "clip_grad_norm_"])
@pytest.mark.parametrize("mode", ["stock", "fused-unscale", "linked"])
def test_the_norm_is_of_the_unscaled_gradient(mode: str, how: str, unscale: bool) -> None:
    """unscale_ moves no version counter: the sums that the backward left went unnoticed as those
    of the scaled gradient, and clipping was too tight by the scale."""
    ours, exact = small_model(), small_model()
    max_norm = 0.1 if how == "max_grad_norm" else None
    plain = torch.optim.SGD(exact.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = FusedAccumOptimizer(
        torch.optim.SGD(ours.parameters(), lr=0.1),
        max_grad_norm=max_norm,
        grad_scaler=scaler if mode == "linked" else None,
        fused_unscale=mode == "fused-unscale",
    )
    for x in inputs(3, torch.float32):
        opt.zero_grad()
        plain.zero_grad()
        scaler.scale(ours(x).square().mean()).backward()
        exact(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), 0.1)
        if unscale:
            scaler.unscale_(opt)
        if how == "clip_grad_norm_":
            returned = opt.clip_grad_norm_(0.1)
            is_unscaled = unscale or mode == "linked"
            torch.testing.assert_close(returned, norm if is_unscaled else norm * 64.0)
        scaler.step(opt)
        scaler.update()
        plain.step()
        assert norm > 0.1
        torch.testing.assert_close(opt.grad_norm, norm)
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
