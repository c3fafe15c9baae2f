"""Train a small byte-level GPT in bf16 three ways, and see what gradient accumulation costs.

The text is the source of Python's own standard library, so nothing is downloaded. Three replicas
start from the same weights and read the same batches; each update averages N micro-batches:

    plain bf16    gradients summed in bf16, AdamW on the bf16 parameters
    native fp32   gradients summed in fp32 by stock PyTorch, AdamW on fp32 master weights
    fusedaccum    the optimizer wrapped in fusedaccum.FusedAccumOptimizer

Run `python examples/train_gpt.py` (`--help` lists the settings). To copy the method into your own
training, take the class `FusedAccum` below; everything after the three classes is measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import gc
import importlib
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sysconfig
import time
import timeit
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedaccum

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclasses.dataclass
class Plan:
    """What the variants share: N micro-batches per window, learning rate, decay, clipping."""

    n: int
    lr: float
    steps: int
    weight_decay: float = 0.1
    max_norm: float = 1.0

    def lr_factor(self, step: int) -> float:
        """Warms up over a tenth of the run, then follows a cosine down to a tenth of the rate."""
        warmup = max(1, self.steps // 10)
        progress = min(1.0, max(0, step - warmup) / max(1, self.steps - warmup))
        return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


# The three ways. `window` makes one update from N micro-batches and returns their mean loss; its
# mean gradient stays in `p.grad` until the next window.


class PlainBF16:
    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.opt = torch.optim.AdamW(
            model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True
        )
        self.scheduler = LambdaLR(self.opt, plan.lr_factor)

    def window(self, loader: Batches) -> Tensor:
        losses = []
        self.opt.zero_grad()
        for x, y in loader:
            loss = self.model(x, y)
            (loss / self.plan.n).backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.model.parameters(), self.plan.max_norm)
        self.opt.step()
        self.scheduler.step()
        return torch.stack(losses).mean()


class NativeFP32:
    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.params: list[Tensor] = list(model.parameters())
        self.masters = [p.detach().float() for p in self.params]
        for p, master in zip(self.params, self.masters, strict=True):
            p.grad_dtype = None  # lets a bf16 parameter hold an fp32 gradient
            p.grad = master.grad = torch.zeros_like(master)
        self.opt = torch.optim.AdamW(
            self.masters, lr=plan.lr, weight_decay=plan.weight_decay, fused=True
        )
        self.scheduler = LambdaLR(self.opt, plan.lr_factor)

    def window(self, loader: Batches) -> Tensor:
        losses = []
        self.opt.zero_grad(set_to_none=False)
        for x, y in loader:
            loss = self.model(x, y)
            (loss / self.plan.n).backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.masters, self.plan.max_norm)
        self.opt.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        self.scheduler.step()
        return torch.stack(losses).mean()


class FusedAccum:
    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        self.opt = fusedaccum.FusedAccumOptimizer(
            torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay),
            gradient_accumulation_steps=plan.n,
            max_grad_norm=plan.max_norm,
        )
        self.scheduler = LambdaLR(self.opt, plan.lr_factor)

    def window(self, loader: Batches) -> Tensor:
        losses = []
        for x, y in loader:
            self.opt.zero_grad()  # inside a window this keeps what was accumulated
            loss = self.model(x, y)
            loss.backward()  # not divided by N
            self.opt.step()  # every N-th call updates
            if self.opt.window_closed:
                self.scheduler.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()


class ForwardBackward:
    """The floor under the timings: every gradient is dropped as soon as autograd has made it."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def window(self, loader: Batches) -> Tensor:
        losses = []
        for x, y in loader:
            loss = self.model(x, y)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()


class Variant(Protocol):
    model: nn.Module

    def window(self, loader: Batches) -> Tensor: ...


