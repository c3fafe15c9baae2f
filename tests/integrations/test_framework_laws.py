"""What holds in every framework that owns the window: the Trainer, Accelerate, Lightning, Fabric.

Each law is stated once; `tests/adapters.py` runs it. What only one framework has is in the file of
that framework. What "the same" means is in same_runs.py.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests import frameworks as fw
from tests.adapters import CLIP, FRAMEWORKS, OF_LIGHTNING, RATE, SAVED, Plan, spoil, train
from tests.frameworks import own_state as own_state
from tests.same_runs import are_equal
from tests.tolerances import equal_bits

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' advice about workers and so on
has_lightning = find_spec("lightning") is not None
HERE = [name for name in FRAMEWORKS if has_lightning or name not in OF_LIGHTNING]
every = pytest.mark.parametrize("framework", HERE)
both_n = pytest.mark.parametrize("n", [1, 4], ids="n{}".format)
FP32, BF16 = torch.float32, torch.bfloat16


@functools.cache
def run(
    framework: str,
    how: str,
    n: int = 4,
    dtype: torch.dtype = FP32,
    rate: float = RATE,
    autocast: bool = False,
) -> fw.Run:
    """Kept for the tests that compare with it."""
    plan = Plan(fw.tiny_llama(dtype), fw.WRAPS[how], n, rate=rate, autocast=autocast)
    result = train(framework, plan)
    assert len(result.losses) == fw.UPDATES
    return result


@both_n
@every
def test_the_run_is_the_plain_optimizers(framework: str, n: int) -> None:
    """Losses, norms, parameters, learning rates; partial windows, clipping."""
    ours, plain, nudged = (run(framework, how, n) for how in ("ours", "plain", "nudged"))
    assert fw.differences(ours, plain, nudged) == []
    assert plain.losses[-1] < 0.9 * plain.losses[0]  # it learned, so there was something to differ
    assert max(plain.norms) > CLIP  # so that clipping did something
    # Once per update and not per micro-batch (accelerate issue 963), from the first to the last.
    assert ours.rates == pytest.approx([RATE * (1 - i / fw.UPDATES) for i in range(fw.UPDATES)])
    assert float(ours.optimizer.state[next(ours.model.parameters())]["step"]) == fw.UPDATES
    assert len(fw.differences(run(framework, "faster", n), plain, nudged)) == 4


@both_n
@every
def test_bf16_weights_stay_closer_to_fp32(framework: str, n: int) -> None:
    """From the same weights at a rate where bf16 rounds updates away, as in fine-tuning.

    Forward and backward are bf16 in both, so a distance remains, which grows with the rate.
    """
    exact = run(framework, "plain", n, rate=1e-3)
    plain, ours = (run(framework, how, n, BF16, rate=1e-3) for how in ("plain", "ours"))
    assert next(ours.model.parameters()).dtype == BF16
    assert "split master" in repr(ours.optimizer)
    assert fw.distance(ours.model, exact.model) < 0.5 * fw.distance(plain.model, exact.model)


@every
def test_bf16_autocast(framework: str) -> None:
    """fp32 weights and gradients, where the plain optimizer is as precise."""
    ours, plain = (run(framework, how, autocast=True) for how in ("ours", "plain"))
    assert next(ours.model.parameters()).dtype == FP32
    assert ours.norms[0] == plain.norms[0]  # of the same gradients
    # One fp32 rounding of a weight may turn its rounding to bf16, now and then: the runs are not as
    # close as in fp32, but closer than autocast is to fp32.
    of_autocast = fw.farthest(plain.losses, run(framework, "plain").losses)
    assert 0 < fw.farthest(ours.losses, plain.losses) < of_autocast


@pytest.mark.parametrize("windows", [1, 2], ids=["full", "full-and-partial"])
@every
def test_what_a_window_is_divided_by(framework: str, windows: int) -> None:
    """Unequal token counts, and a partial last window of 2. The update takes the loop's own mean.

    The Trainer weighs by tokens (transformers issues 34191, 37766, 39659). The others take the mean
    of means, and divide by N where fewer arrived (lightning issue 19987). A learning rate of 2**-30
    leaves the weights where they are, so both windows are of one model.
    """
    by_tokens = framework == "trainer"
    data = fw.sequences(24)[12:]
    model, seen = fw.tiny_llama(), list[Any]()
    plan = Plan(model, FusedAccumOptimizer, updates=2, rate=2.0**-30, clip=None, data=data)
    plan.before = lambda: seen.append([p.grad.clone() for p in model.parameters()])
    train(framework, plan)
    window = [*plan.loader()][4 * (windows - 1) :][:4]
    assert len({fw.n_tokens(batch) for batch in window}) > 1
    share = 1.0 if by_tokens else len(window) / 4
    exact, other = (
        [g * share for g in fw.window_gradients(window, flag)]
        for flag in (by_tokens, not by_tokens)
    )
    assert len(seen) == 2
    assert fw.relative_error(seen[windows - 1], exact) < fw.GRADIENT_RTOL
    assert fw.relative_error(seen[windows - 1], other) > 1e-2


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@every
def test_transformers_22143_resume_loses_nothing(
    framework: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Saved between windows, in mid-epoch; masters come back too."""

    def half(**changes: Any) -> fw.Run:
        seed = 9 if changes.get("resumes") else 0
        model = fw.tiny_llama(dtype, seed)
        return train(
            framework, Plan(model, FusedAccumOptimizer, updates=12, folder=tmp_path, **changes)
        )

    whole, resumed = half(), half(resumes=True)
    assert are_equal(resumed.model, whole.model)
    rest = -len(resumed.losses)
    assert -rest >= 12 - SAVED
    assert resumed.losses == whole.losses[rest:] and resumed.rates == whole.rates[rest:]
    spoil(tmp_path)
    assert not are_equal(half(resumes=True).model, whole.model)


