"""`python -m fusedaccum bench`: what an update costs on this machine, beside stock PyTorch."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends.tensors import ALIGNMENT
from ..doctor import machine, output
from ..doctor.checks import Wrong, threads
from ..doctor.output import column
from . import gate, shapes
from .forms import Blocks, Foreach, Form, Native, Plain, Plan, build
from .ours import Operations, Ours, Wrapper
from .race import Call, Race, Variant, copy, operations, windows
from .shapes import Shapes

COPY, COPY_AGAIN = "fp32 copy", "fp32 copy, again"
OPERATIONS = ("first micro-batch", "later micro-batch", "last, with its norm")
WINDOW = "window"
# Samples of each form, and shares of the time: the window is what counts.
ROUNDS = {"cpu": 40, "cuda": 100}
OPERATION_SHARE, WINDOW_SHARE = 0.12, 0.52
BUSY = (
    "this machine has other work to do: torch's threads wait for each other then, and native forms "
    "may be measured much too slow. Wait for a quiet moment, or set OMP_WAIT_POLICY=PASSIVE"
)


COLUMNS = {
    "": column("form"),
    "p20": column("p20_ms", ".3f"),
    "p50": column("p50_ms", ".3f"),
    "p80 ms": column("p80_ms", ".3f"),
    "x copy": column("ratio", ".2f"),
    "B/param": column("bytes_per_param", "g"),
    "% of copy rate": column("copy_share", ".0f", 100),
    "first ms": column("first_ms", ".1f"),
    "host ms": column("host_ms", ".3f"),
    "grad error": column("grad_error", ".0e"),
}


def kinds(device: torch.device, dtype: torch.dtype) -> list[type[Form]]:
    """The forms to measure beside ours, the inexact one last."""
    found: list[type[Form]] = [Native, Foreach]
    if device.type == "cpu":
        found.append(Blocks)
    if dtype == torch.bfloat16:  # fp16 loses gradients, and AdamW's eps, without a scaler
        found.append(Plain)
    return found


@dataclass
class Bench:
    """One run.

    Args:
        device, dtype, plan: what is measured.
        sizes: shapes of the parameters.
        seconds: about how long the timing takes.
        progress: shows it.
    """

    device: torch.device
    dtype: torch.dtype
    plan: Plan
    sizes: Shapes
    seconds: float
    progress: output.Progress
    rows: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, gate.Gate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return ROUNDS.get(self.device.type, ROUNDS["cpu"])

    def run(self) -> None:
        """Check the forms, then time those that are right."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        self.progress.describe("checking against float64")
        # Small tensors: a team of threads takes longer for them on a busy machine.
        with threads(1):
            all_kinds: list[type[Form]] = [Operations, Wrapper, *kinds(self.device, self.dtype)]
            for kind in all_kinds:
                self._check(kind, like)
        native = [k for k in kinds(self.device, self.dtype) if k.name not in self.refused]
        own = Ours.name not in self.refused
        self.race = Race(
            self.device,
            {COPY: copy, COPY_AGAIN: copy},
            self.rounds,
            OPERATION_SHARE * self.seconds,
            self.refuse,
            self.progress.advance,
        )
        self._operations([Operations, *native] if own else native)
        self._windows([Wrapper, *native] if own else native)

    def _check(self, kind: type[Form], like: Tensor) -> None:
        if kind.name in self.refused:
            return
        try:
            found = gate.gate(kind, self.plan, like)
        except Exception as error:  # one form that cannot run must not cost the others
            self.refuse(kind.name, error)
            return
        before = self.gates.get(kind.name, found)
        self.gates[kind.name] = max(found, before, key=lambda g: g.grad_error)

    def refuse(self, name: str, error: Exception) -> None:
        """No number for this form, and why."""
        known = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        self.refused[name] = f"{known}{error}"

    def _random(self, seed: int, std: float) -> list[Tensor]:
        return gate.random(self.sizes, self.dtype, self.device, seed=seed, std=std)

    def _operations(self, sound: Sequence[type[Form]]) -> None:
        built = build(sound, self._random(1, 0.02), self.plan)
        titles = (*OPERATIONS, f"step ({self.plan.optimizer})")
        for title, call in zip(titles, operations(self._random(2, 1.0)), strict=True):
            self._time(title, built, call)

    def _windows(self, sound: Sequence[type[Form]]) -> None:
        gc.collect()
        built = build(sound, self._random(1, 0.02), self.plan)
        grads = self._random(2, 1.0)
        self.race.budget_s = WINDOW_SHARE * self.seconds
        self._time(WINDOW, built, windows(grads, [grad / self.plan.n for grad in grads]))
        self.held = {form.name: form.held() / shapes.count(self.sizes) for form in built}

    def _time(self, operation: str, built: Sequence[Form], call: Callable[[Form], Call]) -> None:
        """Time forms in turns beside two copies, and keep the rows."""
        self.progress.describe(operation)
        variants = {
            form.name: Variant(*call(form), self.gates.get(form.name), form)
            for form in built
            if form.name not in self.refused
        }
        for name, variant, columns in self.race.run(variants, shapes.count(self.sizes)):
            row = {"operation": operation, "form": name, "bytes_per_param": variant.moved}
            self.rows.append(row | columns)

    def summary(self) -> dict[str, Any]:
        """The window: ours, every other form, and the noise."""
        times = {row["form"]: row["p50_ms"] for row in self.rows if row["operation"] == WINDOW}
        ours = times.get(Ours.name)
        native = {name: ms for name, ms in times.items() if name.startswith("native")}
        best = min(native, key=lambda name: native[name], default=None)
        once, again = (
            [row["p50_ms"] for row in self.rows if row["form"] == name]
            for name in (COPY, COPY_AGAIN)
        )
        noise = [abs(a / b - 1) for a, b in zip(again, once, strict=True)]
        return {
            "window_ms": times,
            "best_native": best,
            "speedup": round(native[best] / ours, 3) if best and ours else None,
            "bytes_held_per_param": {name: round(n, 2) for name, n in self.held.items()},
            "noise": round(max(noise), 4) if noise else None,
        }


