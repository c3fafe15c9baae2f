"""LoRA through PEFT on a tiny Llama with a frozen bf16 base; tied embeddings, trained fully."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.memory import LiveBytes
from fusedaccum import FusedAccumOptimizer
from tests.tolerances import equal_bits
from tests.twins import Twins, adamw, sgd

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks about themselves

DTYPES = {"fp32-adapters": torch.float32, "bf16-adapters": torch.bfloat16}


def base(dtype: torch.dtype = torch.bfloat16, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).to(dtype)


def config(**options: Any) -> LoraConfig:
    # init_lora_weights=False: B starts as zeros otherwise, and A without a gradient.
    modules = ["q_proj", "v_proj", "down_proj"]
    options = {"target_modules": modules, "init_lora_weights": False, **options}
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)


def lora(adapters: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """PEFT makes adapters fp32 unless told otherwise."""
    made = get_peft_model(base(**options), config(), autocast_adapter_dtype=False)
    for p in made.parameters():
        if p.requires_grad:
            p.data = p.data.to(adapters)
    return made


def batches(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (2, 9), generator=generator) for _ in range(n)]


def loss(model: Any, batch: Tensor) -> Tensor:
    out: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return out


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_lora_is_the_plain_optimizer_in_fp32(dtype: torch.dtype, make: Any) -> None:
    twins = Twins(lora(dtype), loss, make)
    frozen = {n: p.clone() for n, p in twins.ours.named_parameters() if not p.requires_grad}
    for i, n in enumerate((4, 4, 3)):
        twins.window(batches(n, i))
    assert twins.violation() <= 1
    assert len(twins.exact) == 12
    for name, p in twins.ours.named_parameters():
        if name in frozen:
            assert p.grad is None and equal_bits(p, frozen[name])
    # The control: one micro-batch of the last window replaced.
    control = Twins(lora(dtype), loss, make)
    control.window(batches(4))
    control._follow(batches(4, 1), [1.0] * 4)
    for batch in [*batches(3, 1), batches(1, 7)[0]]:
        loss(control.ours, batch).backward()
        control.opt.step()
    assert control.violation() > 100


def test_peft_makes_fp32_adapters_of_a_bf16_model() -> None:
    made = get_peft_model(base(), config())
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    twins = Twins(made, loss)
    twins.window(batches(4))
    assert twins.violation() <= 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_only_adapters_get_memory(dtype: torch.dtype) -> None:
    """Accumulator, remainder or nothing, momentum; nothing for the frozen base."""
    model = lora(dtype, hidden=128)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = sum(p.numel() for p in trained)
    frozen = sum(p.numel() for p in model.parameters()) - adapters
    assert frozen > 10 * adapters
    with LiveBytes([*model.parameters(), *model.buffers(), *batches(4)]) as count:
        before = count.live
        opt = FusedAccumOptimizer(sgd(model.parameters()), 2)  # all of them, frozen ones too
        for batch in batches(4):
            loss(model, batch).backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
        del batch
        live = count.live - before
    per_parameter = 4 + 4 + (2 if dtype is torch.bfloat16 else 0)
    # Besides: slots are aligned to 16 elements, tables take a few dozen bytes per tensor.
    assert per_parameter * adapters <= live <= per_parameter * adapters + 1024 * len(trained)
    assert live < 2 * frozen  # a bf16 gradient of the base would take as much
    assert set(opt._core.collector.slots) == set(trained)
    assert set(opt.state) == set(trained)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_checkpointing(dtype: torch.dtype, reentrant: bool) -> None:
    model = lora(dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    twins = Twins(model.train(), loss)
    for i in range(3):
        twins.window(batches(4, i))
    assert twins.violation() <= 1
    # Checkpointing is one thing, the result another: the same as without.
    without = Twins(lora(dtype), loss)
    for i in range(3):
        without.window(batches(4, i))
    pairs = zip(model.parameters(), without.ours.parameters(), strict=True)
    assert all(equal_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_adapter_added_in_mid_run(dtype: torch.dtype) -> None:
    twins = Twins(lora(dtype), loss, adamw)
    twins.window(batches(4))

    def add(model: Any) -> None:
        torch.manual_seed(1)
        model.add_adapter("second", config())
        model.base_model.set_adapter(["default", "second"])

    added = twins.add(add)
    assert len(added) == 12 and "group 1" in repr(twins.opt)
    for i in range(3):
        twins.window(batches(4, 1 + i))
    assert twins.violation() <= 1
    second = twins.parameters(added)[0]
    assert float(twins.opt.state[second]["step"]) == 3
    assert float(twins.opt.state[twins.parameters(twins.exact)[0]]["step"]) == 4


def test_adapters_trained_in_turn() -> None:
    """`set_adapter` freezes the others: they are left as they are, momentum and all."""
    model = lora()
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    twins = Twins(model, loss, adamw)
    for i, name in enumerate(("default", "second", "default")):
        for either in (twins.ours, twins.twin):
            either.set_adapter(name)
            either.zero_grad()
        twins.window(batches(4, i))
    assert twins.violation() <= 1
    steps = {
        name: float(twins.opt.state[p]["step"])
        for name, p in zip(twins.exact, twins.parameters(twins.exact), strict=True)
    }
    assert all(s == (2 if "default" in name else 1) for name, s in steps.items())


def test_adapters_switched_off_inside_a_window() -> None:
    """As preference optimisation does, for the reference model's answer."""
    model = lora(torch.bfloat16)
    twins = Twins(model, loss)

    def with_reference(model: Any, batch: Tensor) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = loss(model, batch)
        out = loss(model, batch)
        assert not torch.equal(out, reference)
        return (out - reference).square()

    twins.loss = with_reference
    for i in range(3):
        twins.window(batches(4, i))
    assert twins.violation() <= 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_merging(dtype: torch.dtype) -> None:
    """Merged for an evaluation, also inside a window, and taken apart again; merged at the end."""
    twins = Twins(lora(dtype), loss)
    plain_loss, merges = twins.loss, []

    def evaluated_between(model: Any, batch: Tensor) -> Tensor:
        model.merge_adapter()
        with torch.no_grad():
            merges.append(float(loss(model, batch)))
        model.unmerge_adapter()
        return plain_loss(model, batch)

    twins.window(batches(4))
    twins.loss = evaluated_between
    twins.window(batches(4, 1))
    assert len(merges) == 8
    twins.loss = plain_loss
    twins.window(batches(4, 2))
    assert twins.violation() <= 1

    before = loss(twins.ours, batches(1)[0])
    twins.opt.detach()
    merged = twins.ours.merge_and_unload()
    assert isinstance(merged, LlamaForCausalLM)
    # The merged weights are rounded to bf16, 2**-9; the loss of some 64 products each of them.
    torch.testing.assert_close(loss(merged, batches(1)[0]), before, rtol=2e-2, atol=2e-2)
    # And trains on as any model, fully.
    twins = Twins(merged.requires_grad_(True), loss)
    twins.window(batches(4, 3))
    assert twins.violation() <= 1


