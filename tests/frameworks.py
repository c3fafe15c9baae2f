"""A tiny Llama, data, and what it means that two runs are the same, for the framework tests.

Two fp32 runs of 50 updates. Forward and backward are the same code, and fp32 accumulation adds the
same numbers in the same order, so the runs differ by the roundings of the update alone: at most
STEP_ROUNDINGS u (|param| + |step|) per update and element (see tolerances.py). How far training
carries such differences no formula says, so it is measured: the *nudged* run is the framework's own
run with the plain optimizer, each parameter moved at random by up to that bound after each update.
A run is the same as the plain one if it ends no farther from it than the nudged one does.

A logged loss or norm has roundings of its own beside those of the parameters: the last few sums of
the forward, the sum over N micro-batches, the division. CURVE_ROUNDINGS u of its value are granted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.threads import one_thread as one_thread
from tests.tolerances import STEP_ROUNDINGS, U

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from a config; nothing is downloaded
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

VOCABULARY, LENGTH = 32, 12
MICRO_BATCH = 2
UPDATES = 50
CURVE_ROUNDINGS = 16
# 39 micro-batches per epoch, so 9 windows of 4 and a last one of 3. The very last micro-batch holds
# one sequence instead of two.
N_SEQUENCES = 77

Batch = dict[str, Tensor]


def reset() -> None:
    """Forget the settings that Accelerate keeps per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def own_state() -> Iterator[None]:
    """Around a test, so that each has settings of its own."""
    with one_thread():
        yield
    reset()


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Two layers, 6,224 parameters; its bf16-rounded weights, whatever `dtype`, so that runs of
    different precision start at the same point."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).to(dtype)


def sequences(n: int = N_SEQUENCES) -> list[Batch]:
    """Arithmetic progressions; the first 0 to 7 labels are masked, so token counts differ."""
    generator = torch.Generator().manual_seed(1)

    def below(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    found = []
    for _ in range(n):
        ids = (below(VOCABULARY) + (1 + below(4)) * torch.arange(LENGTH)) % VOCABULARY
        labels = ids.clone()
        labels[: below(8)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(items: Iterable[Batch]) -> Batch:
    """Sequences to a micro-batch."""
    items = list(items)
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def n_tokens(batch: Batch) -> int:
    """Tokens that count in a causal language model's loss: the first label has no prediction."""
    return int((batch["labels"][..., 1:] != -100).sum())


class Nudged(torch.optim.AdamW):
    """AdamW whose every update is off by a random part of what rounding may do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        super().step(closure)
        generator = torch.Generator().manual_seed(sum(int(self.state[p]["step"]) for p in params))
        for p, old in zip(params, before, strict=True):
            direction = 2 * torch.rand(p.shape, generator=generator) - 1
            p += direction * STEP_ROUNDINGS * U * (p.abs() + (p - old).abs())


@dataclass
class Run:
    """What a run leaves: the model, and per update the loss, gradient norm and learning rate."""

    model: Any
    optimizer: Any
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def distance(a: Any, b: Any) -> float:
    """L2 distance of two models' parameters."""
    params = ([p.detach().double() for p in model.parameters()] for model in (a, b))
    pairs = zip(*params, strict=True)
    return math.sqrt(sum(float((p - q).square().sum()) for p, q in pairs))


def farthest(a: list[float], b: list[float]) -> float:
    """Largest difference of two curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def differences(run: Run, plain: Run, nudged: Run) -> list[str]:
    """In what `run` is not the same as `plain`; empty if it is. See the top of this file."""
    found = []
    allowed, is_off = distance(nudged.model, plain.model), distance(run.model, plain.model)
    if not is_off <= allowed:
        found.append(f"parameters are {is_off:.1e} apart, allowed {allowed:.1e}")
    for name in ("losses", "norms"):
        curve, curve_plain, curve_nudged = (getattr(r, name) for r in (run, plain, nudged))
        allowed = farthest(curve_nudged, curve_plain) + CURVE_ROUNDINGS * U * max(curve_plain)
        is_off = farthest(curve, curve_plain)
        if not is_off <= allowed:
            found.append(f"{name} are {is_off:.1e} apart, allowed {allowed:.1e}")
    if run.rates != plain.rates:
        found.append(f"learning rates {run.rates[:3]}... and {plain.rates[:3]}...")
    return found


def window_gradients(batches: list[Batch], by_tokens: bool = True) -> list[Tensor]:
    """The exact mean gradient of a window at the start of the run, in float64.

    Args:
        batches: the micro-batches.
        by_tokens: the mean over all their tokens (one big batch's gradient); else the mean of the
            micro-batches' means.
    """
    model = tiny_llama(torch.float64)
    total = sum(n_tokens(batch) for batch in batches)
    for batch in batches:
        share = n_tokens(batch) / total if by_tokens else 1 / len(batches)
        (model(**batch).loss * share).backward()
    return [p.grad for p in model.parameters()]


def relative_error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """L2 error of a list of tensors, relative to the exact ones."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, exact, strict=True)]
    error = sum(float((f - e).square().sum()) for f, e in pairs)
    return math.sqrt(error / sum(float(e.square().sum()) for _, e in pairs))


# A gradient of the tiny model in fp32 against float64: its forward and backward are sums of at most
# a few hundred products each, two layers deep, whose roundings mostly average out. Measured: 3e-7.
GRADIENT_RTOL = 5e-6

Wrap = Callable[[Any], Any]
