"""A tiny Llama, data and settings for the framework tests."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.same_runs import Nudged as Nudged
from tests.same_runs import Run as Run
from tests.same_runs import differences as differences
from tests.same_runs import distance as distance
from tests.same_runs import farthest as farthest
from tests.threads import one_thread as one_thread

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from a config; nothing is downloaded
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
# Else their first use would import them, thousands of modules, and tests.frozen would miss them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert transformers.Trainer and transformers.LlamaForCausalLM

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

VOCABULARY, LENGTH = 32, 12
MICRO_BATCH = 2
UPDATES = 20  # with N = 4 two epochs, each with a partial last window
# 39 micro-batches per epoch, so 9 windows of 4 and a last one of 3. The very last micro-batch holds
# one sequence instead of two.
N_SEQUENCES = 77

Batch = dict[str, Tensor]
Wrap = Callable[[Any], Any]


def reset() -> None:
    """Forget the settings that Accelerate keeps per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """Around each test of a file that imports it, so that each has settings of its own."""
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


def trainer_settings(out: Path | str) -> dict[str, Any]:
    """Arguments of a short run on the CPU of any Trainer, with everything logged."""
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": 4,
        "max_steps": UPDATES,
        "lr_scheduler_type": "linear",
        "seed": 0,
    }


def finished(made: Any, **how: Any) -> Run:
    """Train, and read the log."""
    made.train(**how)
    rows = [row for row in made.state.log_history if "loss" in row]
    return Run(
        made.model,
        made.optimizer.optimizer,
        *([row.get(key) for row in rows] for key in ("loss", "grad_norm", "learning_rate")),
    )


def nudge(optimizer: Any) -> Any:
    return Nudged(optimizer.param_groups)


def faster(optimizer: Any) -> Any:
    """Another learning rate by 1e-4 of itself: small, but no rounding."""
    for group in optimizer.param_groups:
        group["lr"] *= 1.0001
    return FusedAccumOptimizer(optimizer)


# What the runs of a Trainer do to the optimizer that it made.
WRAPS: dict[str, Wrap] = {
    "plain": lambda optimizer: optimizer,
    "nudged": nudge,
    "faster": faster,
    "ours": FusedAccumOptimizer,
}


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
