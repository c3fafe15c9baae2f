"""`python -m fusedaccum bench`: what a window costs on this machine, beside stock PyTorch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from .. import backends
from ..doctor import machine, output
from ..doctor.judge import random
from ..doctor.output import Row, column
from ..doctor.plan import Plan
from . import shapes
from .forms import kinds
from .race import COPY, COPY_AGAIN, WINDOW, Race
from .shapes import Shapes

MAX_ROUNDS = 100
# Of the same copy, measured twice: beyond that no difference of other forms means anything.
MAX_NOISE = 0.25
COLUMNS = {
    "": column("variant"),
    "B/elem": lambda row: f"{row['bytes'] / row['n_elements']:.0f}" if row["bytes"] else "",
    "p20": column("p20_ms", ".3f"),
    "p50": column("p50_ms", ".3f"),
    "p80 ms": column("p80_ms", ".3f"),
    "x copy": column("ratio", ".2f"),
    "% of copy rate": column("copy_share", ".0f", 100),
    "host ms": column("host_ms", ".3f"),
    "grad error": column("grad_error", ".0e"),
}


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
        ValueError: for a device, a backend or a size that cannot be.
    """
    began = time.perf_counter()
    *_, device = machine.choose(device_name)[:2]  # the first GPU, if there is one
    backends.why(plan.backend, device)
    if sizes is None:
        name, sizes = shapes.default(device.type)
    busy = machine.busy(device)
    if busy and not as_json:
        print(busy, file=sys.stderr)
    like = torch.empty(0, dtype=dtype, device=device)
    forms = {kind.name: kind for kind in kinds(like)}
    race = Race(device, plan, forms, rounds=MAX_ROUNDS, budget_s=seconds)
    # Events are recorded on the current device, which need not be this one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        built = race.build(forms, sizes, dtype)
        if race.skipped and not built:
            reasons = "; ".join(f"{form}: {why}" for form, why in race.skipped.items())
            raise ValueError(f"nothing fits on {device}; use smaller --shapes. {reasons}")
        variants = race.windows(built, random(sizes, dtype, device, seed=2))
        race.budget_s = max(seconds - (time.perf_counter() - began), seconds / 4)
        # Ours and one native form are enough to say something.
        spare = [name for name in reversed(forms) if name not in ("fused_hooks", "native_fp32")]
        n_elements = shapes.count(sizes)
        race.time(WINDOW, name, dtype, variants, n_elements=n_elements, spare=spare)
    report: dict[str, Any] = {
        "installed": machine.installed(),
        "device": machine.describe(device),
        "measured": {"name": name, "n_tensors": len(sizes), **asdict(plan), "was_busy": bool(busy)},
        "rows": race.rows,
        "refused": race.refused,
        "skipped": race.skipped,
        "bytes_kept": {name: forms[name].bytes(plan, like).kept for name in built},
        "speedup": speedups(race.rows, lambda name: forms[name].is_exact),
    }
    if as_json:
        print(json.dumps(report))
    else:
        taken = report["device"]["backends"][race.rows[0]["dtype"]]
        print(
            f"{report['device']['name']}, torch {torch.__version__}; {plan.optimizer} on "
            f"{len(sizes)} tensors; fusedaccum by {taken['path']}"
        )
        show(race.rows, COLUMNS)
        print("", *conclusions(report), sep="\n")
    return 1 if race.refused else 0


def show(rows: Sequence[Row], columns: dict[str, output.Column]) -> None:
    """Print one group of rows: ceilings on top, then the fastest first."""
    head = rows[0]
    what = f"{head['n_elements']:,} {head['dtype']} elements"
    what += f", {head['tokens']} tokens" if head.get("tokens") else ""
    title = f"{head['operation']}, {head['shape']} ({what}), N={head['n']}"
    title += f", {head['samples']} samples, load {head['load']}"
    output.print_rows(
        title, sorted(rows, key=lambda r: (r["grad_error"] is not None, r["p50_ms"])), columns
    )


def speedups(rows: Sequence[Row], is_exact: Callable[[str], bool]) -> dict[str, tuple[str, float]]:
    """Of one group: for each of our forms the fastest exact one of others, and its time in units of
    ours."""
    forms = {row["variant"]: row["p50_ms"] for row in rows if row["grad_error"] is not None}
    exact = {name: ms for name, ms in forms.items() if is_exact(name)}
    ours = {name for name in exact if name.startswith("fused_")}
    if not exact.keys() - ours:
        return {}
    best = min(exact.keys() - ours, key=lambda name: exact[name])
    return {name: (best, exact[best] / exact[name]) for name in ours}


def conclusions(report: dict[str, Any]) -> list[str]:
    """What the numbers say, losses as plainly as wins."""
    lines = [f"not timed: {name}: {why}" for name, why in report["refused"].items()]
    lines += [f"not timed: {name}: {why}" for name, why in report["skipped"].items()]
    ms = {row["variant"]: row["p50_ms"] for row in report["rows"]}
    noise = max(ms[COPY_AGAIN] / ms[COPY], ms[COPY] / ms[COPY_AGAIN]) - 1
    lines.append(f"noise: the same copy measured twice differs by {100 * noise:.0f} %")
    kept = ", ".join(f"{name} {n}" for name, n in report["bytes_kept"].items())
    lines.append(f"kept between windows, bytes per parameter: {kept}")
    for name, (best, speedup) in report["speedup"].items():
        times = f"{name} {ms[name]:.4g} ms, {best} {ms[best]:.4g} ms"
        verdict = f"{speedup:.2f} x"
        if noise > MAX_NOISE:
            verdict = "inconclusive, for the machine is too busy to tell"
        elif max(speedup, 1 / speedup) <= 1 + noise:
            verdict = f"inconclusive, for the difference ({verdict}) is no larger than the noise"
        lines.append(f"one window: {times}: {verdict}")
    return lines
