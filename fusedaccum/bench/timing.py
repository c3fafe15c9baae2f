"""Timing calls beside each other: what makes two numbers comparable.

Variants are timed in turns within one process, in a new order each round, so that a machine that
slows down slows all of them. `python -m fusedaccum bench` and the repository's benchmarks use it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch


@dataclass
class Samples:
    """Milliseconds of one variant.

    Attributes:
        first: the first call, compilation included.
        host: until the call returned (on a GPU; on a CPU it is the whole time).
        times: one per round.
    """

    first: float
    host: float
    times: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """Linear between the neighbouring samples."""
        return float(numpy.quantile(self.times, q))

    def columns(self, digits: int, *, on_gpu: bool) -> dict[str, Any]:
        """What a row says about these times."""
        return {
            "samples": len(self.times),
            **{f"p{p}_ms": round(self.quantile(p / 100), digits) for p in (20, 50, 80)},
            "host_ms": round(self.host, digits) if on_gpu else None,
            "first_ms": round(self.first, 2),
        }


class Clock:
    """Times one call on the CPU."""

    warm_calls = 0

    def time(self, run: Callable[[], object], lead: float) -> tuple[float, float]:
        """Milliseconds of the work, and until the call returned."""
        began = time.perf_counter()
        run()
        elapsed = 1e3 * (time.perf_counter() - began)
        return elapsed, elapsed


class CudaClock(Clock):
    """Times one call on the GPU by events; the device is never waited for between them.

    Before each call a buffer of four times the L2 cache is read, so that no variant finds its
    operands there (read, not written: dirty lines would be written back in somebody's time). Then
    the device sleeps for `lead` milliseconds, in which the host enqueues the call: what is timed is
    the device's work and not the gaps between launches. Those show in the host's own time.
    """

    warm_calls = 3

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.buffer = torch.ones(cache, dtype=torch.float32, device=device)  # 4 bytes each
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 4_000_000
        self.time(lambda: torch.cuda._sleep(cycles), 0.0)  # loads the kernel
        elapsed, _ = self.time(lambda: torch.cuda._sleep(cycles), 0.0)
        self.cycles_per_ms = cycles / elapsed

    def time(self, run: Callable[[], object], lead: float) -> tuple[float, float]:
        self.buffer.sum()
        if lead:
            torch.cuda._sleep(int(lead * self.cycles_per_ms))
        self.start.record()
        began = time.perf_counter()
        run()
        host = 1e3 * (time.perf_counter() - began)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end), host


def clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else Clock()


# A GPU's queue holds about a thousand launches; beyond that the host waits and a longer sleep does
# not help.
MAX_LEAD_MS = 20.0
MIN_ROUNDS = 3


class NoTime(Exception):
    """A variant was given up, so that the others get more rounds."""


def interleave(
    variants: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    rounds: int,
    budget_s: float,
    refuse: Callable[[str, Exception], object],
    spare: Sequence[str] = (),
) -> dict[str, Samples]:
    """Time variants in turns.

    Args:
        variants: name → call.
        clock: of their device.
        rounds: samples of each; fewer (at least three) once `budget_s` is spent.
        budget_s: seconds for the rounds.
        refuse: called with the name of a variant that raises at its first call, and the error; or
            that was given up.
        spare: those that are given up after the first round where the budget has no room for
            three, the most dispensable first.
    """
    samples = {}
    for name, run in variants.items():
        try:
            first, _ = clock.time(run, 0.0)
            warm = [clock.time(run, 0.0)[1] for _ in range(clock.warm_calls)]
        except Exception as error:
            refuse(name, error)
        else:
            samples[name] = Samples(first, statistics.median(warm or [first]))
    began = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - began > budget_s:
            break
        order = list(samples)
        random.Random(done).shuffle(order)
        for name in order:
            lead = min(1.5 * samples[name].host + 0.1, MAX_LEAD_MS)
            samples[name].times.append(clock.time(variants[name], lead)[0])
        for name in spare if done == 0 else ():
            needed_s = 1e-3 * MIN_ROUNDS * sum(timed.times[0] for timed in samples.values())
            if name in samples and needed_s > budget_s:
                del samples[name]
                refuse(name, NoTime(f"{MIN_ROUNDS} rounds of all take {needed_s:.3g} s"))
    return samples
