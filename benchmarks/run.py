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
from pathlib import Path

import torch

from fusedaccum.bench.forms import Plan
from fusedaccum.doctor import output

from . import cases, linear, reduction, suites
from .measure import arguments, warn_if_busy
from .suites import Suite
from .tables import report

# What `--device` measures by default.
SHAPES = {
    "cpu": {"micro": ["flat_64mi"], "cycle": ["gpt2_small"], "reduction": ["lora_500"]},
    "cuda": {
        "micro": ["flat_64mi", "lora_500", "llama_1b"],
        "cycle": ["lora_500", "llama_1b"],
        "reduction": ["gpt2_small"],
    },
}
KINDS: dict[str, Callable[[Suite, str, str], None]] = {
    "micro": suites.micro,
    "cycle": suites.cycle,
}
# Seconds for each group of variants.
BUDGETS = {"micro": 8.0, "cycle": 60.0, "linear": 2.0}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(n=[8])
    parser.add_argument("--only", nargs="+", choices=("micro", "cycle", "linear", "reduction"))
    parser.add_argument("--shapes", nargs="+", choices=sorted(cases.SHAPES))
    parser.add_argument("--forms", choices=("eager", "compiled"), help="without or with compiling")
    parser.add_argument("--show", type=Path, help="measure nothing: print the rows of this file")
    return parser.parse_args(argv)


def measure_all(args: argparse.Namespace) -> Suite:
    """Run what the arguments ask for."""
    device = torch.device(args.device)
    warn_if_busy(device)
    only: list[str] = args.only or []
    kinds = [kind for kind in KINDS if kind in only or not only]
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
    suite = Suite(
        device,
        Plan(backend=args.backend),
        rounds=rounds,
        budget_s=0.0,
        gate_shapes=cases.tiny() if args.quick else cases.odd(),
        name="-".join(filter(None, (*(only or ["all"]), args.forms, args.quick and "quick"))),
    )
    by_default = not only and args.forms is None
    if "linear" in only or (by_default and device.type == "cuda"):
        layers = ["linear_tiny"] if args.quick else [n for n in linear.LAYERS if n != "linear_tiny"]
        suite.race.budget_s = args.budget or BUDGETS["linear"]
        for layer, tokens in itertools.product(layers, [64] if args.quick else linear.TOKENS):
            linear.linear(suite, layer, tokens)
    if "reduction" in only or by_default:
        suite.plan = replace(suite.plan, n=max(args.n))
        for shape, dtype in itertools.product(shapes("reduction"), (suites.BF16, suites.FP32)):
            reduction.reduction(suite, shape, dtype)
    with output.Progress(len(work), "measurement") as bar:
        for forms_of, shape, kind, n in work:
            bar.describe(f"{kind} {shape} {forms_of} N={n}")
            suite.plan = replace(suite.plan, n=n)
            suite.race.budget_s = args.budget or BUDGETS[kind]
            KINDS[kind](suite, shape, forms_of)
            bar.advance()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return suite


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a variant was refused."""
    args = parse(argv)
    if args.show:
        report(json.loads(args.show.read_text("utf-8")), targets=True)
        return 0
    # Compile times are only honest with cold caches: Inductor's, and that of our own loops.
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        suite = measure_all(args)
    report(suite.rows, targets=not args.quick)
    return suite.close()


if __name__ == "__main__":
    sys.exit(main())
