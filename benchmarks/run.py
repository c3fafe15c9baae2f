"""`python -m benchmarks.run`: measure, save rows, print tables and judge the targets."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fusedaccum.doctor import machine
from fusedaccum.doctor.plan import Plan

from . import cases, host, linear, reduction, suites, variants
from .measure import arguments
from .suites import Suite
from .tables import report

# What `--device` measures by default.
SHAPES = {
    "cpu": {
        "micro": ["flat_64mi"],
        "cycle": ["gpt2_small"],
        "reduction": ["lora_500"],
        "variants": ["tiny"],  # interpreted
    },
    "cuda": {
        "micro": ["flat_64mi", "lora_500", "llama_1b"],
        "cycle": ["lora_500", "llama_1b"],
        "reduction": ["gpt2_small"],
        "variants": ["lora_500", "llama_1b"],
    },
}
KINDS = ("micro", "cycle", "linear", "reduction", "host", "variants")
# Seconds for each group of variants.
BUDGETS = dict(micro=8.0, cycle=60.0, linear=2.0, reduction=2.0, host=4.0, variants=2.0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(n=[8])
    parser.add_argument("--only", nargs="+", choices=KINDS)
    parser.add_argument("--shapes", nargs="+", choices=sorted(cases.SHAPES))
    parser.add_argument("--forms", choices=("eager", "compiled"), help="without or with compiling")
    parser.add_argument("--show", type=Path, help="measure nothing: print the rows of this file")
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> Iterator[tuple[str, int, partial[None]]]:
    """What the arguments ask for: the kind of each measurement, its N, and what makes it."""
    device = torch.device(args.device).type
    by_default = args.only is None and args.forms is None
    passes = [args.forms] if args.forms else ["eager"] if args.quick else ["eager", "compiled"]

    def wants(kind: str, otherwise: bool) -> bool:
        return kind in args.only if args.only else otherwise

    def shapes(kind: str) -> list[str]:
        return args.shapes or (["tiny"] if args.quick else SHAPES[device][kind])

    if wants("linear", by_default and device == "cuda"):
        grid = (["linear_tiny"], [64]) if args.quick else linear.GRID[device]
        for layer, tokens in itertools.product(*grid):
            yield "linear", max(args.n), partial(linear.linear, layer=layer, tokens=tokens)
    if wants("reduction", by_default):
        for shape in shapes("reduction"):
            yield "reduction", max(args.n), partial(reduction.reduction, shape=shape)
    if wants("host", by_default):
        names = args.shapes or (["tiny"] if args.quick else [n for n in host.HOST if n != "tiny"])
        for shape in names:
            yield "host", max(args.n), partial(host.host, shape=shape)
    if wants("variants", False):
        names = list(variants.CHOICES)[: 3 if args.quick else None]
        for shape in shapes("variants"):
            yield "variants", max(args.n), partial(variants.variants, shape=shape, names=names)
    for forms_of in passes:
        for shape in shapes("micro") if wants("micro", True) else ():
            # A single operation is the same for any N.
            yield "micro", max(args.n), partial(suites.micro, shape=shape, forms_of=forms_of)
        for shape, n in itertools.product(shapes("cycle"), args.n if wants("cycle", True) else ()):
            yield "cycle", n, partial(suites.cycle, shape=shape, forms_of=forms_of)


def measure_all(args: argparse.Namespace) -> Suite:
    """Run what the arguments ask for."""
    device = torch.device(args.device)
    if busy := machine.busy(device):
        print(busy)
    suite = Suite(
        device,
        Plan(backend=args.backend),
        rounds=args.rounds or (3 if args.quick else 20 if device.type == "cuda" else 9),
        budget_s=0.0,
        gate_shapes=cases.tiny() if args.quick else cases.odd(),
        name="-".join(filter(None, (*(args.only or ["all"]), args.forms, args.quick and "quick"))),
    )
    for kind, n, measure in work(args):
        print(f"{kind}, N={n}: {measure.keywords}", file=sys.stderr)
        suite.plan = replace(suite.plan, n=n)
        suite.budget_s = args.budget or BUDGETS[kind]
        measure(suite)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return suite


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a variant was refused."""
    args = parse(argv)
    if args.show:
        rows = json.loads(args.show.read_text("utf-8"))
        report(rows, targets="cuda" if rows[0]["driver"] else "cpu")
        return 0
    # Compile times are only honest with cold caches: Inductor's, and that of our own loops.
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        suite = measure_all(args)
    report(suite.rows, targets=None if args.quick else torch.device(args.device).type)
    return suite.close()


if __name__ == "__main__":
    sys.exit(main())
