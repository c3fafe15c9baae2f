"""What `fusedaccum bench` and the repository's benchmarks time, and how: forms in turns beside
copies of as many elements, which are the yardstick and the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..doctor.checks import Wrong
from . import gate, timing
from .forms import Form

# A call of a form, and the bytes per element that it must read and write; None where torch's step
# is many passes.
Call = tuple[Callable[[], object], int | None]
# Of two fp32 tensors, each of 4 bytes per element.
Ceiling = Callable[[Tensor, Tensor], object]


def copy(source: Tensor, target: Tensor) -> None:
    """The yardstick."""
    target.copy_(source)


@dataclass
class Variant:
    """One call to be timed.

    Attributes:
        run: the call.
        moved: bytes per element that it must read and write, where that is known.
        gate: what the correctness check found; None for a ceiling.
        form: whose call it is.
    """

    run: Callable[[], object]
    moved: float | None
    gate: gate.Gate | None = None
    form: Form | None = None


def operations(grads: Sequence[Tensor]) -> list[Callable[[Form], Call]]:
    """The first micro-batch, a later one, the last with its norm, and the step."""
    return [
        lambda form: (lambda: form.add(grads, 0), form.moved.first),
        lambda form: (lambda: form.add(grads, 1), form.moved.later),
        lambda form: (lambda: form.add_last(grads), form.moved.later + form.moved.norm),
        lambda form: (form.step, form.moved.step),
    ]


def windows(grads: Sequence[Tensor], divided: Sequence[Tensor]) -> Callable[[Form], Call]:
    """A whole window: N accumulations, norm, clip and step.

    Args:
        grads: of each micro-batch.
        divided: the same divided by N, for forms that want them so.
    """

    def window(form: Form) -> Call:
        arriving = divided if form.loss_is_divided else grads
        return lambda: form.window(arriving), form.moved.window(form.plan.n)

    return window


@dataclass
class Race:
    """How variants are timed.

    Args:
        device: where.
        ceilings: by name; the first is the yardstick.
        rounds, budget_s, refuse, tick: see `timing.interleave`; the budget is for each call of
            `run`.
    """

    device: torch.device
    ceilings: Mapping[str, Ceiling]
    rounds: int
    budget_s: float
    refuse: Callable[[str, Exception], object]
    tick: Callable[[int], object] = lambda n: None

    def __post_init__(self) -> None:
        self.clock = timing.clock(self.device)

    def run(
        self, variants: Mapping[str, Variant], n_elements: int
    ) -> Iterator[tuple[str, Variant, dict[str, Any]]]:
        """Time variants and ceilings in turns: the name of each, and what a row says of its time.

        `ratio` is the time in copies of as many elements, `copy_share` the share of a copy's rate.
        """
        source, target = (
            torch.ones(n_elements, dtype=torch.float32, device=self.device) for _ in range(2)
        )

        def ceiling(call: Ceiling) -> Variant:
            return Variant(lambda: call(source, target), 8)

        everything = {name: ceiling(call) for name, call in self.ceilings.items()} | dict(variants)
        samples = timing.interleave(
            {name: variant.run for name, variant in everything.items()},
            self.clock,
            rounds=self.rounds,
            budget_s=self.budget_s,
            tick=self.tick,
            refuse=self.refuse,
        )
        copy_ms = samples[next(iter(self.ceilings))].quantile(0.5)
        for name, timed in samples.items():
            variant, p50 = everything[name], timed.quantile(0.5)
            if variant.form is not None and not gate.is_finite(variant.form):
                # It may have skipped its steps, and been fast by that.
                self.refuse(name, Wrong("it holds NaN or Inf after it was timed"))
                continue
            moved, found = variant.moved, variant.gate
            yield (
                name,
                variant,
                timed.columns(5, on_gpu=self.device.type == "cuda")
                | {
                    "ratio": round(p50 / copy_ms, 4),
                    "copy_share": None if moved is None else round(moved / 8 * copy_ms / p50, 4),
                    "grad_error": found.grad_error if found else None,
                    "update_error": found.update_error if found else None,
                },
            )
