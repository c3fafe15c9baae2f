"""Micro-batches of unequal length: the mean of their means is not the mean over their tokens.

A small byte-level model learns functions of Python's standard library, whole ones, short and long,
padded to the longest of their micro-batch. Every framework's loss is the mean over the tokens of a
micro-batch. Averaging these means lets a token of a short micro-batch count many times as much as
one of a long one; `with opt.micro_batch(weight=n_tokens)` gives every token the same say, exactly,
though the number of tokens in a window is known only when it is over.

Run `python examples/token_weights.py`; the picture goes to out/token_weights.png.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import random
import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedaccum import FusedAccumOptimizer

IGNORED = -100  # cross_entropy's own value for labels that do not count
Batch = tuple[Tensor, Tensor]


def read_functions(longest: int) -> list[bytes]:
    """The source of every top-level function and method in a few hundred modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.glob("*.py")):
        source = file.read_bytes()
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                found.append(b"".join(lines[node.lineno - 1 : node.end_lineno])[:longest])
    return [text for text in found if len(text) > 1]


def padded(texts: Sequence[bytes], device: torch.device) -> Batch:
    """Inputs and next-byte labels, padded to the longest text; padding is ignored in the loss."""
    rows = [torch.tensor([*text]) for text in texts]
    x = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    y = nn.utils.rnn.pad_sequence(
        [row[1:] for row in rows], batch_first=True, padding_value=IGNORED
    )
    return x.to(device), y.to(device)


def windows(
    texts: list[bytes], n: int, size: int, device: torch.device, seed: int
) -> Iterator[list[Batch]]:
    """Windows of N micro-batches. Texts of like length go together, to save padding, as loaders
    that group by length do: micro-batches then differ most."""
    rng = random.Random(seed)
    while True:
        chosen = sorted(rng.sample(texts, n * size), key=len)
        groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        rng.shuffle(groups)
        yield [padded(group, device) for group in groups]


class Model(nn.Module):
    """Guesses the next byte from the 29 before it: three causal convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(nn.Conv1d(dim, dim, 5, dilation=d) for d in (1, 2, 4))
        self.head = nn.Linear(dim, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss over the tokens of this micro-batch."""
        h = self.embed(x).transpose(1, 2)
        for dilation, layer in zip((1, 2, 4), self.layers, strict=True):
            h = h + F.gelu(layer(F.pad(h, (4 * dilation, 0))))
        logits = self.head(h.transpose(1, 2))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)


def token_mean_gradient(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    """What the update should use, in float64: sum over all tokens, divided by their number."""
    params = [*model.parameters()]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    counts = [int((y != IGNORED).sum()) for _, y in batches]
    for (x, y), count in zip(batches, counts, strict=True):
        for sum_, grad in zip(total, torch.autograd.grad(model(x, y), params), strict=True):
            sum_ += grad.double() * (count / sum(counts))
    return total


def relative_error(model: nn.Module, opt: FusedAccumOptimizer, exact: list[Tensor]) -> float:
    """Of the mean gradient that the last update used.

    In a weighted window `p.grad` shows it up to a factor, which the step applies on the fly;
    `opt.grad_norm` is the norm of the mean itself.
    """
    grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
    assert opt.grad_norm is not None
    factor = float(opt.grad_norm) / math.sqrt(sum(float(g.square().sum()) for g in grads))
    pairs = [*zip(grads, exact, strict=True)]
    off = sum(float((g * factor - e).square().sum()) for g, e in pairs)
    return math.sqrt(off / sum(float(e.square().sum()) for e in exact))


def train(
    weighted: bool, texts: list[bytes], held_out: Batch, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Loss per held-out token as training goes on, and each window's gradient error."""
    torch.manual_seed(args.seed)
    model = Model(args.dim).to(args.device)
    opt = FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        gradient_accumulation_steps=args.n,
        max_grad_norm=1.0,
    )
    losses, errors = [], []
    loader = windows(texts, args.n, args.micro_batch, args.device, args.seed)
    for step, batches in zip(range(args.steps), loader, strict=False):
        if step % args.every == 0:
            with torch.no_grad():
                losses.append(float(model(*held_out)))
            exact = token_mean_gradient(model, batches)
        for x, y in batches:
            opt.zero_grad()  # inside a window this keeps what was accumulated
            if weighted:
                # Count on the CPU where you can: a count on the GPU waits for it.
                with opt.micro_batch(weight=int((y != IGNORED).sum())):
                    model(x, y).backward()
            else:
                model(x, y).backward()
            opt.step()
        if step % args.every == 0:
            errors.append(relative_error(model, opt, exact))
    return losses, errors


def plot(results: dict[str, tuple[list[float], list[float]]], every: int, path: Path) -> None:
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (losses, errors) in results.items():
        at = [every * i for i in range(len(losses))]
        left.plot(at, errors, label=name)
        right.plot(at, losses, label=name)
    left.set(title="error of the window's gradient", xlabel="window", yscale="log")
    right.set(title="held-out loss, nats per byte", xlabel="window")
    right.legend()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=120, help="windows, that is, updates")
    parser.add_argument("--n", type=int, default=4, help="micro-batches per window")
    parser.add_argument("--micro-batch", type=int, default=4, help="functions per micro-batch")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--longest", type=int, default=400, help="bytes of a function at most")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--every", type=int, default=5, help="windows between two measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is learned")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0 and name != "seed":
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.quick:
        args.steps, args.dim, args.longest, args.every = 4, 16, 200, 2
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)  # a model this small gains little from more
    texts = read_functions(args.longest)
    random.Random(args.seed).shuffle(texts)
    held_out, texts = padded(texts[:64], args.device), texts[64:]
    results = {
        "mean of means": train(False, texts, held_out, args),
        "micro_batch(weight=n_tokens)": train(True, texts, held_out, args),
    }
    print(f"\n{'':<30}{'gradient error':>16}{'held-out loss':>16}")
    for name, (losses, errors) in results.items():
        print(f"{name:<30}{statistics.median(errors):>16.1e}{losses[-1]:>16.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    plot(results, args.every, args.out / "token_weights.png")


if __name__ == "__main__":
    main()
