"""The command line: `python -m fusedaccum doctor`, `bench` and `memory`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .bench import memory, shapes
from .bench import run as bench
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

MEMORY = """\
What a model takes to train: parameters, gradients, masters and optimizer states, by fusedaccum and
by stock PyTorch, in bytes per parameter and in GiB, and the most that fresh gradients take on top
of it. It is arithmetic, which the tests compare with bytes that were counted. Nothing is trained,
and no GPU is needed. Activations are not included.

  python -m fusedaccum memory --model llama-8b --processes 8 --engine fsdp2
  python -m fusedaccum memory --model path/to/config.json --optimizer lion
  python -m fusedaccum memory --params 1.1B --dtype fp32 --json

Exit status: 0 all is well, 2 wrong usage."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="fusedaccum",
        description="Fused fp32 gradient accumulation for PyTorch: checks and benchmarks of this "
        "machine, and what a model takes to train.",
    )
    top.add_argument("--version", action="version", version=f"fusedaccum {__version__}")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    common = argparse.ArgumentParser(add_help=False, parents=[output])
    common.add_argument("--device", help="cpu, cuda or cuda:1, say")
    common.add_argument(
        "--backend", choices=("triton", "torch"), help="default: the one that each device takes"
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str, summary: str, description: str, parent: argparse.ArgumentParser = common
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[parent],
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
        "--seconds",
        type=_positive_number,
        default=20.0,
        help="about how long to measure (default: 20)",
    )
    _memory_options(command("memory", "what a model takes to train, by arithmetic", MEMORY, output))
    return top


def _memory_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model",
        help=f"{', '.join(shapes.PRESETS)}, a folder with a transformers config.json, or that file",
    )
    which.add_argument("--params", help="how many parameters, all trained: 1.1B, 124M, 7e9")
    parser.add_argument(
        "--optimizer",
        choices=memory.CHOICES,
        default="adamw",
        help="with its defaults, sgd with momentum (default: adamw)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the parameters (default: bf16)"
    )
    parser.add_argument(
        "--master-weights",
        choices=("split", "fp32", "none"),
        help="of FusedAccumOptimizer (default: split for bf16, fp32 for fp16)",
    )
    parser.add_argument(
        "--device",
        choices=memory.BUCKET_MIB,
        default="cuda",
        help="where it is to train: a GPU lets 128 MiB of fresh gradients wait, a CPU 64",
    )
    parser.add_argument(
        "--processes", metavar="N", type=_positive_int, default=1, help="that train it together"
    )
    parser.add_argument(
        "--engine",
        choices=memory.ENGINES,
        default="ddp",
        help="by which they do; zero1 is DDP with shard_states=True (default: ddp)",
    )


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; an int from 1 on") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; 1 or more")
    return value


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; a number above 0") from None
    if not value > 0.0:  # nan is not
        raise argparse.ArgumentTypeError(f"got {text}; above 0")
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


def _memory(args: argparse.Namespace) -> int:
    if args.params is not None:
        name = "given parameters"
        sizes: shapes.Shapes = [(memory.parse_count(args.params),)]
    else:
        name, sizes = args.model, memory.sizes_of(args.model)
    request = memory.Request(
        sizes,
        has_shapes=args.params is None,
        optimizer=args.optimizer,
        dtype=DTYPES[args.dtype],
        device_type=args.device,
        processes=args.processes,
        engine=args.engine,
        master_weights=args.master_weights,
    )
    return memory.memory(request, name, args.json)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    top = parser()
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 0
    run = {"bench": _bench, "doctor": _doctor, "memory": _memory}[args.command]
    try:
        code = run(args)
        if sys.stdout is not None:  # `>&-` closed it
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        _discard_output()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _discard_output()  # else Python tries to write it once more, and ends with status 120
        print(f"fusedaccum {args.command}: cannot write: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"fusedaccum {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
