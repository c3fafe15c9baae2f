"""What users of torch and of training frameworks asked for, a test each, named after the issue.

Those that need a framework are beside its tests: transformers#34191, #37766, #39659 and #22143 in
test_trainer.py, accelerate#963 and #4242 in test_accelerate.py, pytorch-lightning#19987, #21435
and #15501 in test_lightning.py, peft#341 and diffusers#8871 in test_peft.py, trl#2175 in
test_token_weights.py, pytorch#118435 in test_compiled_model.py. README's limits name those that
are not answered yet.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests import tolerances
from tests.cases import Gradients, small_model

BF16 = torch.bfloat16


def micro_batches(n: int, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("n", [16, 64])
def test_deepspeed_2352_and_liger_830_bf16_gradients_are_accumulated_in_fp32(n: int) -> None:
    """The sum of n bf16 gradients is right to fp32, where a bf16 sum is off by percents."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(5000, generator=generator).to(BF16) for _ in range(n)]
    exact = torch.stack(grads).double().mean(0)
    magnitudes = torch.stack(grads).double().abs().mean(0)
    model, native = (Gradients([torch.zeros(5000, dtype=BF16)]) for _ in range(2))
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), n)
    for grad in grads:
        model.backward([grad])
        opt.step()
        native.backward([grad / n])
    ours, theirs = model.params[0].grad, native.params[0].grad
    assert ours is not None and theirs is not None and ours.dtype == torch.float32
    assert ((ours - exact).abs() <= tolerances.mean_bound(magnitudes, n)).all()
    assert ((theirs.double() - exact).abs() / magnitudes).max() > 1e-3


def test_pytorch_120168_and_146542_bf16_parameters_step_on_fp32_gradients() -> None:
    """torch's fused AdamW refuses the mixture; wrapped it steps, as fp32 does."""
    plain = torch.nn.Parameter(torch.ones(9, dtype=BF16))
    plain.grad_dtype = None
    plain.grad = torch.full((9,), 1e-3)
    with pytest.raises(RuntimeError):
        torch.optim.AdamW([plain], fused=True).step()
    model, exact = Gradients([torch.ones(9, dtype=BF16)]), Gradients([torch.ones(9)])
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), fused=True))
    reference = torch.optim.AdamW(exact.parameters())
    grad = model.params[0]
    grad.grad_dtype = None
    grad.grad = torch.full((9,), 1e-3)
    exact.params[0].grad = torch.full((9,), 1e-3)
    opt.step()
    reference.step()
    master = opt.state_dict()["state"][0]["master_param"]
    torch.testing.assert_close(master, exact.params[0].detach(), rtol=1e-6, atol=0)


def test_pytorch_178034_masters_without_being_asked_and_without_a_copy_that_grows() -> None:
    """fp32 masters for bf16 parameters in the fused step: an update of 2**-13 at 1 is not lost, and
    they cost 2 bytes a parameter."""
    n = 40_000
    model = Gradients([torch.ones(n, dtype=BF16)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=2.0**-13))
    for _ in range(64):
        model.backward([torch.ones(n, dtype=BF16)])
        opt.step()
        opt.zero_grad()
    assert (model.params[0] == 1 - 64 * 2.0**-13).all()
    plain = Gradients([torch.ones(n, dtype=BF16)])
    before = torch.optim.SGD(plain.parameters(), lr=2.0**-13)
    for _ in range(64):
        plain.params[0].grad = torch.ones(n, dtype=BF16)
        before.step()
    assert (plain.params[0] == 1).all()


def test_pytorch_43706_loading_keeps_fp32_states() -> None:
    def trained(kind: Any) -> Any:
        model = small_model(BF16)
        opt = kind(torch.optim.AdamW(model.parameters()))
        for x in micro_batches(2):
            model(x.to(BF16)).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
        return opt

    ours, plain = trained(FusedAccumOptimizer), trained(lambda inner: inner)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    states = [v for s in ours.state.values() for v in s.values() if v.dim()]
    assert states and all(v.dtype == torch.float32 for v in states)
    fp32 = {i: {k: v.float() for k, v in s.items()} for i, s in plain.state_dict()["state"].items()}
    plain.load_state_dict({**plain.state_dict(), "state": fp32})
    assert {v.dtype for s in plain.state.values() for v in s.values() if v.dim()} == {BF16}


@pytest.mark.parametrize("clip", [None, 0.05], ids=["pytorch_124523", "torchtune_1934"])
def test_gradients_are_freed_in_the_backward_and_still_accumulated_and_clipped(
    clip: float | None,
) -> None:
    """What optimizer-in-backward saves (no gradient outlives its layer's backward) without what it
    loses: windows of micro-batches, and clipping by the global norm."""
    ours, exact = small_model(), small_model()
    inner = torch.optim.SGD(ours.parameters(), lr=0.5)
    opt = FusedAccumOptimizer(inner, 4, max_grad_norm=clip, bucket_cap_mb=1e-6)
    plain = torch.optim.SGD(exact.parameters(), lr=0.5)
    for start in range(0, 8, 4):
        for x in micro_batches(8)[start : start + 4]:
            ours(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
            (exact(x).square().mean() / 4).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(exact.parameters(), clip)
        plain.step()
        plain.zero_grad()
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_onetrainer_1465_a_run_resumed_inside_a_window_loses_no_gradient() -> None:
    def start() -> tuple[torch.nn.Module, FusedAccumOptimizer]:
        model = small_model(BF16)
        return model, FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 4)

    def run(model: torch.nn.Module, opt: FusedAccumOptimizer, xs: list[Tensor]) -> None:
        for x in xs:
            model(x.to(BF16)).float().square().mean().backward()
            opt.step()
            opt.zero_grad()

    xs = micro_batches(10)
    whole, opt = start()
    run(whole, opt, xs)
    first, before = start()
    run(first, before, xs[:6])
    second, after = start()
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    assert after.micro_batches == 2
    run(second, after, xs[6:])
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert tolerances.equal_bits(p.detach(), q.detach())
