"""Single operations and windows under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For quick comparisons while a kernel is changed (`--benchmark-compare`, `-k "step and lora"`). The
forms are those of the rows; variants are timed one after the other, so take published numbers from
`python -m benchmarks.run`, which times them in turns. A form runs only if it passed the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedaccum.bench import gate
from fusedaccum.bench.race import WINDOW, Race
from fusedaccum.doctor.forms import Stepwise
from fusedaccum.doctor.plan import Plan

from . import cases
from .forms import FORMS
from .suites import RIVALS, operations

pytest.importorskip("pytest_benchmark")

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What a CPU works through in seconds; larger shapes are for GPUs.
SHAPES = [
    name
    for name, shapes in cases.SHAPES.items()
    if DEVICE.type == "cuda" or cases.count(shapes()) <= 130e6
]
RACE = Race(DEVICE, Plan(), FORMS, rounds=0, budget_s=0.0, gate_shapes=cases.tiny())


@pytest.mark.parametrize("name", [name for name in FORMS if name != "compiled"])
@pytest.mark.parametrize("operation", [*operations([]), WINDOW])
@pytest.mark.parametrize("shape", SHAPES)
def test_operation(benchmark: Any, shape: str, operation: str, name: str) -> None:
    """A step is AdamW without clipping, a window is clipped."""
    if operation != WINDOW and not issubclass(FORMS[name], Stepwise):
        pytest.skip("it has whole windows only")
    forms: dict[str, Any] = RACE.build([name], cases.SHAPES[shape](), BF16)
    if not forms:
        (pytest.skip if name in {*RIVALS, *RACE.skipped} else pytest.fail)(str(RACE.refused))
    grads = cases.gradients(shape, BF16, DEVICE)
    if operation == WINDOW:
        (variant,) = RACE.windows(forms, grads).values()
    else:
        forms[name].add(grads, 0)
        (variant,) = RACE.variants(forms, operations(grads)[operation]).values()
    benchmark(_waited(variant.run))
    assert gate.is_finite(forms[name])


def _waited(run: Callable[[], object]) -> Callable[[], object]:
    """A call, until the device has finished."""

    def waited() -> None:
        run()
        torch.cuda.synchronize()

    return waited if DEVICE.type == "cuda" else run
