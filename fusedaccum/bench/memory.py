"""`python -m fusedaccum memory`: what a model takes to train, by arithmetic and without a GPU.

What a process keeps between two windows, in bytes per parameter, for a parameter of `size` bytes
and an optimizer with k states:

                         parameter   gradient   master         states
    fusedaccum           size        4          2, 4 or none   4 k
    native_fp32          size        4          4              4 k        fp32 masters, by hand
    fp32 and autocast    4           4          none           4 k
    plain_bf16           2           2          none           2 k

DistributedDataParallel keeps buckets of its own beside the gradients, in the parameter's dtype.
With `shard_states` whole parameters are dealt out to the processes, and each keeps masters and
states of its own. FSDP2 cuts every tensor along its first dimension. Where shapes are known, the
numbers are those of the process that keeps most. The tests compare all of it with counted bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch

from ..backends import Keep
from ..doctor import machine, output
from ..doctor.output import column
from ..doctor.plan import OPTIMIZERS, Plan
from ..window.deal import Deal
from . import shapes
from .shapes import Shapes

CHOICES = (*OPTIMIZERS, "lion")
ENGINES = ("ddp", "zero1", "fsdp2")
KINDS = ("parameters", "gradients", "masters", "states", "DDP's buckets")
BUCKET_MIB = {"cuda": 128, "cpu": 64}  # `bucket_cap_mb`, where it is None
NOT_INCLUDED = (
    "activations, with the copies of weights that autocast makes (up to 2 bytes per parameter)",
    "the layers that FSDP2 gathers, and their gradients before they are reduced",
    "what the device needs for itself (a CUDA context, workspaces), and what the allocator wastes",
)
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        sizes: shapes of the parameters, all of which are trained.
        has_shapes: whether these are a model's, and not one number of parameters.
        optimizer: of `CHOICES`, with torch's defaults, sgd with momentum.
        dtype: of the parameters.
        device_type: "cuda" or "cpu", which chooses the size of the bucket.
        processes, engine: how many train it, and by what of `ENGINES`.
        bucket: bytes of fresh gradients that may wait; None: the default of the device.
        master_weights: of `FusedAccumOptimizer`.
    """

    sizes: Shapes
    has_shapes: bool = True
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "cuda"
    processes: int = 1
    engine: str = "ddp"
    bucket: int | None = None
    master_weights: str | None = None

    @property
    def n_states(self) -> int:
        """Tensors of state per parameter."""
        return 1 if self.optimizer == "lion" else Plan(self.optimizer).n_states()

    @property
    def shards(self) -> int:
        """Into how many parts everything is cut."""
        return self.processes if self.engine == "fsdp2" else 1

    def numels(self) -> list[int]:
        """Elements of each tensor in the process that has most of them."""
        if not self.has_shapes:
            return [-(-shapes.count(self.sizes) // self.shards)]
        return [-(-s[0] // self.shards) * math.prod(s[1:]) if s else 1 for s in self.sizes]

    def n_own(self) -> int:
        """Elements whose states the process with most of them keeps."""
        if self.processes == 1 or self.engine != "zero1":
            return sum(self.numels())
        if not self.has_shapes:
            return -(-shapes.count(self.sizes) // self.processes)
        made = [torch.empty(s, dtype=torch.int8, device="meta") for s in self.sizes]
        own = [0] * self.processes
        for tensor, rank in zip(made, Deal(0, self.processes).owners(made), strict=True):
            own[rank] += tensor.numel()
        return max(own)


def rows(request: Request) -> list[dict[str, Any]]:
    """A row for each way of training, ours first: bytes in one process, by kind.

    Raises:
        ValueError: for masters that the dtype cannot have.
    """
    size, k = request.dtype.itemsize, request.n_states
    master = Keep.of(request.master_weights, request.dtype).master_dtype
    ours = (size, 4, master.itemsize if master else 0, 4 * k)
    found = [_row(request, "fusedaccum", ours, size)]
    found[0]["waiting"] = waiting(request)
    if request.dtype != torch.float32:
        found.append(_row(request, "native_fp32", (size, 4, 4, 4 * k), 0))
        found[-1]["waiting"] = size * max(request.numels()) if request.has_shapes else None
    for name, size in (("fp32 and autocast", 4), ("plain_bf16", 2)):
        found.append(_row(request, name, (size, size, 0, size * k), size))
        found[-1]["waiting"] = size * max(request.numels()) if request.has_shapes else None
    for row in found:
        row["kept"] = sum(row["bytes"].values())
        row["peak"] = None if row["waiting"] is None else row["kept"] + row["waiting"]
    return found


def _row(
    request: Request, name: str, each: tuple[int, int, int, int], reducer: int
) -> dict[str, Any]:
    """Bytes by kind, from those per parameter, and per element of what DDP reduces."""
    n, own = sum(request.numels()), request.n_own()
    has_reducer = request.processes > 1 and request.engine != "fsdp2"
    param, grad, master, states = each
    n_masters = own if name == "fusedaccum" else n
    numbers = (n * param, n * grad, n_masters * master, own * states, n * reducer * has_reducer)
    return {"form": name, "bytes": dict(zip(KINDS, numbers, strict=True))}


def waiting(request: Request) -> int:
    """The most bytes of fresh gradients at a time, where they arrive from the last to the first.

    They wait to be added together, as in `Collector.make_room`; one more is being made.
    """
    size = request.dtype.itemsize
    bucket = request.bucket or BUCKET_MIB[request.device_type] << 20
    if not request.has_shapes:
        return min(size * sum(request.numels()), bucket)
    grads = [size * n for n in reversed(request.numels())]
    limit = bucket - min(max(grads), bucket // 2)
    queued = most = 0
    for grad in grads:
        most = max(most, queued + grad)
        queued = grad if queued + grad > limit else queued + grad
    return most


def parse_count(text: str) -> int:
    """`1.1B`, `124M`, `7e9`: how many parameters.

    Raises:
        ValueError: naming what is allowed.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", text.strip().lower())
    value = Decimal(0)  # a float makes 1.1B a little more than a whole number
    if match:
        value = Decimal(re.sub("[_,]", "", match[1])) * SUFFIXES[match[2]]
    if not 1 <= value < 2**60 or value % 1:
        raise ValueError(
            f"--params got {text!r}; a whole number of parameters from 1 on, maybe with K, M, B or "
            "T: 1.1B, 124M or 7e9"
        )
    return int(value)


def sizes_of(model: str) -> Shapes:
    """Shapes of a preset, or of the model that a transformers config describes.

    Raises:
        ValueError: naming what is allowed, or what is missing.
    """
    if model in shapes.PRESETS:
        return shapes.PRESETS[model]
    if not shapes.is_there(model):
        raise ValueError(
            f"--model got {model!r}; allowed are {', '.join(shapes.PRESETS)}, a folder with a "
            "transformers config.json, and that file. Or give --params 1.1B"
        )
    return shapes.of_model(model, instead="--params 1.1B")


def memory(request: Request, name: str, as_json: bool) -> int:
    """Print what a model takes.

    Args:
        request: what is asked.
        name: of the model, for people.

    Returns:
        0.

    Raises:
        ValueError: for what cannot be.
    """
    if request.processes == 1 and request.engine != "ddp":
        raise ValueError(
            f"--engine got {request.engine!r} with --processes 1; it shares out over several: give "
            "--processes 2 or more, or leave --engine out"
        )
    found, n = rows(request), shapes.count(request.sizes)
    report: dict[str, Any] = {
        "model": name,
        "n_params": n,
        "n_tensors": len(request.sizes) if request.has_shapes else None,
        "optimizer": request.optimizer,
        "dtype": str(request.dtype).removeprefix("torch."),
        "device": request.device_type,
        "processes": request.processes,
        "engine": request.engine if request.processes > 1 else None,
        "rows": found,
        "not_included": list(NOT_INCLUDED),
        "free_here": {str(d): machine.memory_bytes(d) for d in machine.available()},
    }
    print(json.dumps(report)) if as_json else _show(report)
    return 0


def _show(report: dict[str, Any]) -> None:
    """For people."""
    engine = {None: "", "ddp": ", DDP", "zero1": ", DDP and shard_states", "fsdp2": ", FSDP2"}
    head = f"{report['model']}: {report['n_params']:,} parameters in {report['dtype']}, all trained"
    head += f", {report['optimizer']}; "
    n = report["processes"]
    print(head + (f"each of {n} processes{engine[report['engine']]}" if n > 1 else "one process"))
    kinds = [kind for kind in KINDS if any(row["bytes"][kind] for row in report["rows"])]
    per_param = [_flat(row, report["n_params"]) for row in report["rows"]]
    columns = {"": column("form"), **{kind: column(kind, ".2f") for kind in kinds}}
    output.print_rows("bytes per parameter", per_param, {**columns, "kept": column("kept", ".2f")})
    in_gib = [_flat(row, 2**30) for row in report["rows"]]
    more = {"kept": column("kept", ".2f"), "+ fresh gradients": column("waiting", ".3f")}
    output.print_rows("GiB", in_gib, {**columns, **more, "peak": column("peak", ".2f")})
    print(
        "\nkept is between two windows; fresh gradients come on top of it in a backward, at most:"
    )
    print("those that wait to be added, or the largest one. Not included:")
    print(*(f"  - {text}" for text in report["not_included"]), sep="\n")
    free = ", ".join(f"{d} {b / 2**30:.1f} GiB" for d, b in report["free_here"].items())
    print(f"free here: {free}")
    if n > 1 and report["engine"] != "fsdp2" and report["dtype"] != "float32":
        print("native_fp32 has no buckets: it averages by hand, as DDP reduces in bf16 or fp16")


def _flat(row: dict[str, Any], unit: int) -> dict[str, Any]:
    """A row's numbers in one dict, in some unit."""
    numbers: Sequence[tuple[str, Any]] = [(k, row[k]) for k in ("kept", "waiting", "peak")]
    numbers = [*row["bytes"].items(), *numbers]
    scaled = {key: None if value is None else value / unit for key, value in numbers}
    return {"form": row["form"], **scaled}