@pytest.mark.parametrize(
    ("framework", "n", "who"),
    [
        ("trainer", 1, "the Trainer"),
        ("trainer", 4, "the Trainer"),
        ("accelerate", 2, r"Accelerator\(gradient_accumulation_steps=2\)"),
    ],
)
def test_a_wrapper_that_counts_too_is_refused(framework: str, n: int, who: str) -> None:
    """It would update at every fourth step() of the framework, which clips and counts each."""
    plan = Plan(fw.tiny_llama(), lambda o: FusedAccumOptimizer(o, 4), n, updates=2)
    with pytest.raises(ValueError, match=rf"steps=4\) counts .* {who}.*steps=None"):
        train(framework, plan)


@both_n
@every
def test_a_window_of_one_step_is_no_other_count(framework: str, n: int) -> None:
    plan = Plan(fw.tiny_llama(), lambda o: FusedAccumOptimizer(o, 1), n)
    assert train(framework, plan).losses == run(framework, "ours", n).losses


@every
def test_a_model_that_moved_after_it_was_wrapped(framework: str) -> None:
    """On a GPU frameworks move the model; another dtype does the same to hooks."""
    model = fw.tiny_llama()

    def wrap_and_move(optimizer: Any) -> Any:
        wrapped = FusedAccumOptimizer(optimizer)
        model.to(BF16)
        return wrapped

    moved = train(framework, Plan(model, wrap_and_move, updates=6))
    direct = train(framework, Plan(fw.tiny_llama(BF16), FusedAccumOptimizer, updates=6))
    assert moved.losses == direct.losses and are_equal(moved.model, direct.model)
    assert "split master" in repr(moved.optimizer)


class Poisoned(torch.nn.Module):
    """A model whose fourth micro-batch has a NaN loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, input_ids: Any, labels: Any) -> Any:
        self.calls += 1
        out = self.model(input_ids=input_ids, labels=labels)
        return type(out)(loss=out.loss * float("nan") if self.calls == 4 else out.loss)


@every
def test_accelerate_4242_a_nan_window(framework: str) -> None:
    """The weights survive. The framework does not learn of it: it counts it as an update."""
    model, states = fw.tiny_llama(), list[Any]()
    plan = Plan(Poisoned(model), FusedAccumOptimizer, 2, updates=4)
    plan.after = lambda: states.append([p.detach().clone() for p in model.parameters()])
    ours = train(framework, plan)
    assert len(states) == 4
    assert all(equal_bits(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(equal_bits(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert int(ours.optimizer.skipped_steps) == 1
    assert float(ours.optimizer.state[next(model.parameters())]["step"]) == 3
    assert ours.rates == pytest.approx([RATE * (1 - i / 4) for i in range(4)])
    model = fw.tiny_llama()
    train(framework, Plan(Poisoned(model), fw.WRAPS["plain"], 2, updates=4))
    assert not any(p.isfinite().all() for p in model.parameters())
