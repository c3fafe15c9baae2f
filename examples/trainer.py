"""Train a small byte-level Llama in bf16 with transformers' Trainer and fusedaccum.

    python examples/trainer.py            half a minute on a CPU; on a GPU it runs there, unchanged
    python examples/trainer.py --quick    a few seconds, nothing is learned

The Trainer counts the window, divides the loss by its tokens and clips, as ever. The wrapper makes
`p.grad` an fp32 accumulator of the bf16 weights and keeps fp32-precise masters; it takes the place
of the Trainer's optimizer, whatever TrainingArguments(optim=...) chose. Only the lines marked (*)
are about it. The text is the source of Python's standard library: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import fusedaccum


class Text(Dataset[dict[str, Tensor]]):
    """Blocks of the standard library's source, a token per byte; every 16th file is held out."""

    def __init__(self, block: int, n_blocks: int, held_out: bool = False) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for i, f in enumerate(sorted(root.glob("*.py"))) if (i % 16 == 0) == held_out]
        text = bytearray().join(f.read_bytes() for f in files)
        n = len(text) // block
        if n < n_blocks:
            raise SystemExit(f"too little Python source under {root}: is the library installed?")
        every = n // n_blocks
        read = torch.frombuffer(text[: n * block], dtype=torch.uint8).view(n, block)
        self.blocks = read[::every][:n_blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.blocks[index].long()
        return {"input_ids": ids, "labels": ids}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--n", type=int, default=4, help="micro-batches per update")
    parser.add_argument("--out", default="out/trainer", help="where checkpoints would go")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    updates = 5 if args.quick else args.updates
    block, dim = (32, 32) if args.quick else (128, 128)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=2,
        num_attention_heads=dim // 32,
        max_position_embeddings=block,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.out,
            max_steps=updates,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.n,
            learning_rate=2e-3,
            warmup_steps=updates // 10,
            lr_scheduler_type="cosine",
            weight_decay=0.1,  # of the matrices only: the Trainer makes the param groups
            max_grad_norm=1.0,
            logging_steps=max(1, updates // 5),
            save_strategy="no",  # "steps" saves the wrapper's state with the rest, and resumes it
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Text(block, 10_000),
        eval_dataset=Text(block, 64, held_out=True),
    )
    # (*) No gradient_accumulation_steps here: the Trainer owns the window, and every step() that it
    # calls is an update.
    optimizer = fusedaccum.FusedAccumOptimizer(trainer.create_optimizer())
    trainer.optimizer = optimizer
    print(optimizer)

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(
        f"{trainer.state.global_step} updates of {args.n} micro-batches, "
        f"{int(optimizer.skipped_steps)} skipped; loss {before:.3f} -> {after:.3f} nats per byte"
    )


if __name__ == "__main__":
    main()
