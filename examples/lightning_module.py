"""Train with Lightning: return the wrapper from `configure_optimizers`.

Lightning keeps its loop: `accumulate_grad_batches` says when a window ends, Lightning divides the
loss and calls `step()` once per window. The wrapper is told no number and updates with the sum
(`gradient_accumulation_steps=None`), in fp32 also where `precision="bf16-true"` makes everything
else bf16.

Two things that Lightning leaves open are mended by `backward` below: it divides by N also where the
last window of an epoch is shorter, and it has no weights for micro-batches of unequal length. Leave
the method out if neither matters to you.

The model is a small byte-level one; the text is the source of Python's standard library. Run
`python examples/lightning_module.py` (needs lightning).
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fusedaccum import FusedAccumOptimizer


class ByteModel(lightning.LightningModule):
    """Guesses the next byte from the 29 before it: three causal convolutions."""

    def __init__(self, dim: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(nn.Conv1d(dim, dim, 5, dilation=d) for d in (1, 2, 4))
        self.head = nn.Linear(dim, 256)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(1, 2)
        for dilation, layer in zip((1, 2, 4), self.layers, strict=True):
            h = h + F.gelu(layer(F.pad(h, (4 * dilation, 0))))
        logits: Tensor = self.head(h.transpose(1, 2))
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.n_tokens = batch[:, 1:].numel()
        return self.loss(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # The mean over the window's tokens, however many micro-batches it has. Lightning divided
        # the loss by N, which is undone here: the wrapper divides by what really arrived.
        opt = self.optimizers()
        assert isinstance(opt, FusedAccumOptimizer)
        with opt.micro_batch(weight=self.n_tokens):
            (loss * self.trainer.accumulate_grad_batches).backward(*args, **kwargs)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch))

    def on_validation_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["val_loss"])
        print(f"after {self.trainer.global_step:4d} updates: validation loss {loss:.4f}")

    def configure_optimizers(self) -> Any:
        opt = FusedAccumOptimizer(
            torch.optim.AdamW(self.parameters(), lr=self.lr),
            # Clips the weighted mean, inside the step. With weights it has to be here: the
            # Trainer's gradient_clip_val clips p.grad, which then is the mean up to a factor.
            max_grad_norm=1.0,
        )
        updates = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, self.lr, total_steps=updates)
        # "interval": "step" is one step of the scheduler per update, not per micro-batch.
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read_corpus(block: int, pieces: int) -> tuple[list[Tensor], list[Tensor]]:
    """Pieces of the standard library's source; every 16th is held out for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(
        bytearray().join(f.read_bytes() for f in files), dtype=torch.uint8
    ).long()
    rows = text[: len(text) // block * block].view(-1, block)
    rows = rows[torch.randperm(len(rows))[:pieces]]
    train = [row for i, row in enumerate(rows) if i % 16]
    return train, [row for i, row in enumerate(rows) if i % 16 == 0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--accelerator", default="auto", help="Lightning's: auto, cpu, gpu")
    parser.add_argument("--precision", default="bf16-true", help="Lightning's: 32-true, ...")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--n", type=int, default=4, help="micro-batches per window")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--block", type=int, default=129, help="bytes per sequence")
    parser.add_argument("--pieces", type=int, default=2000, help="sequences of the corpus")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is learned")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0 and name != "seed":
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if args.quick:
        args.epochs, args.pieces, args.dim, args.block = 1, 100, 16, 17
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    torch.set_num_threads(1)  # a model this small gains little from more
    lightning.seed_everything(args.seed, verbose=False)
    train, held_out = read_corpus(args.block, args.pieces)
    model = ByteModel(args.dim, args.lr)
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_epochs=args.epochs,
        accumulate_grad_batches=args.n,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        model,
        DataLoader(train, args.micro_batch, shuffle=True),  # type: ignore[arg-type]
        DataLoader(held_out, args.micro_batch),  # type: ignore[arg-type]
    )
    micro_batches = -(-len(train) // args.micro_batch)
    print(
        f"{micro_batches} micro-batches per epoch: {micro_batches // args.n} windows of {args.n}"
        + (f", and one of {micro_batches % args.n}" if micro_batches % args.n else "")
    )
    print(trainer.optimizers[0])


if __name__ == "__main__":
    main()
