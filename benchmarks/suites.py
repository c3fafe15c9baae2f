"""What is measured: single operations (`micro`) and whole windows (`cycle`), as rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fusedaccum import functional
from fusedaccum.bench import gate
from fusedaccum.bench.forms import Form, Native, Plan, build
from fusedaccum.bench.race import Call, Ceiling, Race, Variant, copy, operations, windows
from fusedaccum.bench.shapes import Shapes
from fusedaccum.doctor import machine
from fusedaccum.doctor.checks import Wrong

from . import cases
from .forms import FORMS, RIVALS, held
from .measure import Rows

BF16, FP32 = torch.bfloat16, torch.float32
COPY = "copy"
CEILINGS: dict[str, Ceiling] = {
    COPY: copy,
    "copy_again": copy,
    "read_modify_write": lambda source, target: target.add_(1.0),
}

EAGER = ["native_fp32", "per_tensor_add", "foreach_add", "cast_add", "blocked_add"]
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
# Which forms are also replayed from a CUDA graph, for shapes where launches are what costs.
GRAPHED = {"lora_500": ["fused_backend", "per_tensor_add", "foreach_add"]}


class Suite(Rows):
    """Measures and keeps the rows.

    Args:
        device: where.
        plan: N, and the optimizer's numbers.
        rounds, budget_s: see `Race`.
        gate_shapes: what the correctness check runs on.
        name: of the file where the rows are saved, after each group.
    """

    def __init__(
        self,
        device: torch.device,
        plan: Plan,
        *,
        rounds: int,
        budget_s: float,
        gate_shapes: Shapes,
        name: str,
    ) -> None:
        super().__init__(device, name)
        self.plan = plan
        self.race = Race(device, CEILINGS, rounds, budget_s, self.refuse)
        self.gate_shapes = gate_shapes
        self._gates: dict[tuple[str, torch.dtype, Plan], gate.Gate] = {}

    def gate(self, name: str, dtype: torch.dtype, plan: Plan) -> gate.Gate | None:
        """The form's correctness check, once per run; None and a remark where it is refused."""
        key = (name, dtype, plan)
        if key not in self._gates and name not in {*self.refused, *self.skipped}:
            like = torch.empty(0, dtype=dtype, device=self.device)
            try:
                self._gates[key] = gate.gate(FORMS[name], plan, like, self.gate_shapes)
            except Exception as error:  # a baseline that cannot run here must not cost the others
                if name in RIVALS:  # what another package cannot do is no failure of this run
                    self.skipped[name] = f"{type(error).__name__}: {error}"
                else:
                    self.refuse(name, error)
        return self._gates.get(key)

    def build(self, names: Iterable[str], params: Sequence[Tensor], plan: Plan) -> dict[str, Form]:
        """The forms that passed and fit."""
        n_elements = sum(p.numel() for p in params)
        # Two for the ceilings, each 4 bytes per element, and a tenth for temporary tensors.
        room = 0.9 * machine.memory_bytes(self.device) - 8 * n_elements
        wanted: list[str] = []
        for name in names:
            if name == "blocked_add" and self.device.type != "cpu":
                continue
            if self.gate(name, params[0].dtype, plan) is None:
                continue
            has_masters = any(issubclass(FORMS[other], Native) for other in wanted)
            shares = issubclass(FORMS[name], Native) and has_masters
            need = 0 if shares else held(FORMS[name]) * n_elements
            if need > room:
                self.skipped[f"{name}, {n_elements:,} elements"] = (
                    f"needs {need / 2**30:.0f} GiB beside the others"
                )
                continue
            room -= need
            wanted.append(name)
        return dict(zip(wanted, build([FORMS[name] for name in wanted], params, plan), strict=True))

    def variants(self, forms: dict[str, Form], call: Callable[[Form], Call]) -> dict[str, Variant]:
        """A variant of each form; `call` gives the callable and the bytes per element."""
        return {
            name: Variant(*call(form), self.gate(name, form.params[0].dtype, form.plan), form)
            for name, form in forms.items()
        }

    def time(
        self,
        operation: str,
        shape: str,
        dtype: torch.dtype,
        variants: dict[str, Variant],
        *,
        n_elements: int | None = None,
        tokens: int | None = None,
    ) -> None:
        """Time variants in turns beside the ceilings, and keep their rows.

        Args:
            operation, shape, dtype, tokens: what the rows say.
            variants: by name.
            n_elements: of all tensors; None: of `cases.SHAPES[shape]`.
        """
        n_elements = n_elements or cases.count(cases.SHAPES[shape]())
        self.groups += 1
        for name, variant, columns in self.race.run(variants, n_elements):
            assert variant.moved is not None  # torch has a fused AdamW wherever this is run
            self.add(
                columns,
                operation=operation,
                variant=name,
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                n=self.plan.n,
                tokens=tokens,
                n_elements=n_elements,
                bytes=round(variant.moved * n_elements),
                precision=variant.form.precision if variant.form else None,
                gate_s=round(variant.gate.seconds, 2) if variant.gate else None,
            )
        self.save()


