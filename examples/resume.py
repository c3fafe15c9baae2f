"""Kill a training run in the middle of a window with SIGKILL, start it again, and compare.

A gradient-accumulation window can be long: 64 micro-batches of a large model take minutes. A run
that is killed inside one usually loses the gradients gathered so far, and, with bf16 weights, often
the precision of the weights too. `opt.state_dict()` has both, so the run that goes on from it ends
with the very bits of a run that was never disturbed.

This script starts itself as child processes. One trains undisturbed; another kills itself, twice,
each time inside a window, and is started again. `python examples/resume.py` prints the proof. What
to copy into your own training is in `train`: what is saved, and the order of loading.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fusedaccum import FusedAccumOptimizer

N = 8  # micro-batches per window
BLOCK, SIZE = 64, 8  # bytes per sequence, sequences per micro-batch


class Model(nn.Module):
    """A byte-level language model with bf16 weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(256, dim), nn.LayerNorm(dim)
        self.mix = nn.Conv1d(dim, dim, 8, groups=dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, 256)
        self.bfloat16()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.mix(F.pad(h.transpose(1, 2), (7, 0))).transpose(1, 2)
        logits = self.head(h + self.mlp(self.norm(h)))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def read_corpus() -> Tensor:
    """Some of the standard library's source, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = bytearray().join(file.read_bytes() for file in files)[:2_000_000]
    return torch.frombuffer(text, dtype=torch.uint8)


def micro_batch(text: Tensor, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for the same index, whatever ran before: a loader that can be put anywhere."""
    generator = torch.Generator().manual_seed(index)
    starts = torch.randint(0, len(text) - BLOCK - 1, (SIZE, 1), generator=generator)
    chunk = text[starts + torch.arange(BLOCK + 1)].long().to(device)
    return chunk[:, :-1], chunk[:, 1:]


def train(path: Path, stop: int, kill_at: int, dim: int, device: torch.device) -> None:
    """Train for `stop` micro-batches, from the checkpoint at `path` if there is one.

    At micro-batch `kill_at` the process is gone, without a goodbye.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # else two runs differ on a GPU, resumed or not
    torch.set_num_threads(1)
    text = read_corpus()
    model = Model(dim).to(device)
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        gradient_accumulation_steps=N,
        max_grad_norm=1.0,
    )
    scheduler = CosineAnnealingLR(opt, stop // N)
    start = 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])  # weights before or after: the order does not matter
        scheduler.load_state_dict(saved["scheduler"])
        start = saved["next"]
        print(
            f"  resumed at micro-batch {start}: window {start // N}, with "
            f"{opt.micro_batches} of {N} micro-batches in it",
            flush=True,
        )
    for i in range(start, stop):
        opt.zero_grad()  # inside a window this keeps what was accumulated
        loss = model(*micro_batch(text, i, device))
        loss.backward()
        opt.step()
        if opt.window_closed:
            scheduler.step()
        if (i + 1) % 3 == 0:  # every third micro-batch: mostly inside a window
            state = {
                "model": model.state_dict(),
                "opt": opt.state_dict(),
                "scheduler": scheduler.state_dict(),
                "next": i + 1,
            }
            torch.save(state, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)  # all of it or nothing
        if i == kill_at:
            print(
                f"  killed in micro-batch {i}, {opt.micro_batches} of {N} in the window", flush=True
            )
            os.kill(os.getpid(), signal.SIGKILL)
    assert opt.micro_batches == 0, "the last window is a full one here; else call opt.flush()"
    masters = [entry["master_param"].cpu() for entry in opt.state_dict()["state"].values()]
    weights = [p.detach().cpu() for p in model.parameters()]
    torch.save({"weights": weights, "masters": masters}, path.with_suffix(".end"))
    print(f"  finished: loss of the last micro-batch {float(loss.detach()):.4f}", flush=True)


def child(path: Path, kill_at: int, args: argparse.Namespace) -> int:
    """Run `train` in a process of its own; its exit status."""
    command = [sys.executable, __file__, "--child", str(path), "--kill-at", str(kill_at)]
    command += ["--steps", str(args.steps), "--dim", str(args.dim), "--device", args.device]
    # cuBLAS is deterministic only with this, which it reads once.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.run(command, env=environment, check=False).returncode


def digest(tensors: list[Tensor]) -> str:
    """A fingerprint of every bit."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60, help="windows, that is, updates")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is learned")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.quick:
        args.steps, args.dim = 4, 16
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: at least 3, to be killed twice in between")
    if args.dim < 1:
        parser.error(f"--dim must be above 0, got {args.dim}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.child is not None:
        train(args.child, N * args.steps, args.kill_at, args.dim, torch.device(args.device))
        return
    with tempfile.TemporaryDirectory() as directory:
        print("undisturbed")
        undisturbed, disturbed = (Path(directory, f"{n}.pt") for n in ("undisturbed", "disturbed"))
        if child(undisturbed, -1, args):
            raise SystemExit("the undisturbed run failed")
        # Inside a window, and with work since the last checkpoint that has to be done again.
        for kill_at in (N * (args.steps // 3) + 3, N * (2 * args.steps // 3) + 4):
            print("disturbed")
            if child(disturbed, kill_at, args) != -signal.SIGKILL:
                raise SystemExit("the disturbed run was to be killed, and was not")
        print("disturbed")
        if child(disturbed, -1, args):
            raise SystemExit("the disturbed run failed")
        ends = [
            torch.load(path.with_suffix(".end"), weights_only=True)
            for path in (undisturbed, disturbed)
        ]
    print(f"\n{'':<16}{'undisturbed':<20}{'killed twice':<20}")
    for what in ("weights", "masters"):
        print(f"{what:<16}" + "".join(f"{digest(end[what]):<20}" for end in ends))
    if digest(ends[0]["masters"] + ends[0]["weights"]) != digest(
        ends[1]["masters"] + ends[1]["weights"]
    ):
        raise SystemExit("the runs differ")
    print("the same to the bit: bf16 weights, and the fp32 masters behind them")


if __name__ == "__main__":
    main()
