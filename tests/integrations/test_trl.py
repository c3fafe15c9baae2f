"""TRL's SFTTrainer and DPOTrainer with the wrapper, in the manner of test_trainer.py.

Everything is made on the spot: the model from a config, the tokenizer from a list of words, the
data from Python lists. TRL's own settings stay (it checkpoints activations, say), but for bf16
autocast, which it turns on unasked.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import frameworks as fw
from tests.frameworks import own_state as own_state

for package in ("trl", "peft", "datasets", "tokenizers"):
    pytest.importorskip(package)

import datasets  # noqa: E402
import peft  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from fusedaccum import FusedAccumOptimizer  # noqa: E402
from tests.same_runs import are_equal  # noqa: E402

WORDS = [*"abcdefghijklmnop"]
# Updates and learning rates; the small rate is one where bf16 rounds much of an update away.
UPDATES = {"sft": 12, "sft-lora": 12, "sft-bf16-lora": 12, "dpo": 12}
RATES = {"sft": 1e-2, "sft-lora": 1e-2, "dpo": 1e-3}
SMALL_RATES = {"sft": 3e-4, "sft-bf16-lora": 1e-3, "dpo": 3e-4}
CLIP = 0.5
BF16 = torch.bfloat16
UNUSED = tempfile.TemporaryDirectory()  # the Trainer makes its folder, saved to or not


@functools.cache
def tokenizer() -> Any:
    """A token per word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def rows(kind: str) -> Any:
    """Prompts, and completions that continue the list of words; token counts differ."""
    draw = random.Random(0)
    found = []
    for _ in range(45):  # 23 micro-batches: 5 windows of 4, and one of 3
        start, length = draw.randrange(len(WORDS)), draw.randint(2, 7)
        right = [WORDS[(start + 2 + i) % len(WORDS)] for i in range(length)]
        row = {"prompt": f"{WORDS[start]} {WORDS[(start + 1) % len(WORDS)]}"}
        if kind == "dpo":
            wrong = draw.sample(WORDS, length)
            row |= {"chosen": " ".join(["", *right]), "rejected": " ".join(["", *wrong])}
        else:
            row["completion"] = " ".join(["", *right])
        found.append(row)
    return datasets.Dataset.from_list(found)


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Its bf16-rounded weights, whatever `dtype`: runs of different precision start together."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).to(dtype)


def with_bf16_adapters(dtype: torch.dtype) -> Any:
    """LoRA in the model's dtype; where it is left to PEFT and TRL, adapters are fp32."""
    model = peft.get_peft_model(llama(dtype), lora(), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator).bfloat16())
    return model


def lora() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(
    kind: str,
    wrap: fw.Wrap,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    out: Path | None = None,
    callbacks: Any = None,
    **changes: Any,
) -> Any:
    """A trainer of TRL; `wrap` gets the optimizer that it itself would use."""
    settings = fw.trainer_settings(out or UNUSED.name) | {
        "bf16": False,
        "learning_rate": RATES.get(kind),
        "max_grad_norm": CLIP,
        "max_steps": UPDATES[kind],
    }
    more: dict[str, Any] = {
        "train_dataset": rows(kind),
        "processing_class": tokenizer(),
        "callbacks": callbacks,
    }
    if kind == "sft-bf16-lora":
        model = with_bf16_adapters(dtype)
    elif kind == "sft-lora":
        model = llama(dtype)  # which a checkpoint does not hold
        torch.manual_seed(seed)
        more["peft_config"] = lora()
    else:
        model = llama(dtype, seed)
    if kind == "dpo":
        arguments = trl.DPOConfig(**(settings | changes))
        made = trl.DPOTrainer(model, llama(dtype), args=arguments, **more)
    else:
        arguments = trl.SFTConfig(**(settings | changes))
        made = trl.SFTTrainer(model, args=arguments, **more)
    made.optimizer = wrap(made.create_optimizer())
    return made


@functools.cache
def run(kind: str, how: str, dtype: torch.dtype = torch.float32, small: bool = False) -> fw.Run:
    """A whole run, kept for the tests that compare with it."""
    made = trainer(
        kind, fw.WRAPS[how], dtype, learning_rate=(SMALL_RATES if small else RATES)[kind]
    )
    result = fw.finished(made)
    assert made.state.global_step == UPDATES[kind] == len(result.losses)
    fw.reset()
    return result


@pytest.mark.parametrize("kind", list(RATES))
def test_the_run_is_the_plain_optimizers(kind: str) -> None:
    """Losses, logged norms, parameters; with partial windows and clipping."""
    ours, plain, nudged = (run(kind, how) for how in ("ours", "plain", "nudged"))
    assert fw.differences(ours, plain, nudged) == []
    assert plain.losses[-1] < 0.8 * plain.losses[0]  # it learned, so there was something to differ
    assert max(plain.norms) > CLIP  # clipping did something
    trained = [p for p in ours.model.parameters() if p.requires_grad]
    assert {float(ours.optimizer.state[p]["step"]) for p in trained} == {UPDATES[kind]}
    assert len(fw.differences(run(kind, "faster"), plain, nudged)) == 4


@pytest.mark.parametrize("kind", list(SMALL_RATES))
def test_bf16_weights_stay_closer_to_fp32(kind: str) -> None:
    """At a rate where bf16 rounds updates away, as in fine-tuning; forwards are bf16 in both."""
    exact = run(kind, "plain", small=True)
    plain, ours = (run(kind, how, BF16, small=True) for how in ("plain", "ours"))
    trained = [p for p in ours.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {BF16} and "split master" in repr(ours.optimizer)
    assert fw.distance(ours.model, exact.model) < fw.distance(plain.model, exact.model) / 3


class Killed(Exception):
    """What ends a run here."""


class Kill(transformers.TrainerCallback):
    """Ends the run in the second micro-batch after some update."""

    def __init__(self, update: int) -> None:
        self.update, self.micro_batches = update, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batches += state.global_step == self.update
        if self.micro_batches == 2:
            raise Killed


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("sft", torch.float32), ("sft", BF16), ("sft-lora", BF16), ("dpo", BF16)],
    ids=["sft-fp32", "sft-bf16", "sft-lora-bf16", "dpo-bf16"],
)
def test_killed_and_resumed(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In mid-window and mid-epoch; the last checkpoint of the Trainer goes on to the bit."""
    settings: dict[str, Any] = {"out": tmp_path, "save_strategy": "steps", "save_steps": 4}
    killed = trainer(kind, FusedAccumOptimizer, dtype, callbacks=[Kill(9)], **settings)
    with pytest.raises(Killed):
        killed.train()
    assert killed.state.global_step == 9
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-8"]
    checkpoint = tmp_path / saved[-1]

    whole = run(kind, "ours", dtype)
    fw.reset()
    resumed = trainer(kind, FusedAccumOptimizer, dtype, seed=9, **settings)
    again = fw.finished(resumed, resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == UPDATES[kind]
    assert are_equal(again.model, whole.model)
    assert again.losses == whole.losses and again.rates == whole.rates

    if (kind, dtype) != ("sft", BF16):
        return
    (checkpoint / "optimizer.pt").unlink()  # the control: without moments and masters
    fw.reset()
    without = trainer(kind, FusedAccumOptimizer, dtype, **settings)
    fw.finished(without, resume_from_checkpoint=str(checkpoint))
    assert not are_equal(without.model, whole.model)
