"""Forms, timed in turns beside copies of as many elements, which are the yardstick and the noise.

`fusedaccum bench` and the repository's benchmarks measure in this way and keep the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..doctor import machine
from ..doctor.checks import Wrong
from ..doctor.forms import Form
from ..doctor.judge import SHAPES, random
from ..doctor.plan import Plan
from . import gate, timing
from .forms import Native
from .shapes import Shapes, count

COPY, COPY_AGAIN = "copy", "copy_again"
WINDOW = "window"


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


# What is timed beside the forms, of two fp32 tensors: 8 bytes per element. The first is the
# yardstick.
CEILINGS: dict[str, Callable[[Tensor, Tensor], object]] = {
    COPY: _copy,
    COPY_AGAIN: _copy,
    "read_modify_write": lambda source, target: target.add_(1.0),
}


@dataclass
class Variant:
    """One call to be timed.

    Attributes:
        run: the call.
        moved: bytes per element that it must read and write; None where nobody counts them.
        gate: what the correctness check found; None for a ceiling.
        form: whose call it is: a form, or a training loop around one.
    """

    run: Callable[[], object]
    moved: float | None
    gate: gate.Gate | None = None
    form: Any = None


class Race:
    """Checks forms, builds and times those that are sound and fit, and keeps the rows.

    Args:
        device: where.
        plan: N, and the optimizer's numbers.
        forms: by the names of their rows.
        rounds, budget_s: see `timing.interleave`; the budget is for each call of `time`.
        gate_shapes: what the correctness check runs on.

    Attributes:
        rows: so far. `ratio` is a time in copies of as many elements, `copy_share` the share of a
            copy's rate.
        refused: variants that are wrong or raised, and why.
        skipped: what does not fit or is not here, and why.
    """

    def __init__(
        self,
        device: torch.device,
        plan: Plan,
        forms: Mapping[str, type[Form]],
        *,
        rounds: int,
        budget_s: float,
        gate_shapes: Sequence[Sequence[int]] = SHAPES,
    ) -> None:
        self.device, self.plan, self.forms = device, plan, forms
        self.rounds, self.budget_s, self.gate_shapes = rounds, budget_s, gate_shapes
        self.clock = timing.clock(device)
        self.rows: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.groups = 0
        self._gates: dict[tuple[str, torch.dtype, Plan], gate.Gate] = {}

    def refuse(self, name: str, error: Exception) -> None:
        """No number for this variant, and why; a lack of memory or time is no fault of its own."""
        is_innocent = isinstance(error, torch.OutOfMemoryError | timing.NoTime)
        kept = self.skipped if is_innocent else self.refused
        kept[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def gate(self, name: str, dtype: torch.dtype) -> gate.Gate | None:
        """The form's correctness check, once; None and a remark where it is refused."""
        key = (name, dtype, self.plan)
        if key not in self._gates and name not in {*self.refused, *self.skipped}:
            like = torch.empty(0, dtype=dtype, device=self.device)
            try:
                self._gates[key] = gate.gate(self.forms[name], self.plan, like, self.gate_shapes)
            except Exception as error:  # one that cannot run here must not cost the others
                self.refuse(name, error)
        return self._gates.get(key)

    def build(self, names: Iterable[str], sizes: Shapes, dtype: torch.dtype) -> dict[str, Form]:
        """The forms that passed and fit, all of the same parameters."""
        like = torch.empty(0, dtype=dtype, device=self.device)
        n_elements = count(sizes)
        # A tenth is for temporary tensors. The parameters and twice the gradients, and the two
        # tensors that are copied, are there beside the forms.
        free = machine.memory_bytes(self.device) or float("inf")
        room = 0.9 * free / n_elements - 3 * dtype.itemsize - 8
        built: dict[str, Any] = {}
        params: list[Tensor] = []
        for name in names:
            kind: Any = self.forms[name]
            if self.gate(name, dtype) is None:
                continue
            twins = [form for form in built.values() if isinstance(form, Native)]
            shared = twins[:1] if issubclass(kind, Native) else []
            need = 0 if shared else kind.bytes(self.plan, like).kept
            if need > room:
                self.skipped[f"{name}, {n_elements:,} elements"] = (
                    f"needs {need * n_elements / 2**30:.1f} GiB beside the others, of "
                    f"{free / 2**30:.1f} GiB free"
                )
                continue
            room -= need
            params = params or random(sizes, dtype, self.device, seed=1, std=0.02)
            built[name] = kind(params, self.plan, *shared)
        return built

    def variants(
        self, forms: Mapping[str, Form], call: Callable[[Any], tuple[Callable[[], object], Any]]
    ) -> dict[str, Variant]:
        """A call of each form; `call(form)` is the callable and the bytes per element."""
        return {
            name: Variant(*call(form), self.gate(name, form.params[0].dtype), form)
            for name, form in forms.items()
        }

    def windows(self, forms: Mapping[str, Form], grads: Sequence[Tensor]) -> dict[str, Variant]:
        """A whole window of each form, on these micro-gradients."""
        divided = [grad / self.plan.n for grad in grads]

        def call(form: Form) -> tuple[Callable[[], object], int | None]:
            arriving = divided if form.loss_is_divided else grads
            moved = form.bytes(self.plan, form.params[0]).window(self.plan.n)
            return lambda: form.window(arriving), moved

        return self.variants(forms, call)

    def time(
        self,
        operation: str,
        shape: str,
        dtype: torch.dtype,
        variants: dict[str, Variant],
        *,
        n_elements: int,
        tokens: int | None = None,
        spare: Sequence[str] = (),
    ) -> dict[str, timing.Samples]:
        """Time variants in turns beside the ceilings, and keep their rows.

        Args:
            operation, shape, dtype, tokens: what the rows say.
            variants: by name.
            n_elements: of all tensors.
            spare: see `timing.interleave`.

        Returns:
            What was measured of each.
        """
        everything = self.ceilings(n_elements) | variants
        samples = timing.interleave(
            {name: variant.run for name, variant in everything.items()},
            self.clock,
            rounds=self.rounds,
            budget_s=self.budget_s,
            refuse=self.refuse,
            spare=spare,
        )
        yardstick_ms = next(iter(samples.values())).quantile(0.5)
        self.groups += 1
        for name, timed in samples.items():
            variant, p50 = everything[name], timed.quantile(0.5)
            moved, found, form = variant.moved, variant.gate, variant.form
            if form is not None and not gate.is_finite(form):
                # It may have skipped its steps, and been fast by that.
                self.refuse(name, Wrong("it holds NaN or Inf after it was timed"))
                continue
            columns: dict[str, Any] = dict(
                operation=operation,
                variant=name,
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                n=self.plan.n,
                tokens=tokens,
                n_elements=n_elements,
                bytes=None if moved is None else round(moved * n_elements),
                precision=form.precision if form else None,
                gate_s=round(found.seconds, 2) if found else None,
                **timed.columns(5, on_gpu=self.device.type == "cuda"),
                ratio=round(p50 / yardstick_ms, 4),
                copy_share=None if moved is None else round(moved / 8 * yardstick_ms / p50, 4),
                grad_error=found.grad_error if found else None,
                update_error=found.update_error if found else None,
                load=round(os.getloadavg()[0], 2),
            )
            self.rows.append({"group": self.groups} | columns)

        return samples

    def ceilings(self, n_elements: int) -> dict[str, Variant]:
        """What is timed beside variants of so many elements; the first is the yardstick."""
        source, target = (
            torch.ones(n_elements, dtype=torch.float32, device=self.device) for _ in range(2)
        )
        return {name: Variant(partial(call, source, target), 8) for name, call in CEILINGS.items()}