Make = Callable[[nn.Module, Plan], Variant]
VARIANTS: dict[str, Make] = {
    "plain bf16": PlainBF16,
    "native fp32": NativeFP32,
    "fusedaccum": FusedAccum,
}


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = max(1, dim // 64)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attention.transpose(1, 2).flatten(2))
        return torch.add(h, self.mlp(self.norm2(h)))


class GPT(nn.Module):
    """A causal language model over the 256 byte values; `forward` returns the mean loss."""

    def __init__(self, layers: int, dim: int, block: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, dim), nn.Embedding(block, dim)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.bfloat16()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x) + self.position.weight[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(h)))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


class Float32Math(nn.Module):
    """The same bf16 parameters and bf16 gradients, with fp32 arithmetic in between."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Any:
        widened = {name: p.float() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, widened, (x, y))


def read_corpus(max_bytes: int = 6_000_000) -> tuple[Tensor, Tensor]:
    """The standard library's source as bytes; every 16th file is held out for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    files = [f for f in sorted(root.rglob("*.py")) if skip.isdisjoint(f.relative_to(root).parts)]
    if len(files) < 16:
        raise SystemExit(f"no Python source under {root}: this Python came without its library")
    train = bytearray().join(f.read_bytes() for i, f in enumerate(files) if i % 16)[:max_bytes]
    held_out = bytearray().join(f.read_bytes() for f in files[::16])[: max_bytes // 16]
    as_bytes = torch.uint8
    return torch.frombuffer(train, dtype=as_bytes), torch.frombuffer(held_out, dtype=as_bytes)


class Sampler:
    """Windows of random (input, next byte) micro-batches; the same seed gives the same ones."""

    def __init__(self, text: Tensor, size: int, block: int, device: torch.device, seed: int):
        self.text, self.size, self.device = text, size, device
        self.offsets = torch.arange(block + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def window(self, n: int) -> Batches:
        high, shape = len(self.text) - len(self.offsets), (n, self.size, 1)
        starts = torch.randint(high, shape, generator=self.generator)
        chunks = self.text[starts + self.offsets].long().to(self.device)
        return [(chunk[:, :-1], chunk[:, 1:]) for chunk in chunks]


def bf16_is_slow(device: torch.device, dim: int) -> bool:
    """On a CPU without bf16 instructions a bf16 matmul can take 30 times an fp32 one: try it."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, dim, dtype=dtype), torch.ones(dim, 4 * dim, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=5))

    return device.type == "cpu" and seconds(torch.bfloat16) > 4 * seconds(torch.float32)


def timed_window(variant: Variant, loader: Batches) -> tuple[float, float]:
    """Seconds and loss of one window."""
    on_gpu = loader[0][0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = variant.window(loader)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss.item()


def optional(name: str, without: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name.split('.')[0]} is not installed: {without}")
        return None


Series = dict[str, list[float]]


def train(
    variants: dict[str, Variant], floor: Variant, sampler: Sampler, plan: Plan, deadline: float
) -> tuple[Series, Series, Series]:
    """Trains all variants window by window, so that they share whatever else the machine does.

    Returns, per variant, each window's loss, its seconds, and in every fourth window its seconds
    beyond the same window of forward and backward alone.
    """
    losses, seconds, beyond = (dict[str, list[float]]() for _ in range(3))
    tqdm = optional("tqdm", "no progress bar")
    bar = tqdm.tqdm(total=plan.steps, unit="window") if tqdm else None
    for step in range(plan.steps):
        loader = sampler.window(plan.n)
        turns = [*variants.items()]
        if step % 4 == 3 or step + 1 == plan.steps:
            turns.append(("floor", floor))
        first = (step + step // 4) % len(turns)
        now = {name: timed_window(v, loader) for name, v in turns[first:] + turns[:first]}
        for name in variants:
            losses.setdefault(name, []).append(now[name][1])
            seconds.setdefault(name, []).append(now[name][0])
            if "floor" in now:
                beyond.setdefault(name, []).append(now[name][0] - now["floor"][0])
        if bar:
            bar.set_postfix_str(
                "loss " + " / ".join(f"{losses[name][-1]:.3f}" for name in variants)
            )
            bar.update()
        if time.perf_counter() > deadline and beyond:
            print(f"\nout of time after {step + 1} windows, before the learning rate has decayed")
            break
    if bar:
        bar.close()
    return losses, seconds, beyond


def gradient_errors(
    model: nn.Module, variants: dict[str, Variant], loader: Batches
) -> dict[str, float]:
    """Relative L2 error of each variant's mean gradient, against the same bf16 micro-gradients
    added in float64. The math attention kernel is deterministic: every backward, same bits."""
    params = list(model.parameters())
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    with sdpa_kernel(SDPBackend.MATH):
        for x, y in loader:
            for total, grad in zip(exact, torch.autograd.grad(model(x, y), params), strict=True):
                total += grad.double() / len(loader)
        for variant in variants.values():
            variant.window(loader)

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.sqrt(sum(t.square().sum().item() for t in tensors))

    def differences(variant: Variant) -> Iterator[Tensor]:
        for p, total in zip(variant.model.parameters(), exact, strict=True):
            assert p.grad is not None
            yield p.grad.double() - total

    return {name: norm(differences(variant)) / norm(exact) for name, variant in variants.items()}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors allocated under it, and their peak: for CPUs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def add(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = {t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)}
        for storage in made - known:
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result


def memory(make: Make, model: nn.Module, plan: Plan, sampler: Sampler) -> tuple[int, int]:
    """Bytes of one variant alone: at rest between two windows (weights, gradients, optimizer
    state), and at the peak within a window (activations and temporary tensors as well)."""
    gc.collect()
    loaders = [sampler.window(plan.n) for _ in range(2)]
    if sampler.device.type == "cuda":
        before = torch.cuda.memory_allocated(sampler.device)
        torch.cuda.reset_peak_memory_stats(sampler.device)
    with LiveBytes() if sampler.device.type == "cpu" else contextlib.nullcontext() as count:
        variant = make(copy.deepcopy(model), plan)
        for loader in loaders:
            variant.window(loader)
        gc.collect()
        if count:
            return count.live, count.peak
        peak = torch.cuda.max_memory_allocated(sampler.device)
        return torch.cuda.memory_allocated(sampler.device) - before, peak - before


@torch.no_grad()
def validation_loss(model: nn.Module, loader: Batches) -> float:
    return torch.stack([model(x, y) for x, y in loader]).mean().item()


def print_table(results: dict[str, dict[str, float]]) -> None:
    metrics = {
        "train_loss": ("training loss, last tenth", ".4f"),
        "val_loss": ("validation loss", ".4f"),
        "gradient_error_8": ("gradient error, N=8", ".1e"),
        "gradient_error_64": ("gradient error, N=64", ".1e"),
        "window_ms": ("ms per window", ".1f"),
        "beyond_ms": ("  beyond forward + backward", ".1f"),
        "bytes_per_parameter": ("bytes per parameter at rest", ".2f"),
        "peak_mb": ("peak MB, with activations", ".1f"),
    }
    print("\n" + " " * 30 + "".join(f"{name:>15}" for name in results))
    for key, (label, form) in metrics.items():
        print(f"{label:<30}" + "".join(f"{row[key]:>15{form}}" for row in results.values()))
    print()


def plot(losses: Series, path: Path) -> None:
    if not optional("matplotlib", "no picture of the loss curves"):
        return
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, curve), style in zip(losses.items(), ("-", "-", "--"), strict=True):
        left.plot(curve, style, label=name)
        gap = [a - b for a, b in zip(curve, losses["native fp32"], strict=True)]
        right.plot(gap, style, label=name)
    left.set(title="training loss", xlabel="window", ylabel="nats per byte")
    right.set(title="loss minus that of native fp32", xlabel="window")
    left.legend()
    figure.savefig(path, dpi=120)
    print(f"loss curves: {path}")


PRESETS = {
    "cpu": {"steps": 250, "micro_batch": 2, "block": 128, "layers": 3, "dim": 192, "lr": 1e-3},
    "cuda": {"steps": 100, "micro_batch": 8, "block": 512, "layers": 12, "dim": 768, "lr": 6e-4},
    "quick": {"steps": 6, "micro_batch": 2, "block": 64, "layers": 2, "dim": 64, "lr": 1e-3},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # A model this small gains little from more; on a busy machine, waiting for them takes longest.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, help="windows, that is, updates")
    parser.add_argument("--n", type=int, default=8, help="micro-batches per window")
    parser.add_argument("--micro-batch", type=int, help="sequences per micro-batch")
    parser.add_argument("--block", type=int, help="bytes per sequence")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dim", type=int, help="width; a multiple of 64")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="train less if slow")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is learned")
    args = parser.parse_args(argv)
    kind = torch.device(args.device).type
    if kind not in PRESETS:
        parser.error(f"--device {args.device}: it must be cpu or cuda")
    for name, value in PRESETS["quick" if args.quick else kind].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


def environment(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = names[0] if names else platform.processor() or platform.machine()
    repository = str(Path(__file__).resolve().parent)
    failed, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(repository)} rev-parse HEAD")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": None if failed else commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(optional("triton", "torch backend"), "__version__", None),
    }


def main(argv: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse(argv)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text, held_out = read_corpus()
    sampler = Sampler(text, args.micro_batch, args.block, device, args.seed)
    validation = Sampler(held_out, args.micro_batch, args.block, device, args.seed).window(64)
    model: nn.Module = GPT(args.layers, args.dim, args.block).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    plan = Plan(args.n, args.lr, args.steps)
    print(
        f"{parameters / 1e6:.2f} M bf16 parameters on {device}; {len(text) / 1e6:.1f} MB of text; "
        f"windows of {plan.n} micro-batches of {args.micro_batch} x {args.block} bytes"
    )
    if slow_bf16 := bf16_is_slow(device, args.dim):
        print("this CPU is slow in bf16: weights and gradients are bf16, the arithmetic is fp32")
        model = Float32Math(model)

    # Warm up, and fit the number of windows to the time there is.
    floor = ForwardBackward(copy.deepcopy(model), plan)
    for _ in range(3):
        estimate = 4 * timed_window(floor, sampler.window(plan.n))[0]
    if estimate * plan.steps > args.seconds:
        plan.steps = max(4, int(args.seconds / estimate))
        print(f"about {estimate:.1f} s per window: {plan.steps} windows, not {args.steps}")

    replicas = {name: make(copy.deepcopy(model), plan) for name, make in VARIANTS.items()}
    deadline = time.perf_counter() + args.seconds
    losses, seconds, beyond = train(replicas, floor, sampler, plan, deadline)
    windows = len(losses["native fp32"])
    tail = max(1, windows // 10)
    results = {
        name: {
            "train_loss": statistics.fmean(losses[name][-tail:]),
            "val_loss": validation_loss(variant.model, validation),
            "window_ms": 1e3 * statistics.median(seconds[name]),
            "beyond_ms": 1e3 * statistics.median(beyond[name]),
        }
        for name, variant in replicas.items()
    }

    # At the trained weights: what accumulation loses, then what each variant alone holds.
    trained = copy.deepcopy(replicas["native fp32"].model)
    del replicas
    for n in (8, 64):
        still = Plan(n, lr=0.0, steps=1, max_norm=math.inf)
        probes = {name: make(copy.deepcopy(trained), still) for name, make in VARIANTS.items()}
        for name, error in gradient_errors(trained, probes, sampler.window(n)).items():
            results[name][f"gradient_error_{n}"] = error
        del probes
    for name, make in VARIANTS.items():
        rest, peak = memory(make, trained, plan, sampler)
        results[name] |= {"bytes_per_parameter": rest / parameters, "peak_mb": peak / 1e6}

    print_table(results)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(losses, args.out / "train_gpt.png")
    row = {
        **environment(device),
        "settings": vars(args) | {"out": str(args.out)},
        "windows": windows,
        "parameters": parameters,
        "float32_arithmetic": slow_bf16,
        "results": results,
        "losses": losses,
        "window_seconds": seconds,
        "seconds": time.perf_counter() - began,
    }
    (args.out / "train_gpt.json").write_text(json.dumps(row) + "\n")
    print(f"numbers: {args.out / 'train_gpt.json'}; {row['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
