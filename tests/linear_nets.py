"""A net of Linear layers, its accumulators in float64, and the products that were taken."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedaccum import FusedAccumOptimizer
from fusedaccum.window import products

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]
# The product of 30 rows in fp32, and the sum of 4 of them: gamma(40) is 2.4e-6 for what does not
# cancel, and errors of many elements do not all point one way.
RTOL = 1e-6
# A weight gradient that autograd rounds to bf16 is off by 1.7e-3 in L2.
ROUNDED = 5e-4


class Net(nn.Module):
    """Layers with and without a bias, one of them used twice, checkpointed or tied on demand."""

    def __init__(
        self, *, bias: bool = True, tied: bool = False, twice: bool = False, again: str = ""
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 16)
        self.up, self.down = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)
        self.mid, self.norm = nn.Linear(16, 16, bias=bias), nn.LayerNorm(16)
        self.head = nn.Linear(16, 13, bias=False)
        self.twice, self.again = twice, again
        if tied:
            self.head.weight = self.emb.weight

    def block(self, h: Tensor) -> Tensor:
        return h + self.down(F.relu(self.up(h)))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.emb(tokens)
        if self.again:
            h = checkpoint(self.block, h, use_reentrant=self.again == "reentrant")
        else:
            h = self.block(h)
        for _ in range(2 if self.twice else 1):
            h = self.mid(F.gelu(h))
        logits = self.head(self.norm(h)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def net(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options).to(dtype)


def tokens(i: int = 0, length: int = 5) -> Tensor:
    return torch.randint(0, 13, (3, length), generator=torch.Generator().manual_seed(i))


def wrap(model: nn.Module, n: int | None = 2, *, fuses: bool = True, **options: Any) -> Any:
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), n, **options)
    if fuses:
        assert opt.fuse_linear_wgrad(model, min_numel=0).skipped == {}
    return opt


class Exact:
    """Sums of scale dYᵀ X of the Linear modules of a model, by parameter, in float64."""

    def __init__(self, model: nn.Module) -> None:
        self.scale = 1.0
        self.sums: dict[Tensor, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._used)

    def _used(self, module: Any, args: tuple[Tensor], y: Tensor) -> None:
        if not y.requires_grad:
            return
        x = args[0].detach().to(y.dtype, copy=True).flatten(0, -2).double()

        def arrived(dy: Tensor) -> None:
            product = self.scale * dy.flatten(0, -2).double().t() @ x
            self.sums[module.weight] = self.sums.get(module.weight, 0) + product

        y.register_hook(arrived)

    def off(self) -> float:
        """The largest relative error of `p.grad`."""
        return max(float((p.grad - s).norm() / s.norm()) for p, s in self.sums.items())


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters that got a product, one after the other."""
    seen: list[Tensor] = []
    add = products.Products.add

    def logged(self: Any, slot: Any, a: Tensor, b: Tensor) -> None:
        seen.append(slot.param)
        add(self, slot, a, b)

    monkeypatch.setattr(products.Products, "add", logged)
    return seen


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)
