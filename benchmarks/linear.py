"""The gradient of a Linear weight, computed and accumulated: in one GEMM, or in two passes.

    acc += dYᵀ X / N        dY [tokens, out] and X [tokens, in] bf16, acc [out, in] fp32

`addmm_out_dtype` lets cuBLAS add in its epilogue, so that the gradient is never written: the
strongest baseline where tokens are few. `mm` alone, which leaves a bf16 gradient, is the floor.

Then the forward and backward of the whole layer, in bf16 on a GPU and in fp32 on a CPU: as torch
has it (`layer_plain`, which adds to `.grad` in the layer's dtype), through hooks (`layer_hook`),
and after `fuse_linear_wgrad` (`layer_fused`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedaccum import FusedAccumOptimizer, functional
from fusedaccum.bench.gate import Gate
from fusedaccum.bench.race import Variant
from fusedaccum.doctor.checks import Wrong

from . import cases
from .forms import Missing
from .suites import Suite

BF16 = torch.bfloat16
# in × out features: of GPT-2's feed-forward, of TinyLlama's square projection and feed-forward, and
# of the feed-forward of an 8 B Llama.
LAYERS: dict[str, tuple[int, int]] = {
    "linear_768x3072": (768, 3072),
    "linear_2048x2048": (2048, 2048),
    "linear_2048x5632": (2048, 5632),
    "linear_4096x14336": (4096, 14336),
    "linear_tiny": (48, 80),
}
# What `--device` measures: layers, and tokens in a micro-batch.
GRID: dict[str, tuple[list[str], list[int]]] = {
    "cpu": (["linear_768x3072", "linear_2048x2048", "linear_2048x5632"], [64, 512, 2048]),
    "cuda": (
        ["linear_2048x2048", "linear_2048x5632", "linear_4096x14336"],
        [512, 2048, 8192],
    ),
}
# A gradient rounded to bf16's 8 bits is off by 1.7e-3 in L2. The fp32 epilogue does not round it,
# but tensor cores truncate their partial sums, up to 2^-23 for each of 512 steps of 16 tokens.
ROUNDED = 4e-3
MAX_ERROR = {"addmm_out_dtype": 4e-4, "addmm_out_dtype_first": 4e-4, "layer_fused": 4e-4}

Call = Callable[[], object]


def _calls(suite: Suite, acc: Tensor, x: Tensor, dy: Tensor) -> dict[str, Call]:
    """Ways to add one micro-batch's gradient, by name. dY arrives undivided."""
    scale = 1 / suite.plan.n
    grad = torch.empty(acc.shape, dtype=BF16, device=acc.device)

    def gemm() -> Tensor:
        return torch.mm(dy.t(), x, out=grad)

    def addmm(beta: int) -> Call:
        return lambda: torch.addmm(
            acc, dy.t(), x, out_dtype=torch.float32, beta=beta, alpha=scale, out=acc
        )

    def fused() -> None:
        functional.accumulate_([acc], [gemm()], scale, backend=suite.plan.backend)

    calls: dict[str, Call] = {
        "mm": gemm,
        "fused_functional": fused,
        "per_tensor_add": lambda: acc.add_(gemm(), alpha=scale),
    }
    if acc.is_cuda:
        calls |= {"addmm_out_dtype": addmm(1), "addmm_out_dtype_first": addmm(0)}
    else:
        suite.skipped["addmm_out_dtype"] = str(Missing("torch has it on CUDA only"))
    return calls


@torch.no_grad()
def _error(call: Call, acc: Tensor, exact: Tensor, *, replaces: bool) -> float:
    """Relative error of what `call` adds to, or with `replaces` stores in, an acc of ones."""
    acc.fill_(1.0)
    call()
    added = acc.double() - (0.0 if replaces else 1.0)
    return float((added - exact).norm() / exact.norm())


@torch.no_grad()
def linear(suite: Suite, layer: str, tokens: int) -> None:
    """Time one layer at one micro-batch size."""
    n_in, n_out = LAYERS[layer]
    (x,) = cases.random([(tokens, n_in)], BF16, suite.device, seed=4)
    (dy,) = cases.random([(tokens, n_out)], BF16, suite.device, seed=5)
    acc = torch.zeros(n_out, n_in, device=suite.device)
    exact = dy.double().t() @ x.double() / suite.plan.n
    variants = {}
    for name, call in _calls(suite, acc, x, dy).items():
        if name == "mm":
            variants[name] = Variant(call, 2)
            continue
        error = _error(call, acc, exact, replaces=name.endswith("_first"))
        if not error <= MAX_ERROR.get(name, ROUNDED):
            suite.refuse(name, Wrong(f"weight gradient off by {error:.1e}"))
            continue
        # The gradient written and read, the accumulator read and written; with a GEMM's epilogue
        # the accumulator alone.
        moved = {"addmm_out_dtype": 8, "addmm_out_dtype_first": 4}.get(name, 12)
        variants[name] = Variant(call, moved, Gate(error, 0.0))
    del exact
    gc.collect()
    suite.time("linear_wgrad", layer, BF16, variants, n_elements=acc.numel(), tokens=tokens)
    del acc, variants
    dtype = torch.float32 if suite.device.type == "cpu" else BF16
    _layer(suite, layer, x.to(dtype), dy.to(dtype))


@torch.enable_grad()
def _layer(suite: Suite, layer: str, x: Tensor, dy: Tensor) -> None:
    """Time a layer's forward and backward, with a gradient of its input."""
    exact = dy.double().t() @ x.double()
    x.requires_grad_()
    variants = {}
    kept = []  # an optimizer that is gone accumulates nothing
    for name in ("layer_plain", "layer_hook", "layer_fused"):
        module = nn.Linear(x.shape[1], dy.shape[1], bias=False, device=x.device, dtype=x.dtype)
        if name != "layer_plain":
            opt = FusedAccumOptimizer(
                torch.optim.SGD(module.parameters()), backend=suite.plan.backend
            )
            kept.append(opt)
        if name == "layer_fused" and (skipped := opt.fuse_linear_wgrad(module, 0).skipped):
            suite.skipped[name] = skipped[""]
            continue

        def run(module: nn.Linear = module) -> None:
            x.grad = None
            module(x).backward(dy)

        run()
        assert module.weight.grad is not None
        error = float((module.weight.grad.double() - exact).norm() / exact.norm())
        if not error <= MAX_ERROR.get(name, ROUNDED):
            suite.refuse(name, Wrong(f"weight gradient off by {error:.1e}"))
            continue
        size, held = x.element_size(), 4 if kept else x.element_size()
        # Beside what all of them move: the gradient written and read, what it is added to likewise.
        moved = 8 if name == "layer_fused" else 2 * size + 2 * held
        variants[name] = Variant(run, moved, Gate(error, 0.0))
    n_elements = exact.numel()
    suite.time("linear_layer", layer, x.dtype, variants, n_elements=n_elements, tokens=len(x))
