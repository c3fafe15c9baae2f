"""A tiny LightningModule that writes down all that happens to it, and a Trainer to run it.

Imported only by tests that have made sure of Lightning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from fusedaccum import FusedAccumOptimizer
from tests.same_runs import whole

N = 4
Make = Callable[[Any], torch.optim.Optimizer]

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
MICRO_BATCHES = 18  # an epoch: with N = 4 four windows and half a window, so five updates


def loader(micro_batches: int = MICRO_BATCHES) -> DataLoader[Any]:
    """The first micro-batches of the epoch, two samples each, always in the same order."""
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(2 * MICRO_BATCHES, 7, generator=generator)
    ys = torch.randn(2 * MICRO_BATCHES, 3, generator=generator)
    samples = [*zip(xs, ys, strict=True)][: 2 * micro_batches]
    return DataLoader(samples, batch_size=2)  # type: ignore[arg-type]


class Resumable:
    """A loader that Lightning can save and put back in mid-epoch."""

    def __init__(self, batches: list[Any] | None = None) -> None:
        self.batches = batches or [*loader()]
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.next == len(self.batches):
            self.next = 0
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def wrapped(make: Make, **options: Any) -> Make:
    return lambda params: FusedAccumOptimizer(make(params), **options)


class Module(lightning.LightningModule):
    """Automatic optimization.

    Attributes:
        losses: of every micro-batch.
        rates: the learning rate of every update.
        norms: of `p.grad` before every update, clipped already if Lightning clips.
        first: the gradient of the first update.
    """

    def __init__(self, make: Make, form: str = "optimizer") -> None:
        super().__init__()
        self.make, self.form = make, form
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(7, 16), torch.nn.GELU(), torch.nn.Linear(16, 3)
        )
        torch.random.set_rng_state(state)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.first: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        out = self.net(x)
        loss = (out.to(torch.promote_types(out.dtype, torch.float32)) - y).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.grad_before_clipping = [p.grad.clone() for p in self.parameters()]
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        grads = [p.grad.detach().clone() for p in self.parameters()]
        self.first = self.first or grads
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.norms.append(float(whole(torch.nn.utils.get_total_norm(grads))))

    def configure_optimizers(self) -> Any:
        opt = self.make(self.parameters())
        if self.form == "optimizer":
            return opt
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda update: 0.95**update)
        if self.form == "two lists":
            return [opt], [{"scheduler": scheduler, "interval": "step"}]
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Module):
    """The loop that Lightning's documentation gives for accumulating by hand."""

    def __init__(self, make: Make) -> None:
        super().__init__(make, "scheduler dict")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch) / N)
        if (batch_idx + 1) % N == 0 or self.trainer.is_last_batch:
            opt.step()
            opt.zero_grad()
            self.lr_schedulers().step()
            self.rates.append(opt.param_groups[0]["lr"])


class Counted(Manual):
    """The wrapper counts to N; Lightning has nothing to know of the window."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch))
        opt.step()
        opt.zero_grad()
        is_over = opt.window_closed
        if self.trainer.is_last_batch:
            opt.flush()
            is_over |= opt.window_closed
        if is_over:
            self.lr_schedulers().step()
            self.rates.append(opt.param_groups[0]["lr"])


def trainer(**options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    # Without this, any run would leave a checkpoint in the working directory.
    quiet["enable_checkpointing"] = any(
        isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", [])
    )
    return lightning.Trainer(accelerator="cpu", **quiet, **options)  # type: ignore[arg-type]


def fit(
    module: Module,
    n: int = 1,
    *,
    updates: int = 50,
    micro_batches: int = MICRO_BATCHES,
    **options: Any,
) -> lightning.Trainer:
    """Train for so many updates, of `n` micro-batches each as Lightning counts them."""
    made = trainer(max_epochs=-1, max_steps=updates, accumulate_grad_batches=n, **options)
    made.fit(module, loader(micro_batches))
    return made


def curve_distance(a: Module, b: Module) -> float:
    """The largest difference of two loss curves."""
    return max(abs(p - q) for p, q in zip(a.losses, b.losses, strict=True))