def continued(model: Any, opt: FusedAccumOptimizer, start: int, stop: int) -> None:
    for batch in batches(12)[start:stop]:
        loss(model, batch).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("stop", [6, 8], ids=["mid-window", "between-windows"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_saved_and_reloaded(tmp_path: Path, dtype: torch.dtype, stop: int) -> None:
    """`save_pretrained` keeps the adapter, `state_dict` the rest: bit-identical continuation."""
    model = lora(dtype)
    opt = FusedAccumOptimizer(adamw(p for p in model.parameters() if p.requires_grad), 4)
    continued(model, opt, 0, stop)
    model.save_pretrained(tmp_path)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    continued(model, opt, stop, 12)

    other = PeftModel.from_pretrained(
        base(), tmp_path, is_trainable=True, autocast_adapter_dtype=dtype is torch.float32
    )
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {dtype}
    opt = FusedAccumOptimizer(adamw(p for p in other.parameters() if p.requires_grad), 4)
    opt.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert opt.micro_batches == stop % 4
    continued(other, opt, stop, 12)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(equal_bits(a.detach(), b.detach()) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_adapter_loaded_over_the_one_in_training(tmp_path: Path, dtype: torch.dtype) -> None:
    """What `load_adapter` writes wins over the masters, and training goes on from it."""
    model = lora(dtype)
    opt = FusedAccumOptimizer(sgd(p for p in model.parameters() if p.requires_grad), 4)
    continued(model, opt, 0, 4)
    model.save_pretrained(tmp_path)
    saved = [p.detach().clone() for p in model.parameters()]
    continued(model, opt, 4, 8)
    changed = zip(saved, model.parameters(), strict=True)
    assert not all(equal_bits(a, b.detach()) for a, b in changed)
    model.load_adapter(
        tmp_path,
        "default",
        is_trainable=True,
        autocast_adapter_dtype=dtype is torch.float32,
    )
    restored = zip(saved, model.parameters(), strict=True)
    assert all(equal_bits(a, b.detach()) for a, b in restored)
    opt.param_groups[0]["lr"] = 0.0
    continued(model, opt, 8, 12)
    kept = zip(saved, model.parameters(), strict=True)
    assert all(equal_bits(a, b.detach()) for a, b in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reentrant", [None, True], ids=["", "reentrant-checkpoints"])
def test_tied_embeddings_trained_fully(dtype: torch.dtype, reentrant: bool | None) -> None:
    """GPT-2's output layer is its embedding: one accumulator, both uses in it."""
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**size, **dropout)).to(dtype)
    assert model.lm_head.weight is model.transformer.wte.weight
    if reentrant:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    twins = Twins(model.train(), loss)
    for i, n in enumerate((4, 4, 2)):
        twins.window(batches(n, i))
    assert twins.violation() <= 1
    assert len(twins.exact) == len([*model.parameters()]) == len(twins.opt._core.collector.slots)


@pytest.mark.parametrize("issue", ["peft#341", "diffusers#8871"])
def test_fp16_adapters_under_a_grad_scaler(issue: str) -> None:
    """ "Attempting to unscale FP16 gradients": the plain loop's end. Here `p.grad` is fp32.

    peft#341 is a model loaded in fp16 throughout, diffusers#8871 fp16 adapters on a base of another
    dtype.
    """
    model = lora(torch.float16, dtype=torch.float16 if issue == "peft#341" else torch.float32)
    plain = copy.deepcopy(model)

    def window(model: Any, opt: Any, scaler: Any) -> None:
        for batch in batches(4):
            with torch.autocast("cpu", torch.float16):
                out = loss(model, batch)
            scaler.scale(out / 4).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        window(plain, sgd(plain.parameters()), torch.amp.GradScaler("cpu", init_scale=128.0))
    opt = FusedAccumOptimizer(sgd(p for p in model.parameters() if p.requires_grad))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().double() for p in trained]
    window(model, opt, torch.amp.GradScaler("cpu", init_scale=128.0))

    # The first update of SGD is -lr times the clipped mean gradient, here from the plain model,
    # whose fp16 gradients of a loss of the same scale are the same, summed in float64.
    total = [torch.zeros_like(p) for p in before]
    theirs = [p for p in plain.parameters() if p.requires_grad]
    for batch in batches(4):
        plain.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = loss(plain, batch)
        (out * 32.0).backward()
        for sum_, p in zip(total, theirs, strict=True):
            assert p.grad is not None
            sum_ += p.grad.double() / 128.0
    norm = torch.stack([t.square().sum() for t in total]).sum().sqrt()
    coefficient = min(1.0, 1.0 / float(norm))
    masters = [e["master_param"] for e in opt.state_dict()["state"].values()]
    for b, t, p, master in zip(before, total, trained, masters, strict=True):
        expected = b - 0.01 * coefficient * t
        assert not torch.equal(master.double(), b)
        torch.testing.assert_close(master.double(), expected, rtol=1e-6, atol=1e-9)
        assert equal_bits(p.detach(), master.half())
