"""The command line: `python -m fusedaccum doctor` and `python -m fusedaccum bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__

DOCTOR = """\
What is installed, which backend a tensor takes on each device and why, and a check of every
operation against the reference in float64: accumulation, norm, every update rule with every way of
keeping the parameter, whole windows. A few seconds on a CPU (the first run compiles the C loops),
about a minute on a GPU, which compiles some 150 kernels the first time.

Exit status: 0 all is well, 1 a check failed, 2 wrong usage."""


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="fusedaccum",
        description="Fused fp32 gradient accumulation for PyTorch: checks and benchmarks of this "
        "machine.",
    )
    top.add_argument("--version", action="version", version=f"fusedaccum {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, what runs where, and does it compute what it should?",
        description=DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--device", help="cpu, cuda or cuda:1, say; default: CPU and all GPUs")
    doctor.add_argument(
        "--backend",
        choices=("triton", "torch"),
        help="default: the one that each device takes by itself",
    )
    doctor.add_argument(
        "--full",
        action="store_true",
        help="also fp16 parameters, and unaligned tensors with every rule and layout: twice the "
        "checks, and on a GPU twice the kernels to compile",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    top = parser()
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 0
    try:
        from .commands import doctor

        return doctor.doctor(args.device, args.backend, args.full, args.json)
    except ValueError as error:
        print(f"fusedaccum {args.command}: {error}", file=sys.stderr)
        return 2
