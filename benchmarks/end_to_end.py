"""`python -m benchmarks.end_to_end`: what accumulating and updating cost a real training loop.

Each loop of `loops.py` trains the same Llama on the same micro-batches. The headline is the
*accumulation tax*: the time of a window above that of N forwards and backwards alone, in percent of
those. All loops run in turns in one process; a tax is of two times of the same round.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedaccum.bench import timing
from fusedaccum.bench.gate import Gate
from fusedaccum.bench.race import Variant
from fusedaccum.bench.timing import Samples
from fusedaccum.doctor import machine
from fusedaccum.doctor.checks import Wrong, host
from fusedaccum.doctor.forms import Form
from fusedaccum.doctor.judge import Judge, relative
from fusedaccum.doctor.plan import Plan

from . import decoder
from .loops import FLOOR, LOOPS, Loop
from .measure import arguments, numbers
from .memory import footprint
from .suites import Suite
from .tables import report

# Longest sequence; larger micro-batches hold several.
MAX_LENGTH = 2048
# Per device: the model, micro-batch sizes in tokens, N.
DEFAULTS: dict[str, tuple[str, list[int], list[int]]] = {
    "cpu": ("llama_11m", [512, 1024, 2048], [1, 4, 8]),
    "cuda": ("llama_1b", [512, 2048, 8192], [1, 4, 8, 16]),
}
AGAIN = f"{FLOOR}_again"  # the noise
# Two losses of the same weights and tokens.
MAX_LOSS_ERROR = 1e-5


class WaitingClock(timing.Clock):
    """Milliseconds of the wall, as a training run sees them: until the device has finished.

    The host's own time is part of it, unlike in the rows of single operations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm_calls = 1 if device.type == "cuda" else 0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object], lead: float) -> tuple[float, float]:
        self._wait()
        began = time.perf_counter()
        run()
        host = 1e3 * (time.perf_counter() - began)
        self._wait()
        return 1e3 * (time.perf_counter() - began), host


