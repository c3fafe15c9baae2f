"""`python -m benchmarks.run`: measure, save rows, print tables and judge the targets."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from fusedaccum.bench.forms import Plan
from fusedaccum.bench.run import BUSY
from fusedaccum.bench.run import COLUMNS as BENCH
from fusedaccum.doctor import machine, output
from fusedaccum.doctor.output import column

from . import cases, linear, suites
from .forms import is_exact
from .measure import Row
from .suites import COPY, Suite

# What `--device` measures by default.
SHAPES = {
    "cpu": {"micro": ["flat_64mi"], "cycle": ["gpt2_small"]},
    "cuda": {
        "micro": ["flat_64mi", "lora_500", "llama_1b"],
        "cycle": ["lora_500", "llama_1b"],
    },
}
KINDS: dict[str, Callable[[Suite, str, str], None]] = {
    "micro": suites.micro,
    "cycle": suites.cycle,
}
# Groups of variants that these time, for the progress bar.
N_GROUPS = {
    ("micro", "eager"): 6,
    ("micro", "compiled"): 4,
    ("cycle", "eager"): 1,
    ("cycle", "compiled"): 1,
}
# Seconds for each of those groups.
BUDGETS = {"micro": 8.0, "cycle": 60.0, "linear": 2.0}
# Targets, per device and operation: (column, bound, whether smaller is better). `ratio` is in units
# of an fp32 copy, `copy_share` is of the copy's bandwidth, `speedup` over the best native form.
TARGETS = {
    "cpu": {"accumulate": ("ratio", 1.0, True), "window": ("speedup", 1.5, False)},
    "cuda": {
        "accumulate": ("copy_share", 0.95, False),
        "step": ("copy_share", 0.93, False),
        "window": ("speedup", 1.7, False),
    },
}


def numbers(text: str) -> list[int]:
    """The numbers of "1,4,8"."""
    return [int(number) for number in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("micro", "cycle", "linear"))
    parser.add_argument("--shapes", nargs="+", choices=sorted(cases.SHAPES))
    parser.add_argument(
        "--n", type=numbers, default=[8], help="micro-batches per window, as 8 or 1,4,8,16"
    )
    parser.add_argument("--rounds", type=int, help="samples of each variant")
    parser.add_argument("--budget", type=float, help="seconds for each group of variants")
    parser.add_argument("--backend", choices=("triton", "torch"), help="fusedaccum's")
    parser.add_argument("--forms", choices=("eager", "compiled"), help="without or with compiling")
    parser.add_argument("--show", type=Path, help="measure nothing: print the rows of this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    return parser.parse_args(argv)


def warn_if_busy(device: torch.device) -> None:
    """Say so where other processes would decide what is measured."""
    if device.type == "cpu" and machine.is_busy() and "OMP_WAIT_POLICY" not in os.environ:
        print(BUSY)


def measure_all(args: argparse.Namespace) -> Suite:
    """Run what the arguments ask for."""
    device = torch.device(args.device)
    warn_if_busy(device)
    kinds = ["micro", "cycle"] if args.only is None else [args.only] * (args.only in KINDS)
    passes = [args.forms] if args.forms else ["eager"] if args.quick else ["eager", "compiled"]
    rounds = args.rounds or (3 if args.quick else 20 if device.type == "cuda" else 9)

    def shapes(kind: str) -> list[str]:
        return args.shapes or (["tiny"] if args.quick else SHAPES[device.type][kind])

    def counts(kind: str) -> list[int]:
        # A single operation is the same for any N.
        return args.n if kind == "cycle" else [max(args.n)]

    # Shape by shape, so that what compiles for one is used while it is there.
    work = [
        (forms_of, shape, kind, n)
        for forms_of in passes
        for shape in sorted({shape for kind in kinds for shape in shapes(kind)})
        for kind in kinds
        if shape in shapes(kind)
        for n in counts(kind)
    ]
    total = rounds * sum(N_GROUPS[kind, forms_of] for forms_of, _, kind, _ in work)
    bar = output.Progress(total, "round")
    suite = Suite(
        device,
        Plan(backend=args.backend),
        rounds=rounds,
        budget_s=0.0,
        gate_shapes=cases.tiny() if args.quick else cases.odd(),
        name="-".join(filter(None, (args.only or "all", args.forms, args.quick and "quick"))),
        tick=bar.advance,
    )
    by_default = args.only is None and args.forms is None and device.type == "cuda"
    if args.only == "linear" or by_default:
        layers = ["linear_tiny"] if args.quick else [n for n in linear.LAYERS if n != "linear_tiny"]
        suite.race.budget_s = args.budget or BUDGETS["linear"]
        for layer, tokens in itertools.product(layers, [64] if args.quick else linear.TOKENS):
            linear.linear(suite, layer, tokens)
    with bar:
        for forms_of, shape, kind, n in work:
            bar.describe(f"{kind} {shape} {forms_of} N={n}")
            suite.plan = replace(suite.plan, n=n)
            suite.race.budget_s = args.budget or BUDGETS[kind]
            KINDS[kind](suite, shape, forms_of)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return suite


COLUMNS: dict[str, output.Column] = {
    "": column("variant"),
    "B/elem": lambda row: f"{row['bytes'] / row['n_elements']:.0f}",
    **{name: BENCH[name] for name in ("p20", "p50", "p80 ms", "x copy")},
    "GB/s": lambda row: f"{row['bytes'] / row['p50_ms'] / 1e6:.1f}",
    **{name: BENCH[name] for name in ("% of copy rate", "host ms", "grad error")},
}


def show(rows: Sequence[Row]) -> None:
    """One group: variants measured in turns, fastest first, ceilings on top."""
    head = rows[0]
    tokens = f", {head['tokens']} tokens" if head.get("tokens") else ""
    title = (
        f"{head['operation']}, {head['shape']} ({head['n_elements']:,} {head['dtype']} elements), "
        f"N={head['n']}{tokens}, {head['samples']} samples, load {head['load']}"
    )
    fastest = sorted(rows, key=lambda r: (r["grad_error"] is not None, r["p50_ms"]))
    output.print_rows(title, fastest, COLUMNS)


def judge(rows: Sequence[Row], device: str) -> list[str]:
    """What the rows say about the targets; wins and losses alike."""
    lines = []
    for _, members in groupby(rows, key=lambda row: row["group"]):
        group = {row["variant"]: row for row in members}
        head = group[COPY]
        ours = {name: row for name, row in group.items() if name.startswith("fused_")}
        rivals = {
            name: row
            for name, row in group.items()
            if row["grad_error"] is not None and name not in ours and is_exact(name)
        }
        if not ours or not rivals:
            continue
        best = min(rivals, key=lambda name: rivals[name]["p50_ms"])
        for name, row in ours.items():
            speedup = rivals[best]["p50_ms"] / row["p50_ms"]
            text = (
                f"{head['operation']}, {head['shape']}, {head['dtype']}: {name} takes "
                f"{row['ratio']:.2f} x copy and is {speedup:.2f} x as fast as {best}"
            )
            target = TARGETS[device].get(head["operation"])
            if target:
                column, bound, is_upper = target
                value = speedup if column == "speedup" else row[column]
                met = value <= bound if is_upper else value >= bound
                text += (
                    f": target {column} {'<=' if is_upper else '>='} {bound} "
                    f"{'met' if met else 'MISSED'} ({value:.2f})"
                )
            lines.append(text)
    return lines


def report(rows: Sequence[Row], device: str, *, targets: bool) -> None:
    """Print tables and verdicts."""
    for _, members in groupby(rows, key=lambda row: row["group"]):
        show(list(members))
    if targets:
        print("\n" + "\n".join(judge(rows, device)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a variant was refused."""
    args = parse(argv)
    if args.show:
        rows = json.loads(args.show.read_text("utf-8"))
        report(rows, "cuda" if rows[0]["driver"] else "cpu", targets=True)
        return 0
    # Compile times are only honest with cold caches: Inductor's, and that of our own loops.
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        suite = measure_all(args)
    report(suite.rows, torch.device(args.device).type, targets=not args.quick)
    return suite.close()


if __name__ == "__main__":
    sys.exit(main())
