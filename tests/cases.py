"""Shapes, dtypes and builders that several tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedaccum.backends.compiled import loops
from fusedaccum.kernels.layout import CHUNK

GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 0, 1, around a block of the step and of the accumulation, and a prime beyond one chunk.
SIZES = [0, 1, 1023, 1024, 1025, 2047, 2048, 2049, 10_007]
assert SIZES[-1] > CHUNK


@dataclass(frozen=True)
class Case:
    """An optimizer with options, and the fused rule it must take."""

    rule: str
    kind: type[torch.optim.Optimizer]
    options: tuple[tuple[str, Any], ...] = ()

    def make(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return self.kind(params, **{"lr": 1e-2, **dict(self.options), **more})

    @property
    def id(self) -> str:
        options = "-".join(f"{name}" for name, _ in self.options)
        return f"{self.kind.__name__.lower()}-{options}" if options else self.kind.__name__.lower()


def _case(rule: str, kind: type[torch.optim.Optimizer], **options: Any) -> Case:
    return Case(rule, kind, tuple(options.items()))


CASES = [
    _case("adam", torch.optim.AdamW),
    _case("adam", torch.optim.AdamW, weight_decay=0.3, maximize=True),
    _case("adam", torch.optim.AdamW, betas=(0.5, 0.9), eps=1e-5),
    _case("adam_amsgrad", torch.optim.AdamW, amsgrad=True),
    _case("adam", torch.optim.Adam),
    _case("adam", torch.optim.Adam, weight_decay=0.1),
    _case("adam_amsgrad", torch.optim.Adam, amsgrad=True, maximize=True),
    _case("adam", torch.optim.Adam, weight_decay=0.1, decoupled_weight_decay=True),
    _case("nadam", torch.optim.NAdam),
    _case("nadam", torch.optim.NAdam, weight_decay=0.1, momentum_decay=0.02),
    _case("nadam", torch.optim.NAdam, weight_decay=0.1, decoupled_weight_decay=True),
    _case("radam", torch.optim.RAdam, weight_decay=0.1),
    _case("radam", torch.optim.RAdam, betas=(0.8, 0.9), decoupled_weight_decay=True),
    _case("adamax", torch.optim.Adamax, weight_decay=0.1),
    _case("adagrad", torch.optim.Adagrad, lr_decay=0.1, weight_decay=0.1),
    _case("adagrad", torch.optim.Adagrad, initial_accumulator_value=0.5, maximize=True),
    _case("rmsprop", torch.optim.RMSprop, weight_decay=0.1),
    _case("rmsprop_momentum", torch.optim.RMSprop, momentum=0.9, alpha=0.9),
    _case("rmsprop_centered", torch.optim.RMSprop, centered=True),
    _case("rmsprop_centered_momentum", torch.optim.RMSprop, centered=True, momentum=0.5),
    _case("adadelta", torch.optim.Adadelta, weight_decay=0.1),
    _case("asgd", torch.optim.ASGD, t0=3, lambd=0.1, weight_decay=0.1),
    _case("rprop", torch.optim.Rprop),
    _case("sgd", torch.optim.SGD),
    _case("sgd", torch.optim.SGD, weight_decay=0.1, maximize=True),
    _case("sgd_momentum", torch.optim.SGD, momentum=0.9),
    _case("sgd_momentum", torch.optim.SGD, momentum=0.9, dampening=0.3, weight_decay=0.01),
    _case("sgd_nesterov", torch.optim.SGD, momentum=0.9, nesterov=True, maximize=True),
]
try:
    import lion_pytorch
except ImportError:  # on a GPU machine that is taken as it is
    pass
else:
    CASES.append(_case("lion", lion_pytorch.Lion, weight_decay=0.1, betas=(0.8, 0.9)))


def case_id(value: object) -> str | None:
    """Ids that read aloud."""
    if isinstance(value, Case):
        return value.id
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return None


def tensor(
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    offset: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """`n` normal numbers; `offset` elements from the allocation's start, so unaligned if odd."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    memory = torch.empty(n + offset, dtype=dtype, device=device)
    values = memory[offset:]
    values.copy_(torch.randn(n, generator=generator))
    return values


class WithoutCompiler:
    """While active, the torch backend finds no C compiler and runs blocks of ATen operations."""

    def __init__(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("FUSEDACCUM_CC", "0")
        forget_compiled()


def forget_compiled() -> None:
    """Let the torch backend look for a compiler again."""
    loops.forget()


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Sequential:
    """A few layers of odd sizes, with biases and a norm."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 33),
        torch.nn.GELU(),
        torch.nn.LayerNorm(33),
        torch.nn.Linear(33, 129),
        torch.nn.GELU(),
        torch.nn.Linear(129, 5),
    ).to(dtype)
    torch.random.set_rng_state(generator_state)
    return model


class Gradients(torch.nn.Module):
    """Parameters whose gradients the test chooses: loss = sum(p * g)."""

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(torch.nn.Parameter(v.clone()) for v in values)

    def backward(self, grads: list[Tensor | None]) -> None:
        """A backward that gives each parameter exactly its gradient; None: it is not used."""
        pairs = [(p, g) for p, g in zip(self.params, grads, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([p.view_as(p) for p, _ in pairs], [g.to(p) for p, g in pairs])


def batches(n: int, dtype: torch.dtype = torch.float32, size: int = 4) -> list[Tensor]:
    """Inputs of `small_model`."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 7, generator=generator).to(dtype) for _ in range(n)]


def loss(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def assert_models_close(a: torch.nn.Module, b: torch.nn.Module, rtol: float = 1e-5) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7)
