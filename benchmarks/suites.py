"""What is measured: single operations (`micro`) and whole windows (`cycle`), as rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fusedaccum import functional
from fusedaccum.bench.gate import Gate
from fusedaccum.bench.race import WINDOW, Race, Variant
from fusedaccum.bench.timing import Samples
from fusedaccum.doctor.checks import Wrong
from fusedaccum.doctor.plan import Plan

from . import cases
from .forms import FORMS, Rival
from .measure import environment, new_path, results_folder, save

BF16, FP32 = torch.bfloat16, torch.float32
EAGER = ["native_fp32", "per_tensor_add", "foreach_add", "cast_add", "blocked_add"]
RIVALS = [name for name, kind in FORMS.items() if issubclass(kind, Rival)]
# Of our norm as a pass of its own.
MAX_NORM_ERROR = 1e-6
# Forms that are measured in turns. What has to compile comes apart and last: where that fails or
# takes too long, the other rows are there already.
MICRO = {
    "eager": ["fused_backend", *EAGER, "plain_bf16", *RIVALS],
    "compiled": ["fused_backend", "compiled"],
}
CYCLE = {
    "eager": ["fused_backend", "fused_hooks", *EAGER, "plain_bf16", "fused_assigned", *RIVALS],
    "compiled": ["fused_backend", "fused_hooks", "compiled"],
}


class Suite(Race):
    """A race of all forms whose rows are kept in a file.

    Args:
        device, plan, options: see `Race`.
        name: of the file, which is written after each group.
    """

    def __init__(self, device: torch.device, plan: Plan, *, name: str, **options: Any) -> None:
        forms = dict(FORMS)
        if device.type != "cpu":
            del forms["blocked_add"]  # for the caches of CPUs
        super().__init__(device, plan, forms, **options)
        self.environment = environment(device)
        self.path = new_path(results_folder(device), f"{name}.json")

    def refuse(self, name: str, error: Exception) -> None:
        super().refuse(name, error)
        if name in RIVALS and name in self.refused:  # their failure is none of this run
            self.skipped[name] = self.refused.pop(name)

    def time(self, *args: Any, **kwargs: Any) -> dict[str, Samples]:
        samples = super().time(*args, **kwargs)
        self.save()
        return samples

    def save(self) -> None:
        """Write all rows that there are."""
        save([self.environment | row for row in self.rows], self.path)

    def close(self) -> int:
        """Say what was refused, skipped and kept; the exit status."""
        for name, why in self.refused.items():
            print(f"REFUSED {name}: {why}")
        for name, why in self.skipped.items():
            print(f"SKIPPED {name}: {why}")
        print(f"{len(self.rows)} rows: {self.path.name}")
        return 1 if self.refused else 0


# --- operations ---

Call = Callable[[Any], tuple[Callable[[], object], Any]]


def operations(grads: Sequence[Tensor]) -> dict[str, Call]:
    """Each single operation: of a form the call, and the bytes per element that it moves."""

    def moved(form: Any) -> Any:
        return form.bytes(form.plan, form.params[0])

    return {
        "accumulate_first": lambda form: (lambda: form.add(grads, 0), moved(form).first),
        "accumulate": lambda form: (lambda: form.add(grads, 1), moved(form).later),
        "accumulate_last_norm": lambda form: (
            lambda: form.add_last(grads),
            moved(form).later + moved(form).norm,
        ),
        "step": lambda form: (form.step, moved(form).step),
    }


def micro(suite: Suite, shape: str, forms_of: str) -> None:
    """Accumulate first, later, and last with its norm; then the norm alone and the step."""
    names = [name for name in MICRO[forms_of] if name in suite.forms]
    sizes, grads = cases.SHAPES[shape](), cases.gradients(shape, BF16, suite.device)
    forms = suite.build(names, sizes, BF16)
    calls = operations(grads)
    for operation in ("accumulate_first", "accumulate", "accumulate_last_norm"):
        variants = suite.variants(forms, calls[operation])
        suite.time(operation, shape, BF16, variants, n_elements=cases.count(sizes))
    del forms, variants
    gc.collect()
    if forms_of == "eager":
        norm(suite, shape)
        step(suite, shape, FP32, ["fused_backend", "native_fp32"])
        step(suite, shape, BF16, ["fused_backend", "native_fp32", "plain_bf16", *RIVALS])
    else:
        step(suite, shape, BF16, names)


def norm(suite: Suite, shape: str) -> None:
    """The global L2 norm of fp32 tensors, as a pass of its own."""
    tensors = cases.random(cases.SHAPES[shape](), FP32, suite.device, seed=3)
    calls: dict[str, Callable[[], Tensor]] = {
        "fused_functional": lambda: functional.global_norm(tensors, backend=suite.plan.backend),
        "get_total_norm": lambda: get_total_norm(tensors),
    }
    exact = float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
    variants = {}
    for name, call in calls.items():
        error = abs(float(call()) - exact) / exact
        # torch's own loses digits on a large tensor; that stands beside its time.
        if name.startswith("fused_") and not error <= MAX_NORM_ERROR:
            suite.refuse(name, Wrong(f"norm off by {error:.1e}"))
        else:
            variants[name] = Variant(call, 4, Gate(error, 0.0))
    n_elements = sum(t.numel() for t in tensors)
    suite.time("norm", shape, FP32, variants, n_elements=n_elements)


def step(suite: Suite, shape: str, dtype: torch.dtype, names: Sequence[str]) -> None:
    """AdamW without clipping, on what one micro-batch accumulated."""
    sizes, grads = cases.SHAPES[shape](), cases.gradients(shape, dtype, suite.device)
    forms: dict[str, Any] = suite.build(names, sizes, dtype)
    for form in forms.values():
        form.add(grads, 0)
    variants = suite.variants(forms, operations(grads)["step"])
    suite.time("step", shape, dtype, variants, n_elements=cases.count(sizes))


def cycle(suite: Suite, shape: str, forms_of: str) -> None:
    """A whole window: N accumulations, norm, clip, AdamW, and what zeroing it takes."""
    sizes, grads = cases.SHAPES[shape](), cases.gradients(shape, BF16, suite.device)
    names = [name for name in CYCLE[forms_of] if name in suite.forms]
    variants = suite.windows(suite.build(names, sizes, BF16), grads)
    suite.time(WINDOW, shape, BF16, variants, n_elements=cases.count(sizes))
