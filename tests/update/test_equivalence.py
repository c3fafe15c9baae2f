"""The law: N weighted micro-batches equal one big batch, to the precision that fp32 allows.

Random shapes, dtypes, window lengths, weights, missing gradients and partial windows, through real
backwards; the reference is torch.optim in float64 on the exact weighted mean.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests import tolerances
from tests.cases import CASES, Case, Gradients, case_id

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Run:
    """What hypothesis draws: one or more windows of one optimizer."""

    case: Case
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    n: int  # micro-batches per window
    windows: int
    last: int  # micro-batches in the last window, flushed if fewer than n
    weights: list[float] | None
    missing: float  # share of gradients that do not arrive
    backend: str
    seed: int
    device: str = "cpu"


@st.composite
def runs(draw: st.DrawFn, backend: str, max_dim: int) -> Run:
    n = draw(st.integers(1, 32))
    weight = st.one_of(st.integers(1, 5000), st.floats(0.01, 100.0))
    shape = st.lists(st.integers(0, max_dim), max_size=3).map(tuple)
    return Run(
        case=draw(st.sampled_from(CASES)),
        shapes=draw(st.lists(shape, min_size=1, max_size=4)),
        dtype=draw(st.sampled_from(DTYPES)),
        n=n,
        windows=draw(st.integers(1, 3)),
        last=draw(st.integers(1, n)),
        weights=draw(st.none() | st.lists(weight, min_size=3 * n, max_size=3 * n)),
        missing=draw(st.sampled_from([0.0, 0.0, 0.3])),
        backend=backend,
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass
class Outcome:
    precise: list[Tensor]  # our parameters, as precisely as we keep them
    visible: list[Tensor]  # our parameters
    exact: list[Tensor]  # torch.optim in float64
    moved: list[Tensor]  # sum of |updates| in float64
    updates: int


def run(r: Run, *, assumed_n: int | None = None, assumed_case: Case | None = None) -> Outcome:
    """Both sides of the law. `assumed_*` make the float64 side assume something else (controls)."""
    generator = torch.Generator().manual_seed(r.seed)
    # One sign per element, in the gradients and (as the rules see them) in the parameters: sums
    # that do not cancel keep relative errors small through Adam's division and L2 decay.
    maximize = dict(r.case.options).get("maximize", False)
    signs = [torch.randint(0, 2, s, generator=generator) * 2.0 - 1 for s in r.shapes]
    starts = [
        ((1 + torch.rand(s, generator=generator)) * sign * (-1 if maximize else 1)).to(r.dtype)
        for s, sign in zip(r.shapes, signs, strict=True)
    ]
    model = Gradients(starts).to(r.device)
    opt = FusedAccumOptimizer(
        r.case.make(model.parameters()),
        r.n,
        backend=r.backend,
        master_weights=None,
        bucket_cap_mb=0.001,
    )
    exact = [torch.nn.Parameter(p.double()) for p in starts]
    theirs = (assumed_case or r.case).make(exact)
    moved = [torch.zeros_like(p) for p in exact]
    weights = iter(r.weights or [1.0] * 3 * r.n)
    for window in range(r.windows):
        count = r.last if window == r.windows - 1 else r.n
        sums: list[Tensor | None] = [None] * len(exact)
        total = 0.0
        for _ in range(count):
            weight = next(weights)
            total += weight
            grads: list[Tensor | None] = []
            for i, sign in enumerate(signs):
                grad = (torch.rand(sign.shape, generator=generator) + 0.1) * sign
                grad = grad.to(r.dtype)
                if torch.rand((), generator=generator) < r.missing:
                    grads.append(None)
                    continue
                grads.append(grad)
                known = sums[i]
                term = weight * grad.double()
                sums[i] = term if known is None else known + term
            if r.weights is None:
                model.backward(grads)
            else:
                with opt.micro_batch(weight=weight):
                    model.backward(grads)
            opt.step()
            opt.zero_grad()
        if count < r.n:
            assert not opt.window_closed
            opt.flush()
            opt.zero_grad()
        assert opt.window_closed and opt.micro_batches == 0
        factor = 1.0 if assumed_n is None else r.n / assumed_n
        for param, summed in zip(exact, sums, strict=True):
            param.grad = None if summed is None else summed / total * factor
        before = [p.detach().clone() for p in exact]
        theirs.step()
        moved = [m + (p.detach() - b).abs() for m, p, b in zip(moved, exact, before, strict=True)]
    state = opt.state_dict()["state"]
    visible = [p.detach().cpu() for p in model.params]
    precise = [state.get(i, {}).get("master_param", p).cpu() for i, p in enumerate(visible)]
    return Outcome(precise, visible, [p.detach() for p in exact], moved, r.windows)


def violation(r: Run, o: Outcome) -> float:
    """Largest error in units of the bound: at most 1 where the law holds."""
    worst = 0.0
    for ours, exact, moved in zip(o.precise, o.exact, o.moved, strict=True):
        bound = tolerances.update_bound(exact, moved, r.n, o.updates)
        if ours.numel():
            worst = max(worst, float(((ours.double() - exact).abs() / bound).max()))
    return worst


@settings(max_examples=150)
@given(runs(backend="torch", max_dim=9))
def test_windows_equal_big_batches(r: Run) -> None:
    outcome = run(r)
    assert violation(r, outcome) <= 1
    for visible, precise in zip(outcome.visible, outcome.precise, strict=True):
        nearest = precise.to(r.dtype).double()
        half_ulp = torch.finfo(r.dtype).eps / 2 * precise.double().abs()
        # Ties round away from zero in a split master, to even elsewhere.
        assert ((visible.double() - precise.double()).abs() <= half_ulp + 1e-40).all()
        assert ((visible.double() - nearest).abs() <= 2 * half_ulp + 1e-40).all()


@settings(max_examples=25)
@given(runs(backend="triton", max_dim=5))
def test_windows_equal_big_batches_in_the_kernels(r: Run) -> None:
    assert violation(r, run(r)) <= 1


@pytest.mark.gpu
@settings(max_examples=100)
@given(runs(backend="triton", max_dim=40))
def test_windows_equal_big_batches_on_a_gpu(r: Run) -> None:
    r.device = "cuda"
    assert violation(r, run(r)) <= 1


def _fixed(case: Case, dtype: torch.dtype = torch.float32, **changes: object) -> Run:
    values = {
        "case": case, "shapes": [(5, 7), (3,)], "dtype": dtype, "n": 6, "windows": 2, "last": 6,
        "weights": None, "missing": 0.0, "backend": "torch", "seed": 1, **changes,
    }  # fmt: skip
    return Run(**values)  # type: ignore[arg-type]


SGD = next(c for c in CASES if c.rule == "sgd")
ADAMW = next(c for c in CASES if c.kind is torch.optim.AdamW)
ADAM = next(c for c in CASES if c.kind is torch.optim.Adam and c.options)


def test_a_wrong_n_violates_the_law() -> None:
    r = _fixed(SGD)
    assert violation(r, run(r)) <= 1
    assert violation(r, run(r, assumed_n=7)) > 100


def test_a_wrong_rule_violates_the_law() -> None:
    r = _fixed(ADAMW)
    assert violation(r, run(r)) <= 1
    assert violation(r, run(r, assumed_case=ADAM)) > 100


def test_the_mean_of_means_violates_the_law() -> None:
    """Token weights matter: the same run, judged as if all weights were 1."""
    r = _fixed(SGD, weights=[1.0, 100.0, 7.0, 3.0, 50.0, 900.0] * 3)
    assert violation(r, run(r)) <= 1
    unweighted = _fixed(SGD)
    mixed = run(r)
    mixed.exact = run(unweighted).exact
    assert violation(r, mixed) > 100


def test_cancelling_gradients_stay_within_the_bound() -> None:
    """Signs at random: the error is bounded by the mean of magnitudes, not by the mean."""
    torch.manual_seed(3)
    for dtype in DTYPES:
        for n in (1, 3, 7, 32):
            model = Gradients([torch.zeros(1000)])
            model = model.to(dtype) if dtype == torch.float32 else model
            opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), n)
            grads = [torch.randn(1000).to(dtype) for _ in range(n)]
            for grad in grads:
                model.backward([grad.float()])
                opt.step()
            exact = torch.stack([g.double() for g in grads]).mean(0)
            magnitudes = torch.stack([g.double().abs() for g in grads]).mean(0)
            error = (-model.params[0].detach().double() - exact).abs()
            assert (error <= tolerances.mean_bound(magnitudes, n)).all()


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(
    ("backend", "device"),
    [("torch", "cpu"), ("triton", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)],
)
def test_bit_equal_to_native_fp32_accumulation(
    n: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """For N a power of two, scaling commutes with every rounding."""
    torch.manual_seed(n)
    start = torch.randn(37, 11, device=device)
    ours, native = Gradients([start.to(dtype)]), Gradients([start.to(dtype)])
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.0), n, backend=backend)
    theirs = native.params[0]
    theirs.grad_dtype = None
    theirs.grad = torch.zeros_like(start)
    for _ in range(n):
        grad = torch.randn_like(start).to(dtype)
        ours.backward([grad])
        native.backward([grad])
        opt.step()
    assert theirs.grad.dtype == torch.float32
    mine = ours.params[0].grad
    assert mine is not None
    assert tolerances.equal_bits(mine, theirs.grad / n)


def test_plain_bf16_accumulation_is_not() -> None:
    """The negative control, and why this library exists: bf16 sums lose about 1 % at N = 64."""
    torch.manual_seed(0)
    grads = [torch.randn(4096).to(torch.bfloat16) + 1 for _ in range(64)]
    exact = torch.stack([g.double() for g in grads]).mean(0)
    ours, plain = (Gradients([torch.zeros(4096, dtype=torch.bfloat16)]) for _ in range(2))
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), lr=0.0), 64)
    for grad in grads:
        ours.backward([grad])
        opt.step()
        plain.backward([grad / 64])
    error = [
        float((m.params[0].grad.double() - exact).norm() / exact.norm()) for m in (ours, plain)
    ]
    assert error[0] < 1e-6 < 1e-3 < error[1]


@pytest.mark.parametrize("how", ["load", "add_param_group", "detach", "load-detach"])
def test_the_first_update_is_not_dampened_after_a_skipped_window(how: str) -> None:
    options = {"lr": 0.25, "momentum": 0.75, "dampening": 0.5}
    ours = Gradients([torch.ones(3)])
    exact = Gradients([torch.ones(3, dtype=torch.float64)])
    opt = FusedAccumOptimizer(torch.optim.SGD(ours.parameters(), **options), 1)
    plain = torch.optim.SGD(exact.parameters(), **options)
    ours.backward([torch.full((3,), torch.nan)])
    opt.step()
    opt.zero_grad()
    if "load" in how:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    if "detach" in how:
        opt = FusedAccumOptimizer(opt.detach(), 1)
    if how == "add_param_group":
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))]})
    for value in (1.0, 2.0):
        for model, optimizer in ((ours, opt), (exact, plain)):
            model.backward([torch.full((3,), value)])
            optimizer.step()
            optimizer.zero_grad()
        got, expected = ours.params[0].double(), exact.params[0]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.0)