def batches(
    n: int, tokens: int, vocabulary: int, device: torch.device, *, seed: int = 0
) -> list[Tensor]:
    """N micro-batches of random tokens, as few sequences as `MAX_LENGTH` allows."""
    length = min(tokens, MAX_LENGTH)
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randint(vocabulary, (tokens // length, length), generator=generator, device=device)
        for _ in range(n)
    ]


# --- correctness ---


def gate(
    kind: type[Form] | None, model: nn.Module, vocabulary: int, plan: Plan
) -> dict[str, float]:
    """Run two windows beside AdamW in float64, whose gradients are of the loop's own weights.

    Returns:
        Errors, as columns of a row: of the mean gradient and of the updates, relative; of the
        losses; and `noise`, how far two backwards of the same micro-batch are apart.

    Raises:
        Wrong: if a form that claims to be exact is not, or a loss differs.
    """
    device = next(model.parameters()).device
    loop, twin = Loop(kind, model, plan), copy.deepcopy(model)
    params: list[Tensor] = list(twin.parameters())
    for param in params:
        # Some operations make fp32 gradients of bf16 weights (rms_norm on a CPU): unrounded, as
        # the exact loops see them.
        param.grad_dtype = None
    judge = Judge(loop.params, plan)
    noise = loss_error = 0.0

    def exact(ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss = decoder.loss(twin, ids)
        return loss.detach(), [host(g) for g in torch.autograd.grad(loss, params)]

    # Of the ways to compute attention, the one whose backward is the same in each run.
    with sdpa_kernel(SDPBackend.MATH):
        for window in range(2):
            with torch.no_grad():
                torch._foreach_copy_(params, loop.params)
            ids = batches(plan.n, 32, vocabulary, device, seed=window)
            (_, first), (_, second) = exact(ids[0]), exact(ids[0])
            noise = max(noise, relative(first, second, second))
            means = judge.zeros()
            for index, tokens in enumerate(ids):
                loss, found = exact(tokens)
                torch._foreach_add_(means, found, alpha=1 / plan.n)
                own_loss = loop.micro_batch(tokens, index)
                loss_error = max(loss_error, float((own_loss - loss).abs() / loss.abs()))
            judge.update(means, loop.grads() or None)
            loop.update()
    if not loss_error <= max(MAX_LOSS_ERROR, noise):
        raise Wrong(f"loss off by {loss_error:.1e}")
    errors = {"noise": noise, "loss_error": loss_error}
    if kind is not None:
        if kind.is_exact:
            judge.require_exact(loop, 4 * noise)
        errors |= {"grad_error": judge.grad_error, "update_error": judge.update_error(loop)}
    return errors


# --- time ---


def paired(times: Sequence[float], floor: Sequence[float]) -> Samples:
    """The tax of each round, in percent."""
    return Samples(0.0, 0.0, [100 * (t / f - 1) for t, f in zip(times, floor, strict=True)])


class Run(Suite):
    """Measures and keeps the rows. Arguments as of the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        name = "end-to-end-quick" if args.quick else "end-to-end"
        device, plan = torch.device(args.device), Plan(n=4, backend=args.backend)
        super().__init__(device, plan, name=name, rounds=args.rounds, budget_s=args.budget)
        self.clock = WaitingClock(device)
        self.size = args.size
        self.model = decoder.build(decoder.SIZES[args.size], device)
        # The loops that passed, with their errors. Of a small model: fp64 copies are large.
        sizes = decoder.SIZES["llama_tiny"]
        small = decoder.build(sizes, device)
        self.errors: dict[str, dict[str, float]] = {}
        for name, kind in LOOPS.items():
            try:
                self.errors[name] = gate(kind, small, sizes.vocabulary, plan)
            except Exception as error:  # one that cannot run here must not cost the others
                self.refuse(name, error)

    def measure(self, tokens: int, n: int) -> None:
        """All loops at one micro-batch size and one N."""
        self.plan = replace(self.plan, n=n)
        ids = batches(n, tokens, decoder.SIZES[self.size].vocabulary, self.device)
        variants: dict[str, Variant] = {}
        memory: dict[str, list[int]] = {}
        last: dict[str, Tensor] = {}

        def use(name: str, loop: Loop) -> None:
            last[name] = loop.window(ids)

        for name, errors in self.errors.items():
            try:
                make = partial(Loop, LOOPS[name], self.model, self.plan)
                loop, *memory[name] = footprint(self.device, make, partial(use, name))
            except Exception as error:
                self.refuse(f"{name}, {tokens} tokens", error)
                gc.collect()
            else:
                found = Gate(errors["grad_error"], errors["update_error"]) if loop.form else None
                variants[name] = Variant(partial(use, name, loop), None, found, loop)
        if FLOOR not in variants:
            return
        variants[AGAIN], memory[AGAIN] = variants[FLOOR], memory[FLOOR]
        last[AGAIN] = last[FLOOR]
        n_elements = sum(p.numel() for p in self.model.parameters())
        what = {"n_elements": n_elements, "tokens": tokens}
        samples = self.time("train_window", self.size, torch.bfloat16, variants, **what)
        for row in (row for row in self.rows if row["group"] == self.groups):
            name = row["variant"]
            tax, (rest, peak) = paired(samples[name].times, samples[FLOOR].times), memory[name]
            row |= {
                "model": "benchmarks.decoder.Decoder",
                "length": ids[0].shape[1],
                **{f"tax_p{p}": round(tax.quantile(p / 100), 2) for p in (20, 50, 80)},
                "tokens_per_s": round(1e3 * n * tokens / row["p50_ms"], 1),
                "rest_bytes": rest,
                "peak_bytes": peak,
                "rest_per_parameter": round(rest / n_elements, 2),
                "peak_per_parameter": round(peak / n_elements, 2),
                "loss": round(float(last[name]), 4),
                "noise": self.errors[FLOOR if name == AGAIN else name]["noise"],
            }
        self.save()

    def ceilings(self, n_elements: int) -> dict[str, Variant]:
        """None: the floor is the yardstick."""
        return {}


# --- command ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=sorted(decoder.SIZES), help="of the model")
    parser.add_argument("--tokens", type=numbers, help="per micro-batch, as 512,2048,8192")
    args = parser.parse_args(argv)
    size, tokens, counts = DEFAULTS[torch.device(args.device).type]
    args.size = args.size or ("llama_tiny" if args.quick else size)
    args.tokens = args.tokens or ([32] if args.quick else tokens)
    args.n = args.n or ([2] if args.quick else counts)
    args.rounds = args.rounds or (3 if args.quick else 9)
    args.budget = args.budget or (20.0 if torch.device(args.device).type == "cpu" else 8.0)
    return args


def grid(tokens: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Every micro-batch size with N = 8 (or the largest), and the smallest size with every N."""
    main = 8 if 8 in counts else max(counts)
    sizes = [(size, main) for size in tokens]
    return sizes + [(min(tokens), n) for n in counts if n != main]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a loop was refused."""
    args = parse(argv)
    run = Run(args)
    if busy := machine.busy(run.device):
        print(busy)
    for tokens, n in grid(args.tokens, args.n):
        run.measure(tokens, n)
        gc.collect()
    report(run.rows)
    return run.close()


if __name__ == "__main__":
    sys.exit(main())
