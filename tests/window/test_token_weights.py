"""Token weights: micro-batches of unequal length give the gradient of one big batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import Gradients
from tests.tolerances import U, gamma
from tests.twins import Twins, adamw, sgd

IGNORED = -100


def test_model_zero_grad_discards_the_weights_too() -> None:
    """Where the loop owns the window; the weights of what is gone would count on otherwise."""
    model = Gradients([torch.zeros(3), torch.zeros(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    for weight, value in ((100, 50.0), (10, 30.0), (2, 1.0), (6, 5.0)):
        if weight == 2:
            assert opt.micro_batches == 2
            model.zero_grad()
        with opt.micro_batch(weight=weight):
            model.backward([torch.full((3,), value), None])
    assert opt.micro_batches == 2
    opt.step()
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -4.0))


def test_an_unweighted_gradient_of_what_was_unfrozen_is_not_weighed_against_others() -> None:
    """Autograd itself kept it, so that no hook could refuse the backward."""
    model = Gradients([torch.zeros(3), torch.zeros(2)])
    model.params[1].requires_grad_(False)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2)
    with opt.micro_batch(weight=2):
        model.backward([torch.ones(3), None])
    opt.step()
    model.params[1].requires_grad_(True)
    model.backward([None, torch.ones(2)])
    with pytest.raises(RuntimeError, match=r"outside micro_batch\(weight=\.\.\.\)"):
        opt.step()
    assert opt.micro_batches == 1
    opt.zero_grad()  # which drops it, and keeps the window
    with opt.micro_batch(weight=6):
        model.backward([torch.zeros(3), torch.ones(2)])
    opt.step()
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -0.25))
    torch.testing.assert_close(model.params[1].detach(), torch.full((2,), -0.75))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("how", ["assigned", "unfrozen"])
def test_a_gradient_that_no_hook_saw_is_not_weighed_against_others(
    how: str, weighted: bool
) -> None:
    """The same as where a hook saw it, which depends on whether a checkpoint had states of it."""
    model = Gradients([torch.zeros(3), torch.zeros(2)])
    model.params[1].requires_grad_(how == "assigned")
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 3)
    with opt.micro_batch(weight=4) if weighted else contextlib.nullcontext():
        if how == "assigned":
            model.params[1].grad = torch.ones(2)
        else:
            model.params[1].requires_grad_(True)
            model.backward([None, torch.ones(2)])
    opt.step()
    words = "outside" if weighted else "inside"
    other = contextlib.nullcontext() if weighted else opt.micro_batch(weight=4)
    with pytest.raises(RuntimeError, match=rf"{words} micro_batch\(weight=\.\.\.\)"), other:
        model.backward([torch.ones(3), None])


def test_a_micro_batch_without_a_gradient_keeps_its_weight() -> None:
    """Its gradient is zero: nothing was discarded."""
    model = Gradients([torch.zeros(3), torch.zeros(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    with opt.micro_batch(weight=3):
        pass
    with opt.micro_batch(weight=1):
        model.backward([torch.full((3,), 8.0), None])
    opt.step()
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -2.0))


# --- a causal language model on padded batches ---


def causal_lm(dtype: torch.dtype = torch.float32) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


# Lengths of the sequences of each micro-batch, first short answers and then long ones.
LENGTHS = [(3, 5), (4, 2), (31, 40), (6, 48)]
Batch = tuple[Tensor, Tensor, Tensor]


def padded(lengths: Sequence[int], to: int | None = None, seed: int = 0) -> Batch:
    """Tokens, attention mask and labels; a sequence's tokens depend on its length only."""
    width = to or max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + length)
        tokens[row, :length] = torch.randint(1, 61, (length,), generator=generator)
        mask[row, :length] = 1
    return tokens, mask, tokens.masked_fill(mask == 0, IGNORED)


def n_predicted(batch: Batch) -> int:
    """Labels that the loss averages over: all but the first of every sequence."""
    return int((batch[2][:, 1:] != IGNORED).sum())


def mean_loss(model: Any, batch: Batch) -> Tensor:
    """The mean over this micro-batch's tokens, as every framework computes it."""
    tokens, mask, labels = batch
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)


def gradient(model: Any, batch: Batch) -> list[Tensor]:
    return [*torch.autograd.grad(mean_loss(model, batch), [*model.parameters()])]


