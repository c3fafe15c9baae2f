"""The callback for Lightning; imported by way of `callbacks`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ..update.record import Metric
from .face import SharingOptimizer
from .ours import PREFIX, check_prefix, find, metrics_of

ADVICE = "Return FusedAccumOptimizer(optimizer) from configure_optimizers()"


class LightningMetrics(Callback):
    """Logs `FusedAccumOptimizer.metrics()` with Lightning.

    After each training batch the values of the last update are in `trainer.callback_metrics`, and
    in `trainer.logged_metrics` and the loggers as often as `log_every_n_steps` says. They are
    handed over as 0-d tensors, so that nothing waits for the device before Lightning writes them.
    They are not averaged over processes, in which they are the same. Of several optimizers, each
    wrapped one has its index in the names: "fusedaccum/1/grad_norm".

    Args:
        prefix: what their names begin with.

    Raises:
        TypeError: for a prefix that is no str.
        ValueError: as training begins, if no optimizer is wrapped.

    Example:
        trainer = lightning.Trainer(callbacks=[LightningMetrics()], accumulate_grad_batches=4)
        trainer.fit(module, loader)
        trainer.callback_metrics["fusedaccum/grad_norm"]
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        self.prefix = check_prefix(prefix)
        self._found: dict[str, SharingOptimizer] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizers, or say that there are none."""
        self._found = find(trainer.optimizers, "Lightning", ADVICE)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the values of the last update."""
        metrics = metrics_of(self._found, self.prefix)
        values = {name: _floating(value) for name, value in metrics.items()}
        pl_module.log_dict(values, on_step=True, on_epoch=False)


def _floating(value: Metric) -> Tensor:
    """What Lightning takes without a copy to the device, which would wait, and without a warning
    that it is no floating point."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.float()
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")
