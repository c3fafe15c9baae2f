"""Fine-tune a small model in bf16 three ways, and see what gradient accumulation costs.

    python examples/finetune.py             a minute or two on a CPU; writes out/finetune.png
    python examples/finetune.py --quick     a smoke test: nothing is learned

Nothing is downloaded. A byte-level GPT is pre-trained on the source of Python's standard library;
then three copies of it are fine-tuned on Python's own documentation, at the small learning rate of
a fine-tune and with many micro-batches per update. All read the same batches:

    plain bf16     gradients are summed in bf16, AdamW works on the bf16 parameters
    native fp32    gradients are summed in fp32 by stock PyTorch, AdamW works on fp32 masters
    fusedaccum     the optimizer of the first, wrapped: one changed line

The class `FusedAccum` is what to copy; what comes after the three classes is the experiment.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import fusedaccum

Batches = Sequence[tuple[Tensor, Tensor]]


# --- three ways: `window` makes one update from N micro-batches ---


class PlainBF16:
    def __init__(self, model: nn.Module, lr: float, n: int, max_norm: float = 1.0) -> None:
        self.model, self.n, self.max_norm = model, n, max_norm
        self.opt = torch.optim.AdamW(model.parameters(), lr=lr)

    def window(self, loader: Batches) -> None:
        self.opt.zero_grad()
        for x, y in loader:
            (self.model(x, y) / self.n).backward()
        clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.opt.step()


class NativeFP32:
    def __init__(self, model: nn.Module, lr: float, n: int, max_norm: float = 1.0) -> None:
        self.model, self.n, self.max_norm = model, n, max_norm
        self.params: list[Tensor] = list(model.parameters())
        self.masters = [p.detach().float() for p in self.params]
        for p, master in zip(self.params, self.masters, strict=True):
            p.grad_dtype = None  # lets a bf16 parameter hold an fp32 gradient
            p.grad = master.grad = torch.zeros_like(master)
        self.opt = torch.optim.AdamW(self.masters, lr=lr)

    def window(self, loader: Batches) -> None:
        self.opt.zero_grad(set_to_none=False)
        for x, y in loader:
            (self.model(x, y) / self.n).backward()
        clip_grad_norm_(self.masters, self.max_norm)
        self.opt.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)


class FusedAccum:
    def __init__(self, model: nn.Module, lr: float, n: int, max_norm: float = 1.0) -> None:
        self.model = model
        self.opt = fusedaccum.FusedAccumOptimizer(
            torch.optim.AdamW(model.parameters(), lr=lr), n, max_grad_norm=max_norm
        )

    def window(self, loader: Batches) -> None:
        for x, y in loader:
            self.opt.zero_grad()  # inside a window this keeps what was accumulated
            self.model(x, y).backward()  # not divided by N
            self.opt.step()  # every N-th call updates


WAYS: dict[str, Any] = {
    "plain bf16": PlainBF16,
    "native fp32": NativeFP32,
    "fusedaccum": FusedAccum,
}


# --- the model and the text ---


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // 64
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attention.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Over the 256 byte values; `forward` returns the mean loss."""

    def __init__(self, layers: int, dim: int, length: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x) + self.position.weight[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(h)))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def texts() -> tuple[Tensor, Tensor]:
    """Python's standard library, and Python's documentation, as bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code = bytearray().join(file.read_bytes() for file in sorted(root.glob("*.py")))
    prose = bytearray((root / "pydoc_data" / "topics.py").read_bytes().replace(b"\\n", b"\n"))
    return torch.frombuffer(code, dtype=torch.uint8), torch.frombuffer(prose, dtype=torch.uint8)


def windows(
    text: Tensor, n: int, shape: tuple[int, int], device: torch.device, seed: int
) -> Iterator[Batches]:
    """Windows of `n` micro-batches of `shape` random (bytes, next bytes), without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - shape[1] - 1, (n, shape[0], 1), generator=generator)
        chunks = text[starts + torch.arange(shape[1] + 1)].long().to(device)
        yield [(chunk[:, :-1], chunk[:, 1:]) for chunk in chunks]


class FP32Math(nn.Module):
    """The same bf16 parameters and bf16 gradients, with fp32 arithmetic in between: some CPUs take
    30 times as long in bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Any:
        widened = {name: p.float() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, widened, (x, y))


# --- the experiment ---


def progress(label: str, n: int) -> Any:
    """range(n), with a labelled bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(label)
        return range(n)
    return tqdm(range(n), desc=label, bar_format="{desc:<30}{bar} {n}/{total} {elapsed}")


@torch.no_grad()
def mean_loss(model: nn.Module, loader: Batches) -> float:
    losses = [float(model(x, y)) for x, y in loader]
    return sum(losses) / len(losses)


def gradient_errors(model: nn.Module, loader: Batches) -> dict[str, float]:
    """The relative L2 error of each way's mean gradient, against the same bf16 micro-gradients
    added in float64."""
    params = list(model.parameters())
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for x, y in loader:
        for total, grad in zip(exact, torch.autograd.grad(model(x, y), params), strict=True):
            total += grad.double() / len(loader)
    norm = math.sqrt(sum(float(total.square().sum()) for total in exact))
    errors = {}
    for name, make in WAYS.items():
        way = make(copy.deepcopy(model), 0.0, len(loader), math.inf)
        way.window(loader)
        pairs = zip(way.model.parameters(), exact, strict=True)
        off = sum(float((p.grad.double() - total).square().sum()) for p, total in pairs)
        errors[name] = math.sqrt(off) / norm
    return errors


