"""The command line: `python -m fusedaccum doctor` and `python -m fusedaccum bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .bench import run as bench
from .bench import shapes
from .doctor import run as doctor
from .doctor.plan import OPTIMIZERS, Plan

DOCTOR = """\
What is installed, which backend a tensor takes on each device and why, and a check of every
operation against the reference in float64: accumulation, norm, every update rule with every way of
keeping the parameter, whole windows. A few seconds on a CPU (the first run compiles the C loops),
about a minute on a GPU, which compiles some 150 kernels the first time.

Exit status: 0 all is well, 1 a check failed, 2 wrong usage."""

BENCH = """\
What a window of micro-batches costs here, with clipping and the step, by fusedaccum and by the
strongest forms of stock PyTorch, in turns. A form is timed only after it agreed with float64. The
yardstick is an fp32 copy of as many elements, timed twice: the difference is the noise. B/elem is
what a form must read and write per parameter; more than 100 % of the copy's rate can be on a CPU,
where a copy also reads what it is about to overwrite.

Exit status: 0 all is well, 1 a form was wrong or could not run, 2 wrong usage."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="fusedaccum",
        description="Fused fp32 gradient accumulation for PyTorch: checks and benchmarks of this "
        "machine.",
    )
    top.add_argument("--version", action="version", version=f"fusedaccum {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", help="cpu, cuda or cuda:1, say")
    common.add_argument(
        "--backend", choices=("triton", "torch"), help="default: the one that each device takes"
    )
    common.add_argument("--json", action="store_true", help="one JSON object on stdout")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )

    doctor = command(
        "doctor", "what is installed, what runs where, and does it compute what it should?", DOCTOR
    )
    doctor.add_argument(
        "--full",
        action="store_true",
        help="also fp16 parameters, and unaligned tensors with every rule and layout: twice the "
        "checks, and on a GPU twice the kernels to compile",
    )
    bench = command("bench", "what an update costs here, beside stock PyTorch", BENCH)
    which = bench.add_mutually_exclusive_group()
    which.add_argument("--shapes", help="of the parameters: 4096x4096,50257x768,768x3072*12")
    which.add_argument(
        "--model", metavar="PATH", help="a folder with a transformers config.json, or that file"
    )
    bench.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="torch.optim's, with its defaults, sgd with momentum 0.9 (default: adamw)",
    )
    bench.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the parameters (default: bf16)"
    )
    bench.add_argument(
        "--accumulation-steps",
        metavar="N",
        type=_positive_int,
        default=8,
        help="micro-batches per window (default: 8)",
    )
    bench.add_argument(
        "--seconds", type=float, default=20.0, help="about how long to measure (default: 20)"
    )
    return top


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; 1 or more")
    return value


def _doctor(args: argparse.Namespace) -> int:
    return doctor.doctor(args.device, args.backend, args.full, args.json)


def _bench(args: argparse.Namespace) -> int:
    name, sizes = "", None
    if args.shapes is not None:
        name, sizes = "given shapes", shapes.parse(args.shapes)
    elif args.model is not None:
        name, sizes = args.model, shapes.of_model(args.model)
    plan = Plan(args.optimizer, args.accumulation_steps, backend=args.backend)
    dtype = DTYPES[args.dtype]
    return bench.bench(args.device, dtype, plan, name, sizes, args.seconds, args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    top = parser()
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 0
    run = _bench if args.command == "bench" else _doctor
    try:
        return run(args)
    except ValueError as error:
        print(f"fusedaccum {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
