"""Train a small byte-level GPT-2 in bf16 with a loop of your own, Accelerate and fusedaccum.

    python examples/accelerate_loop.py            half a minute on a CPU; on a GPU it runs there
    python examples/accelerate_loop.py --quick    a few seconds, nothing is learned

The loop is that of Accelerate's documentation. accumulate() counts the window and backward()
divides the loss; the wrapper makes `p.grad` an fp32 accumulator of the bf16 weights and keeps
fp32-precise masters. Only the lines marked (*) are about it. The text is the source of Python's
standard library: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, GPT2Config

import fusedaccum


def read_blocks(block: int, n_blocks: int) -> Tensor:
    """Blocks of the standard library's source, a token per byte."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray().join(f.read_bytes() for f in sorted(root.glob("*.py")))
    n = len(text) // block
    if n < n_blocks:
        raise SystemExit(f"too little Python source under {root}: is the library installed?")
    return torch.frombuffer(text[: n * block], dtype=torch.uint8).view(n, block)[:n_blocks].long()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--n", type=int, default=4, help="micro-batches per update")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    updates = 5 if args.quick else args.updates
    block, dim = (32, 32) if args.quick else (128, 128)

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=args.n)
    config = GPT2Config(
        vocab_size=256,
        n_embd=dim,
        n_layer=2,
        n_head=dim // 32,
        n_positions=block,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    blocks = read_blocks(block, updates * args.n * args.micro_batch)
    loader = DataLoader(TensorDataset(blocks), args.micro_batch, shuffle=True)

    # (*) No gradient_accumulation_steps here: Accelerate owns the window and calls step() once in
    # it, so every step() is an update.
    optimizer = fusedaccum.FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-3))
    print(optimizer)
    # As many steps as updates: accumulate() lets the scheduler step once per window.
    scheduler = OneCycleLR(optimizer, max_lr=2e-3, total_steps=updates)
    # (*) The model before the optimizer, in case prepare() moves it to a GPU.
    model, prepared, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    model.train()
    made, losses, began = 0, [], time.perf_counter()
    for (ids,) in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # divides by n
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
        losses.append(loss.detach())
        if accelerator.sync_gradients:
            made += 1
            if made % max(1, updates // 5) == 0:
                mean = torch.stack(losses).mean().item()
                rate = scheduler.get_last_lr()[0]
                print(f"update {made:4d}  loss {mean:.3f} nats per byte  learning rate {rate:.1e}")
                losses.clear()
    # accelerator.save_state(folder) would save all of it, also inside a window: the gradients that
    # wait there are part of the wrapper's state.
    print(
        f"{made} updates of {args.n} micro-batches, {int(optimizer.skipped_steps)} skipped, "
        f"in {time.perf_counter() - began:.1f} s"
    )


if __name__ == "__main__":
    main()