def bytes_alive() -> int:
    """Of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def bytes_at_rest(make: Any, model: nn.Module, loader: Batches) -> float:
    """Between two windows, in bytes per parameter: weights, gradients, masters and states."""
    before = bytes_alive()
    way = make(copy.deepcopy(model), 1e-5, len(loader))
    way.window(loader)
    n: int = sum(p.numel() for p in way.model.parameters())
    return (bytes_alive() - before) / n


def draw(curves: Any, errors: Any, kept: dict[str, float], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("o-", "s-", "x--"), strict=True):
        left.plot(*zip(*curve, strict=True), style, label=name)
        middle.loglog(errors.keys(), [error[name] for error in errors.values()], style, label=name)
    left.set(title="fine-tuning", xlabel="updates", ylabel="validation loss, nats per byte")
    middle.set(title="error of the mean gradient", xlabel="micro-batches per update, N")
    middle.set_xticks([*errors], [str(n) for n in errors])
    middle.minorticks_off()
    right.bar(kept.keys(), kept.values(), color=["C0", "C1", "C2"])
    right.set(title="bytes per parameter at rest")
    left.legend()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def table(results: dict[str, dict[str, float]], n: int) -> str:
    lines = [f"{'':<36}" + "".join(f"{name:>14}" for name in results)]
    for key, (label, form) in {
        "loss": ("validation loss", ".4f"),
        "gradient_error": (f"error of the mean gradient, N = {n}", ".1e"),
        "bytes_per_parameter": ("bytes per parameter at rest", ".2f"),
    }.items():
        lines.append(f"{label:<36}" + "".join(f"{r[key]:>14{form}}" for r in results.values()))
    return "\n".join(lines)


def summary(before: float, results: dict[str, dict[str, float]]) -> str:
    """What was seen, in two sentences; losses too."""
    fell = {name: before - row["loss"] for name, row in results.items()}
    kept = {name: row["bytes_per_parameter"] for name, row in results.items()}
    return (
        f"The validation loss fell by {fell['fusedaccum']:.4f} with fusedaccum, by "
        f"{fell['native fp32']:.4f} with fp32 sums and masters of stock PyTorch, and by "
        f"{fell['plain bf16']:.4f} in plain bf16, where many updates are smaller than the rounding "
        f"of a weight.\nfusedaccum keeps {kept['fusedaccum']:.0f} bytes per parameter, which is "
        f"less than the {kept['native fp32']:.0f} of stock fp32 and more than the "
        f"{kept['plain bf16']:.0f} of plain bf16."
    )


def is_slow_in_bf16(device: torch.device) -> bool:
    def seconds(dtype: torch.dtype) -> float:
        a, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            _ = a @ a
            times.append(time.perf_counter() - start)
        return min(times)

    return device.type == "cpu" and seconds(torch.bfloat16) > 4 * seconds(torch.float32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, default=16, help="micro-batches per update")
    parser.add_argument("--updates", type=int, default=40, help="of the fine-tune")
    parser.add_argument("--lr", type=float, default=3e-5, help="of the fine-tune")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is learned")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    device, began = torch.device(args.device), time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    updates, first = (4, 4) if args.quick else (args.updates, 400)
    args.n = min(args.n, 2) if args.quick else args.n
    counts = (2, 4) if args.quick else (2, 4, 16, 64)  # one gradient is no sum
    shape = (4, 64)
    code, prose = texts()
    held_out, prose = prose[:100_000], prose[100_000:]

    model: nn.Module = GPT(layers=3, dim=128, length=shape[1]).to(device, torch.bfloat16)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} bf16 parameters on {device}")
    if is_slow := is_slow_in_bf16(device):
        print("this CPU is slow in bf16: weights and gradients are bf16, the arithmetic is fp32")
        model = FP32Math(model)
    way = FusedAccum(model, 2e-3, 1)
    source = windows(code, 1, (4 * shape[0], shape[1]), device, seed=0)
    for _ in progress("pre-training on source code", first):
        way.window(next(source))
    way.opt.detach()

    validation = next(windows(held_out, 32, shape, device, seed=1))
    ways = {name: make(copy.deepcopy(model), args.lr, args.n) for name, make in WAYS.items()}
    before = mean_loss(model, validation)
    curves = {name: [(0, before)] for name in ways}
    source = windows(prose, args.n, shape, device, seed=2)
    for update in progress("fine-tuning on prose, 3 ways", updates):
        loader = next(source)
        for name, way in ways.items():
            way.window(loader)
            if (update + 1) % max(1, updates // 8) == 0:
                curves[name].append((update + 1, mean_loss(way.model, validation)))
    loss = {name: mean_loss(way.model, validation) for name, way in ways.items()}
    del way, ways

    errors = {}
    for i in progress("summing micro-gradients", len(counts)):
        loader = next(windows(prose, counts[i], shape, device, seed=3))
        errors[counts[i]] = gradient_errors(model, loader)
    loader = next(windows(prose, 2, shape, device, seed=4))
    kept = {name: bytes_at_rest(make, model, loader) for name, make in WAYS.items()}
    results = {
        name: {
            "loss": loss[name],
            "gradient_error": errors[counts[-1]][name],
            "bytes_per_parameter": kept[name],
        }
        for name in WAYS
    }
    print(f"\n{table(results, counts[-1])}\n\n{summary(before, results)}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(curves, errors, kept, args.out / "finetune.png")
    row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "settings": vars(args) | {"out": str(args.out)},
        "parameters": n_params,
        "float32_arithmetic": is_slow,
        "loss_before": before,
        "results": results,
        "curves": curves,
        "gradient_errors": errors,
        "seconds": time.perf_counter() - began,
    }
    (args.out / "finetune.json").write_text(json.dumps(row) + "\n")
    print(f"numbers: {args.out / 'finetune.json'}; {row['seconds']:.0f} s in all")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
