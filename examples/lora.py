"""Fine-tune a transformers model with LoRA: a frozen bf16 base, adapters trained by fusedaccum.

Nothing is downloaded: a small Llama is made from a config and first trained, all of it, on the
source of Python's standard library. Then its weights are frozen, PEFT puts adapters on it, and they
learn another kind of text, the reference manual that the library holds for `help()`. With a
checkpoint of your own, replace `make_base` by `AutoModelForCausalLM.from_pretrained(...)`; the rest
stays.

The wrapper gives memory only to what requires a gradient. Adapters may be fp32 (PEFT's default) or,
with `--adapters bfloat16`, bf16 with exact fp32 masters in 2 more bytes per parameter.

Run `python examples/lora.py` (needs transformers and peft).
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # all that is needed is here

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import LlamaConfig, LlamaForCausalLM

from fusedaccum import FusedAccumOptimizer


def make_base(args: argparse.Namespace) -> Any:
    """A byte-level Llama in bf16, with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.dim,
        intermediate_size=3 * args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.dim // 32),
        max_position_embeddings=args.block,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(args.device, torch.bfloat16)


def read_bytes(files: Iterable[Path], limit: int = 2_000_000) -> Tensor:
    text = bytearray().join(file.read_bytes() for file in files)[:limit]
    return torch.frombuffer(text, dtype=torch.uint8)


def batches(text: Tensor, args: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    """Micro-batches of random pieces of the text, without end."""
    generator = torch.Generator().manual_seed(seed)
    shape = (args.micro_batch, 1)
    while True:
        starts = torch.randint(0, len(text) - args.block, shape, generator=generator)
        yield text[starts + torch.arange(args.block)].long().to(args.device)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


@torch.no_grad()
def evaluate(model: Any, text: Tensor, args: argparse.Namespace) -> float:
    loader = batches(text, args, seed=99)
    losses = [loss_of(model, batch) for _, batch in zip(range(16), loader, strict=False)]
    return float(torch.stack(losses).mean())


def train(model: Any, text: Tensor, args: argparse.Namespace, lr: float, updates: int) -> None:
    """N micro-batches per update, clipping and schedule included."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(trainable, lr=lr),
        gradient_accumulation_steps=args.n,
        max_grad_norm=1.0,
    )
    scheduler = CosineAnnealingLR(opt, updates)
    began = time.perf_counter()
    for batch in batches(text, args, seed=0):
        loss_of(model, batch).backward()  # not divided by N
        opt.step()  # every N-th call updates
        opt.zero_grad()  # inside a window this keeps what was accumulated
        if opt.window_closed:
            scheduler.step()
            if scheduler.last_epoch == updates:
                break
    print(opt)
    states = sum(s.numel() * s.element_size() for e in opt.state.values() for s in e.values())
    gradients = 4 * sum(p.numel() for p in trainable)
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds = time.perf_counter() - began
    print(
        f"{updates} updates in {seconds:.1f} s; model {everything / 1e6:.2f} MB, "
        f"accumulators {gradients / 1e6:.2f} MB, optimizer states {states / 1e6:.2f} MB\n"
    )
    opt.detach()  # the plain model again, to be saved, merged or trained otherwise


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base-updates", type=int, default=200, help="updates of the whole model")
    parser.add_argument("--updates", type=int, default=100, help="updates of the adapters")
    parser.add_argument("--n", type=int, default=4, help="micro-batches per window")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--block", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=96, help="width; a multiple of 32")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is learned")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0 and name != "seed":
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.dim % 32:
        parser.error(f"--dim must be a multiple of 32, got {args.dim}")
    if args.quick:
        args.base_updates, args.updates, args.dim, args.block = 2, 2, 32, 16
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)  # a model this small gains little from more
    torch.manual_seed(args.seed)
    root = Path(sysconfig.get_paths()["stdlib"])
    source = read_bytes(sorted(root.glob("*.py")))
    manual = read_bytes([root / "pydoc_data" / "topics.py"])
    held_out, manual = manual[: len(manual) // 8], manual[len(manual) // 8 :]

    print("the base, all of it, on source code")
    base = make_base(args)
    train(base, source, args, lr=3e-3, updates=args.base_updates)
    before = evaluate(base, held_out, args)

    print("adapters, on the manual")
    base.requires_grad_(False)
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)  # fp32 adapters, whatever the base is
    if args.adapters == "bfloat16":
        model.to(torch.bfloat16)  # before the optimizer is wrapped
    train(model, manual, args, lr=1e-2, updates=args.updates)
    after = evaluate(model, held_out, args)
    print(f"loss on held-out text of the manual: {before:.3f} before, {after:.3f} after")

    # What is saved is PEFT's own format; a new process loads it onto the same base.
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        base = model.unload()  # the base without its adapters
        again = PeftModel.from_pretrained(base, directory)
        print(f"loaded again: {evaluate(again, held_out, args):.3f}")


if __name__ == "__main__":
    main()
