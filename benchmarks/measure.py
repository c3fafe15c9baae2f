"""Timing, the correctness gate, and rows: what makes two numbers comparable.

Variants are timed in turns within one process, in a new order each round, beside an fp32 copy of
as many elements (twice: the difference of the two is the noise). A form is timed only after it
agreed with float64.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fusedaccum.bench.timing import Clock as Clock
from fusedaccum.bench.timing import CudaClock as CudaClock
from fusedaccum.bench.timing import Samples as Samples
from fusedaccum.bench.timing import interleave as interleave
from fusedaccum.doctor.machine import cpu_name

from . import cases
from .baselines import Form, Plan

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]

# --- time ---


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, to be replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- correctness ---

# An fp32 sum of 8 terms is off by a few 2^-24 of its largest partial sum.
MAX_GRAD_ERROR = 1e-6
# Of one step, for the worst element: where the mean gradient nearly cancels, its rounding is
# magnified by AdamW. An element that was missed is off by 1.
MAX_UPDATE_ERROR = 0.05
# Half a unit in the last of bf16's 8 bits.
MAX_ROUNDING = 2.0**-8


class Refused(RuntimeError):
    """A form that disagrees with float64: it is not timed."""


@dataclass(frozen=True)
class Gate:
    """What a form got wrong.

    Attributes:
        grad_error: relative L2 error of the mean gradient.
        update_error: largest error of a parameter after two windows, in learning rates.
        seconds: what the check took, with whatever had to be compiled.
    """

    grad_error: float
    update_error: float
    seconds: float


def gate(
    make: Callable[[list[Tensor], Plan], Form],
    shapes: cases.Shapes,
    dtype: torch.dtype,
    plan: Plan,
    device: torch.device,
) -> Gate:
    """Run two windows, the second with misaligned gradients, against AdamW in float64.

    Raises:
        Refused: if a form that claims to be exact is not.
    """
    began = time.perf_counter()
    start = cases.random(shapes, dtype, device, seed=0)
    form = make(start, plan)
    exact = [p.double().requires_grad_() for p in start]
    optimizer = torch.optim.AdamW(exact, **plan.adamw())
    grad_error = 0.0
    for window in range(2):
        means = [torch.zeros_like(p) for p in exact]
        for index in range(plan.n):
            seed = 1 + window * plan.n + index
            grads = cases.random(shapes, dtype, device, seed=seed, offset=window)
            for mean, grad in zip(means, grads, strict=True):
                mean += grad.double() / plan.n
                if form.loss_is_divided:
                    grad /= plan.n
            form.micro_batch(grads, index)
        errors = [a.double() - b for a, b in zip(form.mean_grads(), means, strict=True)]
        grad_error = max(grad_error, _norm(errors) / _norm(means))
        for param, mean in zip(exact, means, strict=True):
            param.grad = mean
        if plan.max_norm is not None:
            clip_grad_norm_(exact, plan.max_norm)
        optimizer.step()
        form.update()
    values = [value.double() for value in form.values()]
    update_error = _largest(v - e.detach() for v, e in zip(values, exact, strict=True)) / plan.lr
    rounding = _largest(
        (p.detach().double() - v) / v.abs().clamp(min=1e-30)
        for p, v in zip(form.params, values, strict=True)
    )
    found = Gate(grad_error, update_error, time.perf_counter() - began)
    # Negated, so that NaN is refused.
    if form.is_exact and not (
        grad_error <= MAX_GRAD_ERROR
        and update_error <= MAX_UPDATE_ERROR
        and rounding <= MAX_ROUNDING
    ):
        raise Refused(
            f"mean gradient off by {grad_error:.1e} (allowed {MAX_GRAD_ERROR:.1e}), parameters by "
            f"{update_error:.1e} learning rates ({MAX_UPDATE_ERROR:.1e}), their rounding by "
            f"{rounding:.1e} ({MAX_ROUNDING:.1e})"
        )
    return found


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())


def _largest(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([t.abs().max() for t in tensors]).max())


def is_finite(form: Form) -> bool:
    """Whether neither parameters nor accumulators hold NaN or Inf."""
    tensors = (*form.params, *form.mean_grads())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


# --- rows ---


def _command(*arguments: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The commit of this checkout; without git, or with changes, a hash of the sources as well."""
    sources = hashlib.sha256()
    for folder in ("fusedaccum", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            sources.update(path.read_bytes())
    head = _command("git", "rev-parse", "--short=12", "HEAD")
    paths = ("fusedaccum", "kernels", "benchmarks")
    if head and not _command("git", "status", "--porcelain", "--", *paths):
        return head
    return f"{head}+sources.{sources.hexdigest()[:12]}".lstrip("+")


def _driver() -> str:
    found = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if found:
        return found.splitlines()[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return version[0] if version else "unknown"


def environment(device: torch.device) -> Row:
    """What every row of a run says about where it was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "driver": _driver() if on_cuda else None,
        "n_cores": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "fusedaccum_cc": os.environ.get("FUSEDACCUM_CC"),  # "0": no compiled loops on the CPU
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        # What torch's allocator has cached is free to us too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 1 << 62


def results_folder(device: torch.device) -> Path:
    """Where results of this machine go: $OUT, else a folder named after the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / slug)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_path(folder: Path, name: str) -> Path:
    """A path that is not taken, starting with today: results are added, never overwritten."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path, number = folder / f"{today}-{name}", 1
    stem, suffix = path.stem, path.suffix
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path


def save(rows: Sequence[Row], path: Path) -> None:
    """One JSON list, one row per line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