# --- operations ---


def micro(suite: Suite, shape: str, forms_of: str) -> None:
    """Accumulate first, later, and last with its norm; then the norm alone and the step."""
    plan, shapes = suite.plan, cases.SHAPES[shape]()
    params = cases.random(shapes, BF16, suite.device, seed=1)
    grads = cases.gradients(shape, BF16, suite.device)
    forms = suite.build(MICRO[forms_of], params, plan)

    first, later, last_with_norm, _ = operations(grads)
    suite.time("accumulate_first", shape, BF16, suite.variants(forms, first))
    variants = suite.variants(forms, later)
    if suite.device.type == "cuda":
        variants |= graphed(suite, variants, GRAPHED.get(shape, ()))
    suite.time("accumulate", shape, BF16, variants)
    suite.time("accumulate_last_norm", shape, BF16, suite.variants(forms, last_with_norm))
    del forms, variants
    gc.collect()
    if forms_of == "eager":
        norm(suite, shape)
        step(suite, shape, FP32, ["fused_backend", "native_fp32"])
        step(suite, shape, BF16, ["fused_backend", "native_fp32", "plain_bf16", *RIVALS])
    else:
        step(suite, shape, BF16, MICRO[forms_of])


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, to be replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def graphed(suite: Suite, variants: dict[str, Variant], names: Sequence[str]) -> dict[str, Variant]:
    """Some of these variants once more, replayed from a CUDA graph."""
    found = {}
    for name in names:
        if name in variants:
            try:
                run = captured(variants[name].run)
            except Exception as error:
                suite.refuse(f"{name}_graph", error)
            else:
                found[f"{name}_graph"] = replace(variants[name], run=run)
    return found


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
            variants[name] = Variant(call, 4, gate.Gate(error, 0.0))
    suite.time("norm", shape, FP32, variants)


def step(suite: Suite, shape: str, dtype: torch.dtype, names: Sequence[str]) -> None:
    """AdamW without clipping, on what one window accumulated."""
    params = cases.random(cases.SHAPES[shape](), dtype, suite.device, seed=1)
    grads = cases.gradients(shape, dtype, suite.device)
    forms = suite.build(names, params, suite.plan)
    for form in forms.values():
        form.add(grads, 0)

    suite.time("step", shape, dtype, suite.variants(forms, operations(grads)[-1]))


def cycle(suite: Suite, shape: str, forms_of: str) -> None:
    """A whole window: N accumulations, norm, clip, AdamW, and what zeroing it takes."""
    plan, shapes = suite.plan, cases.SHAPES[shape]()
    params = cases.random(shapes, BF16, suite.device, seed=1, std=0.02)
    grads = cases.gradients(shape, BF16, suite.device)
    divided = cases.gradients(shape, BF16, suite.device)
    for grad in divided:
        grad /= plan.n
    forms = suite.build(CYCLE[forms_of], params, plan)

    suite.time("window", shape, BF16, suite.variants(forms, windows(grads, divided)))
