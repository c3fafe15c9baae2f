"""Train on several processes: DistributedDataParallel as it is, and one changed line.

    torchrun --nproc-per-node 2 examples/ddp.py            on CPUs or GPUs, one process each
    torchrun --nproc-per-node 2 examples/ddp.py --quick    a few seconds, nothing is learned
    python examples/ddp.py                                 one process, without torchrun

A small byte-level model learns the source of Python's standard library in bf16. The wrapper finds
DDP by itself and averages the fp32 accumulators, once per window, while the last backward still
runs: no_sync() is not needed. Every process weighs its micro-batches by their tokens, and the
update is the mean over the tokens of all. The checkpoint is one file, which any number of
processes resumes. Only the lines marked (*) are about the wrapper.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedaccum


class Model(nn.Module):
    """Predicts the next byte from the `context` bytes before it."""

    def __init__(self, context: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.mix = nn.Conv1d(dim, dim, context)
        self.body = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, 256)
        self.context = context

    def forward(self, ids: Tensor) -> Tensor:
        x = F.pad(self.embed(ids).transpose(1, 2), (self.context - 1, 0))
        x = self.mix(x).transpose(1, 2)
        return self.head(x + self.body(F.layer_norm(x, x.shape[-1:])))  # type: ignore[no-any-return]


def text() -> Tensor:
    """The source of the standard library, a token per byte."""
    root = Path(sysconfig.get_paths()["stdlib"])
    joined = bytearray().join(file.read_bytes() for file in sorted(root.glob("*.py")))
    return torch.frombuffer(joined, dtype=torch.uint8).long()


def micro_batches(tokens: Tensor, rank: int, world: int, start: int) -> Iterator[Tensor]:
    """Sequences of this process, of unequal length, from micro-batch `start` on."""
    index = start
    while True:
        generator = torch.Generator().manual_seed(index * world + rank)
        length = int(torch.randint(32, 129, (1,), generator=generator))
        starts = torch.randint(len(tokens) - length - 1, (8, 1), generator=generator)
        yield tokens[starts + torch.arange(length + 1)]
        index += 1


def started() -> torch.device:
    """Join the processes that torchrun started, or be alone; this one's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = f"file://{tempfile.mkdtemp()}/store"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    return device


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--n", type=int, default=4, help="micro-batches per process and update")
    parser.add_argument("--checkpoint", type=Path, help="resumed from; written at the end")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    updates = 4 if args.quick else args.updates
    device = started()
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = Model(context=8, dim=32 if args.quick else 128).to(device, torch.bfloat16)
    net = DistributedDataParallel(model)
    # (*) The one changed line; without it the optimizer would be AdamW itself.
    optimizer = fusedaccum.FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), args.n, max_grad_norm=1.0
    )
    done = 0
    if args.checkpoint is not None and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["updates"]

    batches = micro_batches(text(), rank, world, done * args.n)
    for update in range(done, done + updates):
        for _ in range(args.n):
            ids = next(batches).to(device)
            n_tokens = ids[:, 1:].numel()
            with optimizer.micro_batch(weight=n_tokens):  # (*) the mean over all tokens
                logits = net(ids[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
                loss.backward()  # (*) not divided by n
            optimizer.step()  # (*) after every micro-batch; the n-th one updates
            optimizer.zero_grad()
        if rank == 0 and (update + 1) % max(1, updates // 4) == 0:
            norm = optimizer.grad_norm  # of the mean over all processes
            assert norm is not None
            print(f"update {update + 1:4d}  loss {loss.item():.3f}  gradient norm {norm:.3f}")

    # Between windows every process holds the same, so that one of them saves it.
    if args.checkpoint is not None and rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "updates": done + updates}, args.checkpoint)
    total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
    sums = [torch.zeros_like(total) for _ in range(world)]
    dist.all_gather(sums, total)
    if rank == 0:
        same = "the same" if all(bool(s == total) for s in sums) else "NOT the same"
        count = f"{world} process{'es' if world > 1 else ''}"
        print(f"{count}, {updates} updates, weights are {same} in all of them")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
