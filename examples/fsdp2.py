"""Train a model that is sharded over processes: fully_shard (FSDP2) as it is, and one changed line.

    torchrun --nproc-per-node 2 examples/fsdp2.py            on CPUs or GPUs, one process each
    torchrun --nproc-per-node 2 examples/fsdp2.py --quick    a few seconds, nothing is learned
    python examples/fsdp2.py                                 one process, without torchrun

The model of examples/ddp.py in bf16, of which each process holds a shard: parameters, fp32
accumulators, masters and the optimizer's states. FSDP2 reduces each micro-batch's gradients in
float32, and the wrapper accumulates those numbers before they are rounded to bf16. The checkpoint
is a folder of torch.distributed.checkpoint, which any number of processes resumes. Only the lines
marked (*) are about the wrapper.
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
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim.lr_scheduler import LinearLR

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
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in (model.embed, model.mix, model.body, model.head):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # (*) The one changed line, after fully_shard; without it the optimizer would be AdamW itself.
    optimizer = fusedaccum.FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), args.n, max_grad_norm=1.0
    )
    scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=8)
    done = 0
    if args.checkpoint is not None and args.checkpoint.exists():
        weights, states = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": states, "scheduler": scheduler}
        dcp.load(saved, checkpoint_id=args.checkpoint)  # type: ignore[attr-defined]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        done = scheduler.last_epoch

    batches = micro_batches(text(), rank, world, done * args.n)
    for update in range(done, done + updates):
        for _ in range(args.n):
            ids = next(batches).to(device)
            n_tokens = ids[:, 1:].numel()
            with optimizer.micro_batch(weight=n_tokens):  # (*) the mean over all tokens
                logits = model(ids[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
                loss.backward()  # (*) not divided by n
            optimizer.step()  # (*) after every micro-batch; the n-th one updates
            optimizer.zero_grad()
        scheduler.step()
        if rank == 0 and (update + 1) % max(1, updates // 4) == 0:
            norm = optimizer.grad_norm  # of the mean over all processes
            assert norm is not None
            print(f"update {update + 1:4d}  loss {loss.item():.3f}  gradient norm {norm:.3f}")

    if args.checkpoint is not None:
        weights, states = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": states, "scheduler": scheduler}
        dcp.save(saved, checkpoint_id=args.checkpoint)  # type: ignore[attr-defined]
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    n = sum(p.numel() for p in model.parameters())
    if rank == 0:
        count = f"{world} process{'es' if world > 1 else ''}"
        print(f"{count}, {updates} updates, rank 0 holds {held} of {n} parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