def bytes_needed(dtype: torch.dtype, plan: Plan) -> int:
    """Bytes per parameter, at most, of all forms of a window, gradients and the copies."""
    size = dtype.itemsize
    states = plan.n_states()
    ours = size + (4 if dtype == torch.float16 else 4 - size) + 4 + 4 * states
    native = (size + 4 if size < 4 else 4) + 4 + 4 * states
    plain = size * (2 + states) if dtype == torch.bfloat16 else 0
    # The start, the gradients twice, two copies, and what a foreach step allocates.
    return 3 * size + ours + native + plain + 8 + (0 if plan.optimizer == "adamw" else 8)


def check_memory(device: torch.device, dtype: torch.dtype, plan: Plan, sizes: Shapes) -> None:
    """Refuse what would not fit.

    Raises:
        ValueError: with what it needs and what there is.
    """
    n = shapes.count(sizes)
    needed = (n + ALIGNMENT * len(sizes)) * bytes_needed(dtype, plan)
    free = machine.memory_bytes(device) if device.type in ("cpu", "cuda") else 0
    if free and needed > free:
        fits = int(0.9 * n * free / needed)
        raise ValueError(
            f"{n:,} parameters need about {needed / 2**30:.1f} GiB on {device}, which has "
            f"{free / 2**30:.1f} GiB free; use --params {max(fits // 10**6, 1)}M or fewer --shapes"
        )


def bench(
    device_name: str | None,
    dtype: torch.dtype,
    plan: Plan,
    name: str,
    sizes: Shapes | None,
    seconds: float,
    as_json: bool,
) -> int:
    """Measure and print.

    Args:
        name, sizes: what is measured, for people, and its shapes; None: the device's default.

    Returns:
        0, or 1 if a form was refused.

    Raises:
        ValueError: for a device or a size that cannot be.
    """
    device = machine.choose(device_name)[0]
    if sizes is None:
        name, sizes = shapes.default(device.type)
    check_memory(device, dtype, plan, sizes)
    rounds = ROUNDS.get(device.type, ROUNDS["cpu"])
    busy = device.type == "cpu" and machine.is_busy()
    if busy and not as_json:
        print(BUSY, file=sys.stderr)
    # Events are recorded on the current device, which need not be this one.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with output.Progress(5 * rounds, "round", as_json) as progress, current:
        run = Bench(device, dtype, plan, sizes, seconds, progress)
        run.run()
    about = {
        "name": name,
        "n_tensors": len(sizes),
        "n_params": shapes.count(sizes),
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(plan),
        "was_busy": busy,
    }
    if as_json:
        report = {
            "installed": machine.installed(),
            "device": machine.describe(device),
            "measured": about,
            "rows": run.rows,
            "refused": run.refused,
            "summary": run.summary(),
        }
        print(json.dumps(report))
    else:
        _print(run, about)
    return 1 if run.refused else 0


def _print(run: Bench, about: dict[str, Any]) -> None:
    device = machine.describe(run.device)
    taken = device["backends"][about["dtype"]]
    print(
        f"{about['name']}: {about['n_params']:,} {about['dtype']} parameters in "
        f"{about['n_tensors']} tensors, {run.plan.optimizer}, {run.plan.n} micro-batches\n"
        f"{device['name']}, torch {torch.__version__}; fusedaccum by {taken['path']}"
    )
    columns = dict(COLUMNS)
    if run.device.type != "cuda":  # there the call returns when it is done
        del columns["host ms"]
    for operation in dict.fromkeys(row["operation"] for row in run.rows):
        rows = [row for row in run.rows if row["operation"] == operation]
        title = operation
        if operation == WINDOW:
            title = f"window of {run.plan.n}, clipping and step"
        output.print_rows(f"{title} ({rows[0]['samples']} samples)", rows, columns)
    print()
    for line in conclusions(run.summary(), run.refused):
        print(line)


def conclusions(summary: dict[str, Any], refused: dict[str, str]) -> list[str]:
    """What the numbers say, losses as plainly as wins."""
    lines = [f"not timed: {name}: {why}" for name, why in refused.items()]
    held = summary["bytes_held_per_param"]
    if summary["noise"] is not None:
        lines.append(
            f"noise: the same copy measured twice differs by up to {100 * summary['noise']:.0f} %"
        )
    best = summary["best_native"]
    if held:
        kept = [f"{name} {held[name]:.1f}" for name in (Ours.name, best) if name in held]
        lines.append(f"held between windows, bytes per parameter: {', '.join(kept)}")
    if summary["speedup"] is not None:
        windows = summary["window_ms"]
        lines.append(
            f"one window: {windows[Ours.name]:.4g} ms, {best} {windows[best]:.4g} ms: "
            f"{summary['speedup']:.2f} x"
        )
    return lines
