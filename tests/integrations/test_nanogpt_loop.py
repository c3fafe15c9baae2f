"""A training loop of one's own, in the manner of nanoGPT's: what a stock loop does, wrapped.

The loop divides the loss by N, unscales and clips with torch's own functions, sets the learning
rate by hand before each update, and saves `{"model", "optimizer", "iter"}`. The wrapper leaves the
window to it. What "the same" means is in same_runs.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedaccum import FusedAccumOptimizer
from tests.same_runs import Nudged, Run, are_equal, differences, distance
from tests.threads import one_thread
from tests.tolerances import NORM_RTOL, STEP_ROUNDINGS, TINY, U

VOCABULARY, LENGTH, DIM, HEADS = 32, 12, 16, 2
N, UPDATES, CLIP = 4, 30, 1.0
RATE = 1e-2
# Small enough that rounding to bf16 loses most of an update.
SMALL_RATE = 1e-3
HALF_WAY = UPDATES // 2


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    with one_thread():
        yield


class Block(nn.Module):
    """Attention and a feed-forward layer, both after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.attention_in = nn.Linear(DIM, 3 * DIM, bias=False)
        self.attention_out = nn.Linear(DIM, DIM, bias=False)
        self.feed_forward = nn.Sequential(
            nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)
        )

    def forward(self, x: Tensor) -> Tensor:
        joint = self.attention_in(self.norms[0](x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(heads.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class Gpt(nn.Module):
    """Two blocks; the embedding is the output layer too, so that it gets two gradients at once."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.places = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.3)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def batch(micro_batch: int) -> tuple[Tensor, Tensor]:
    """Arithmetic progressions, drawn anew for each micro-batch, the same in every run."""
    generator = torch.Generator().manual_seed(micro_batch)
    starts = torch.randint(VOCABULARY, (2, 1), generator=generator)
    steps = torch.randint(1, 3, (2, 1), generator=generator)
    ids = (starts + steps * torch.arange(LENGTH + 1)) % VOCABULARY
    return ids[:, :-1], ids[:, 1:]


def rate_at(update: int, rate: float) -> float:
    """Warm-up, then half a cosine."""
    if update < 5:
        return rate * (update + 1) / 5
    return rate * 0.5 * (1 + math.cos(math.pi * (update - 5) / (UPDATES - 5)))


def configure(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay; biases and norms do not. The loop sets the rate."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return kind(groups, betas=(0.9, 0.95))  # type: ignore[call-arg]


def plain(model: nn.Module) -> Any:
    return configure(torch.optim.AdamW, model)


def nudged(model: nn.Module) -> Any:
    return configure(Nudged, model)


def ours(model: nn.Module) -> Any:
    return FusedAccumOptimizer(plain(model))


class Loop:
    """The loop; its `fp16` is autocast and a GradScaler that is enabled."""

    def __init__(
        self,
        make: Any,
        dtype: torch.dtype = torch.float32,
        fp16: bool = False,
        rate: float = RATE,
        seed: int = 0,
    ) -> None:
        # From weights that bf16 has too, so that runs of different precision start together.
        self.model = Gpt(seed).to(torch.bfloat16).to(dtype)
        self.optimizer = make(self.model)
        # At first too large, so that the first windows overflow; it grows again in mid-run.
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**22, growth_interval=10, enabled=fp16
        )
        self.scales: list[float] = []
        self.context = torch.autocast("cpu", torch.float16) if fp16 else contextlib.nullcontext()
        self.rate, self.update, self.micro = rate, 0, 0
        self.result = Run(self.model, self.optimizer)
        self.loss = 0.0

    def run(self, stop: int = UPDATES, micro: int = 0) -> Loop:
        """Go on to update `stop`, and to micro-batch `micro` of it."""
        while (self.update, self.micro) < (stop, micro):
            self.micro_batch()
            if self.micro == N:
                self.end_of_window()
        return self

    def micro_batch(self) -> None:
        with self.context:
            loss = self.model(*batch(self.update * N + self.micro)) / N
        self.scaler.scale(loss).backward()
        self.loss += float(loss.detach())
        self.micro += 1

    def end_of_window(self) -> None:
        rate = rate_at(self.update, self.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())
        self.optimizer.zero_grad(set_to_none=True)
        self.result.losses.append(self.loss)
        self.result.norms.append(float(norm))
        self.result.rates.append(rate)
        self.loss, self.micro, self.update = 0.0, 0, self.update + 1

    def checkpoint(self) -> bytes:
        """As a file has it."""
        held = io.BytesIO()
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iter": self.update,
        }
        # Of a window that is open, and of a scaler that is enabled.
        saved |= {"micro": self.micro, "scaler": self.scaler.state_dict(), "loss": self.loss}
        torch.save(saved, held)
        return held.getvalue()

    def resume(self, file: bytes, with_optimizer: bool = True) -> Loop:
        saved = torch.load(io.BytesIO(file), weights_only=True)
        self.model.load_state_dict(saved["model"])
        if with_optimizer:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.update, self.micro, self.loss = saved["iter"], saved["micro"], saved["loss"]
        return self


@functools.cache
def whole(make: Any, **how: Any) -> Loop:
    """A whole run, kept for the tests that compare with it."""
    return Loop(make, **how).run()


def run(make: Any, **how: Any) -> Run:
    return whole(make, **how).result


def test_the_run_is_the_plain_optimizers() -> None:
    """The scaler is there and disabled. A rate that is 1e-4 of itself off shows everywhere."""
    mine, stock, off = run(ours), run(plain), run(nudged)
    assert differences(mine, stock, off) == []
    assert stock.losses[-1] < 0.9 * stock.losses[0]  # it learned, so there was something to differ
    assert max(stock.norms) > CLIP  # clipping did something
    assert len(differences(run(ours, rate=RATE * 1.0001), stock, off)) == 4


def test_bf16_weights_stay_closer_to_fp32() -> None:
    """By its masters and its fp32 sums; forward and backward are bf16 in both."""
    exact = run(plain, rate=SMALL_RATE)
    stock, mine = (run(make, dtype=torch.bfloat16, rate=SMALL_RATE) for make in (plain, ours))
    assert distance(mine.model, exact.model) < distance(stock.model, exact.model) / 3


def violation(loop: Loop, other: Loop, before: Gpt) -> float:
    """How far two loops are apart after one update from `before`, in units of what it may round.

    Micro-gradients are those of one forward and backward, and fp32 sums of them in one order are
    the same, so what differs is the update.
    """
    worst = 0.0
    models = (loop.model, other.model, before)
    for p, q, old in zip(*(model.parameters() for model in models), strict=True):
        p, q, old = (t.detach().double() for t in (p, q, old))
        bound = STEP_ROUNDINGS * U * (old.abs() + (q - old).abs()) + TINY
        worst = max(worst, float(((p - q).abs() / bound).max()))
    return worst


@pytest.mark.parametrize("fp16", [False, True], ids=["scaler-disabled", "fp16-scaler"])
@pytest.mark.parametrize(
    ("saves", "loads"), [(ours, plain), (plain, ours)], ids=["wrapped-to-plain", "plain-to-wrapped"]
)
def test_checkpoints_are_exchanged_after_every_update(saves: Any, loads: Any, fp16: bool) -> None:
    """Each window is trained twice: by the run, and by the other kind from the run's checkpoint.

    In fp16 autocast rounding turns a difference of 1 u into one of 2**13 u, now and then, so that
    whole runs drift apart; windows that begin at the same point do not. Windows that overflow are
    among them.
    """
    loop, off = Loop(saves, fp16=fp16), 0.0
    for update in range(UPDATES):
        file, before = loop.checkpoint(), copy.deepcopy(loop.model)
        other = Loop(loads, fp16=fp16, seed=9).resume(file)
        assert are_equal(other.model, before)
        for either in (loop, other):
            either.run(update + 1)
        assert violation(loop, other, before) <= 1
        assert other.result.losses == loop.result.losses[-1:]
        assert other.result.norms == pytest.approx(
            loop.result.norms[-1:], rel=2 * NORM_RTOL, nan_ok=True
        )
        assert other.scaler.get_scale() == loop.scaler.get_scale()
        if update == HALF_WAY:
            forgetful = Loop(loads, fp16=fp16, seed=9).resume(file, with_optimizer=False)
            off = violation(loop, forgetful.run(update + 1), before)
    assert off > 1e3  # without the moments
    scales = whole(plain, fp16=fp16).scales
    assert whole(ours, fp16=fp16).scales == scales
    skipped = [not math.isfinite(norm) for norm in loop.result.norms]
    assert any(skipped) is fp16 and not all(skipped)
    assert any(b > a for a, b in pairwise(scales)) is fp16  # it grew, too


@pytest.mark.parametrize(
    ("saves", "loads"), [(ours, plain), (plain, ours)], ids=["wrapped-to-plain", "plain-to-wrapped"]
)
def test_a_run_that_changes_its_optimizer_half_way(saves: Any, loads: Any) -> None:
    """And goes on to the end: no farther from the plain run than roundings carry."""
    file = Loop(saves).run(HALF_WAY).checkpoint()
    changed = Loop(loads, seed=9).resume(file).run()
    stock = run(plain)
    allowed = distance(run(nudged).model, stock.model)
    assert distance(changed.model, stock.model) <= allowed
    assert changed.result.rates == stock.rates[HALF_WAY:]
    forgetful = Loop(loads, seed=9).resume(file, with_optimizer=False).run()
    assert distance(forgetful.model, stock.model) > 100 * allowed


@pytest.mark.parametrize(
    ("how", "micro"),
    # Each place in a window, each precision, and a scaler whose scale the window's sum carries.
    [
        ({}, 0), ({}, 3), ({"dtype": torch.bfloat16}, 1), ({"fp16": True}, 0), ({"fp16": True}, 3),
    ],
    ids=["fp32-0", "fp32-3", "bf16-1", "fp16-scaler-0", "fp16-scaler-3"],
)  # fmt: skip
def test_wrapped_to_wrapped_in_mid_window(how: dict[str, Any], micro: int) -> None:
    """Bit for bit, masters and the open window's sum included, which plain torch has no place for.

    The scale is saved as well: what the window holds is multiplied by it.
    """
    straight = whole(ours, **how)
    file = Loop(ours, **how).run(HALF_WAY, micro).checkpoint()
    resumed = Loop(ours, **how, seed=9).resume(file).run()
    assert are_equal(resumed.model, straight.model)
    assert resumed.result.losses == straight.result.losses[HALF_WAY:]
    assert resumed.scales == straight.scales[HALF_WAY:]
    saved, other = (loop.optimizer.state_dict()["state"] for loop in (straight, resumed))
    for index, entry in saved.items():
        for name, value in entry.items():
            assert torch.equal(value, other[index][name]), (index, name)

    stock = Loop(plain, **how).run(HALF_WAY, micro).checkpoint()
    loses_the_window = Loop(plain, **how, seed=9).resume(stock).run()
    assert are_equal(loses_the_window.model, whole(plain, **how).model) is (micro == 0)
