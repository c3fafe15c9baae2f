"""Stochastic rounding: unbiased, independent, seeded, the same on every backend.

Statistical bounds are 5 standard errors: a sound implementation fails one in 1.7 million, and seeds
are fixed, so that a run is the same every time.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedaccum
from fusedaccum.backends import rounding
from fusedaccum.kernels.layout import CHUNK
from tests.cases import Gradients, WithoutCompiler, forget_compiled
from tests.tolerances import equal_bits

BF16 = torch.bfloat16
N = 20_000
SIGMAS = 5


def wrap(model: torch.nn.Module, seed: int = 0, **options: Any) -> fusedaccum.FusedAccumOptimizer:
    kind = options.pop("kind", torch.optim.SGD)
    inner = kind(model.parameters(), lr=options.pop("lr", 2.0**-13))
    rounding_options = {"master_weights": "none", "stochastic_rounding": True, "seed": seed}
    return fusedaccum.FusedAccumOptimizer(inner, 1, **{**rounding_options, **options})


def train(model: Gradients, opt: fusedaccum.FusedAccumOptimizer, updates: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        model.backward([1 + torch.rand(p.shape, generator=generator) for p in model.params])
        opt.step()
        opt.zero_grad()


def test_the_bits_are_uniform() -> None:
    """Chi-square over the 2**16 values, and over each half of the bits."""
    drawn = torch.cat([rounding.random_bits(rounding.tensor_key(0, t), 1, 0, N) for t in range(64)])
    for part, bins in ((drawn, 2**16), (drawn >> 8, 256), (drawn & 255, 256)):
        counts = torch.bincount(part, minlength=bins).double()
        expected = len(drawn) / bins
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - (bins - 1)) < SIGMAS * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("other", ["neighbour", "next-chunk", "next-update", "next-tensor", "seed"])
def test_the_bits_are_uncorrelated(other: str) -> None:
    def draw(seed: int, tensor: int, step: int, start: int) -> Tensor:
        key = rounding.tensor_key(seed, tensor)
        return rounding.random_bits(key, step, start, N).double()

    a = draw(0, 0, 1, 0)
    b = {
        "neighbour": draw(0, 0, 1, 1),
        "next-chunk": draw(0, 0, 1, CHUNK),
        "next-update": draw(0, 0, 2, 0),
        "next-tensor": draw(0, 1, 1, 0),
        "seed": draw(1, 0, 1, 0),
    }[other]
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) < SIGMAS / math.sqrt(N)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.3, 1e-40, 6.1e-5, 2.0**100 * 1.234])
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    values = torch.full((1_000_000,), value)
    random = rounding.random_bits(rounding.tensor_key(3, 0), 1, 0, len(values))
    rounded = rounding.round_stochastic(values, random).double()
    below, above = rounded.min(), rounded.max()
    share = (values[0].double() - below) / (above - below)
    standard_error = (above - below) * (share * (1 - share) / len(values)).sqrt()
    assert below < values[0] < above and above - below <= values[0].abs() * 2**-7 + 2.0**-133
    assert (rounded.mean() - values[0].double()).abs() < SIGMAS * standard_error
    # The negative control: rounding to nearest is off by far more than that.
    nearest = values[0].bfloat16().double()
    assert (nearest - values[0].double()).abs() > 20 * standard_error


def test_what_fits_and_what_is_no_number_stays() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(BF16)
    for random in (torch.zeros(2**16, dtype=torch.int64), torch.full((2**16,), 2**16 - 1)):
        rounded = rounding.round_stochastic(values.float(), random)
        is_nan = values.isnan()
        assert equal_bits(rounded[~is_nan], values[~is_nan]) and bool(rounded[is_nan].isnan().all())


def test_small_updates_are_not_lost_in_the_long_run() -> None:
    """2,000 updates of 2**-13 at 1, where a bf16 step is 2**-7: nearest rounding loses them all."""
    updates, lr = 2000, 2.0**-13
    models = [Gradients([torch.ones(N, dtype=BF16)]) for _ in range(2)]
    for model, is_stochastic in zip(models, (True, False), strict=True):
        opt = wrap(model, lr=lr, stochastic_rounding=is_stochastic)
        for _ in range(updates):
            model.backward([torch.ones(N, dtype=BF16)])
            opt.step()
            opt.zero_grad()
    stochastic, nearest = (model.params[0].detach().double() for model in models)
    # Each update rounds between neighbours one ulp (2**-8 below 1) apart: variance <= lr * ulp.
    standard_error = math.sqrt(updates * lr * 2**-8 / N)
    assert abs(stochastic.mean().item() - (1 - updates * lr)) < SIGMAS * standard_error
    assert (nearest == 1).all()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_every_backend_draws_the_same(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(CHUNK + 77), torch.randn(5)]
    results = []
    for backend in ("torch", "triton", "blocks"):
        if backend == "blocks":
            WithoutCompiler(monkeypatch)
        model = Gradients([v.to(BF16) for v in values])
        name = "torch" if backend == "blocks" else backend
        train(model, wrap(model, seed=2**63 + 5, kind=kind, backend=name), 3)
        results.append([p.detach() for p in model.params])
    monkeypatch.undo()
    forget_compiled()
    loops, interpreter, blocks = results
    for a, b, c in zip(loops, interpreter, blocks, strict=True):
        assert equal_bits(a, b)
        if kind is torch.optim.SGD:  # ATen's square root rounds differently in places
            assert equal_bits(a, c)


def test_the_seed_decides() -> None:
    def outcome(seed: int) -> Tensor:
        model = Gradients([torch.ones(N, dtype=BF16)])
        train(model, wrap(model, seed), 2)
        return model.params[0].detach()

    assert equal_bits(outcome(1), outcome(1))
    assert not equal_bits(outcome(1), outcome(2))
    assert not equal_bits(outcome(1), outcome(1 + 2**32))


def test_a_resumed_run_draws_what_the_other_would_have() -> None:
    def fresh() -> Gradients:
        return Gradients([torch.ones(N, dtype=BF16)])

    whole, first, second = fresh(), fresh(), fresh()
    train(whole, wrap(whole, 4), 6)
    before = wrap(first, 4)
    train(first, before, 3)
    second.load_state_dict(first.state_dict())
    after = wrap(second, 4)
    after.load_state_dict(before.state_dict())
    generator = torch.Generator().manual_seed(1)
    for update in range(6):
        grad = 1 + torch.rand(N, generator=generator)
        if update >= 3:
            second.backward([grad])
            after.step()
            after.zero_grad()
    assert equal_bits(whole.params[0].detach(), second.params[0].detach())


def test_a_skipped_window_draws_nothing() -> None:
    model = Gradients([torch.ones(9, dtype=BF16)])
    opt = wrap(model)
    model.backward([torch.full((9,), math.nan)])
    opt.step()
    assert (model.params[0] == 1).all() and int(opt.skipped_steps) == 1


def test_other_dtypes_are_rounded_to_nearest() -> None:
    """fp32 and fp16 parameters in the same group: as without the option."""
    start = [torch.rand(50), torch.rand(50).half(), torch.rand(50).to(BF16)]
    results = []
    for is_stochastic in (True, False):
        model = Gradients(start)
        opt = wrap(model, stochastic_rounding=is_stochastic, lr=1e-3)
        assert ("1 bfloat16 rounded stochastically" in repr(opt)) is is_stochastic
        train(model, opt, 3)
        results.append([p.detach() for p in model.params])
    same = [equal_bits(a, b) for a, b in zip(*results, strict=True)]
    assert same == [True, True, False]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"master_weights": None}, 'is for master_weights="none"'),
        ({"master_weights": "split"}, "got master_weights='split'"),
        ({"stochastic_rounding": 3}, "must be True or False, got 3"),
        ({"seed": -1}, "seed must be an int from 0"),
        ({"seed": 0.5}, "got 0.5"),
        ({"kind": torch.optim.Adafactor}, "needs a fused rule: no fused rule for Adafactor"),
    ],
)
def test_wrong_use_is_refused(options: dict[str, Any], says: str) -> None:
    model = Gradients([torch.ones(3, dtype=BF16)])
    with pytest.raises((TypeError, ValueError), match=says):
        wrap(model, **options)
    assert model.params[0].grad_dtype == BF16  # no hook, nothing changed
    model.backward([torch.ones(3)])