def update(lengths: Sequence[Sequence[int]], steps: int | None, *, weighted: bool) -> list[Tensor]:
    """The gradient that one update takes: weights stand still, momentum shows it."""
    model = causal_lm()
    inner = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    opt = FusedAccumOptimizer(inner, steps)
    for group in lengths:
        batch = padded(group)
        if weighted:
            with opt.micro_batch(weight=n_predicted(batch)):
                mean_loss(model, batch).backward()
        else:
            (mean_loss(model, batch) / (1 if steps else len(lengths))).backward()
        if steps:
            opt.step()
            opt.zero_grad()
    if steps is None:
        opt.step()
    elif not opt.window_closed:
        opt.flush()
    assert opt.window_closed
    return [opt.state[p]["momentum_buffer"] for p in model.parameters()]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative, in the Euclidean norm over all parameters."""
    pairs = [*zip(found, exact, strict=True)]
    off = sum(float((f.double() - e.double()).square().sum()) for f, e in pairs)
    return float((off / sum(float(e.double().square().sum()) for e in exact)) ** 0.5)


# Window sizes that are filled, left short and owned by the loop.
WINDOWS = {"full": 4, "flushed": 7, "loop-owned": None}


@pytest.mark.parametrize("steps", WINDOWS.values(), ids=WINDOWS)
def test_trl_2175_token_weights_give_the_big_batchs_gradient(steps: int | None) -> None:
    """trl#2175, the loss-normalisation bug of October 2024: accumulated micro-batches of unequal
    length did not train as the big batch does.

    Exact is the one big padded batch in float64. The bound is what fp32 itself does to the big
    batch, three times: micro-batches round in other places, with other widths of padding.
    """
    big = padded([length for group in LENGTHS for length in group])
    exact = gradient(causal_lm(torch.float64), big)
    own = max(error(gradient(causal_lm(), big), exact), gamma(len(LENGTHS) + 4))
    assert own < 100 * U, "fp32 itself is no yardstick"
    assert error(update(LENGTHS, steps, weighted=True), exact) <= 3 * own


@pytest.mark.parametrize("steps", WINDOWS.values(), ids=WINDOWS)
def test_the_mean_of_means_is_another_gradient(steps: int | None) -> None:
    """The control, and the bug: 10 short answers' tokens count as much as 123 long ones'."""
    exact = gradient(causal_lm(torch.float64), padded([n for group in LENGTHS for n in group]))
    off = error(update(LENGTHS, steps, weighted=False), exact)
    assert off > 0.2
    # Micro-batches of one length each need no weights: both are the big batch's gradient.
    even = [(9, 12)] * 4
    exact = gradient(causal_lm(torch.float64), padded([n for group in even for n in group]))
    assert error(update(even, steps, weighted=False), exact) < 1e-5
    assert error(update(even, steps, weighted=True), exact) < 1e-5


def test_the_weights_need_not_be_known_beforehand() -> None:
    """Whatever was to come: an update is the mean of what has come."""
    for count in (1, 2, 3):
        groups = LENGTHS[:count]
        exact = gradient(causal_lm(torch.float64), padded([n for group in groups for n in group]))
        assert error(update(groups, 4, weighted=True), exact) < 1e-5


@pytest.mark.parametrize("steps", [4, None], ids=["counted", "loop-owned"])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_with_weights(dtype: torch.dtype, make: Any, steps: int | None) -> None:
    """Three windows, the last one short: the plain optimizer in fp32 on the weighted mean."""
    twins = Twins(causal_lm(dtype), mean_loss, make, steps)
    for i, count in enumerate((4, 4, 3)):
        batches = [padded(group, seed=i) for group in LENGTHS[:count]]
        twins.window(batches, [float(n_predicted(b)) for b in batches])
    assert twins.violation() <= 1
    # The control: the same windows, as if all weights were one.
    control = Twins(causal_lm(dtype), mean_loss, make, steps)
    batches = [padded(group) for group in LENGTHS]
    control._follow(batches, [1.0] * 4)
    for batch in batches:
        with control.opt.micro_batch(weight=n_predicted(batch)):
            mean_loss(control.ours, batch).backward()
        if steps:
            control.opt.step()
    if steps is None:
        control.opt.step()
    assert control.violation() > 100


def test_bf16_gradients_are_weighed_in_fp32() -> None:
    """The token mean of bf16 micro-gradients, as exact as fp32 can add them; in bf16 it is not."""
    model = causal_lm(torch.bfloat16)
    batches = [padded(group, seed=i) for i in range(8) for group in LENGTHS]
    weights = [n_predicted(batch) for batch in batches]
    micro = [gradient(model, batch) for batch in batches]
    shares = [w / sum(weights) for w in weights]
    exact = [
        torch.stack([s * g.double() for s, g in zip(shares, gs, strict=True)]).sum(0)
        for gs in zip(*micro, strict=True)
    ]
    low = [torch.zeros_like(g) for g in micro[0]]
    for share, gs in zip(shares, micro, strict=True):
        for total, g in zip(low, gs, strict=True):
            total += share * g
    inner = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    opt = FusedAccumOptimizer(inner, len(batches))
    for batch, weight in zip(batches, weights, strict=True):
        with opt.micro_batch(weight=weight):
            mean_loss(model, batch).backward()
        opt.step()
    ours = [opt.state[p]["momentum_buffer"] for p in model.parameters()]
    assert error(ours, exact) < gamma(len(batches) + 4)
    assert error(low, exact) > 1e-3
