"""The callback for transformers' Trainer; imported by way of `callbacks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from .face import SharingOptimizer
from .ours import PREFIX, check_prefix, find, metrics_of

ADVICE = "Wrap before train(): trainer.optimizer = FusedAccumOptimizer(trainer.create_optimizer())"


class TrainerMetrics(TrainerCallback):  # type: ignore[misc]
    """Adds `FusedAccumOptimizer.metrics()` to what transformers' Trainer logs.

    Each log that has a training loss gets them, as Python numbers: in `trainer.state.log_history`,
    in `trainer_state.json`, in the console, and in what the Trainer reports to (wandb, TensorBoard
    and so on). They are read there and then, which waits for the device, as the Trainer does for
    the loss. Between logs nothing is read. TRL's trainers are the Trainer's.

    `add_to(trainer)` puts it before the callbacks that report, which have to come later to see the
    values. `Trainer(callbacks=[TrainerMetrics()])` puts it behind them: then the values are in
    `log_history` and in the console alone.

    Args:
        prefix: what their names begin with, so that they are not taken for the Trainer's own
            `grad_norm`.

    Raises:
        TypeError: for a prefix that is no str.
        ValueError: as training begins, if the Trainer's optimizer is not wrapped.

    Example:
        trainer = Trainer(model, args, train_dataset=data)
        trainer.optimizer = fusedaccum.FusedAccumOptimizer(trainer.create_optimizer())
        TrainerMetrics.add_to(trainer)
        trainer.train()
        trainer.state.log_history[0]["fusedaccum/grad_norm"]
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        self.prefix = check_prefix(prefix)
        self._found: dict[str, SharingOptimizer] = {}

    @classmethod
    def add_to(cls, trainer: Trainer, prefix: str = PREFIX) -> TrainerMetrics:
        """Make one, and put it before the other callbacks of a Trainer.

        Returns:
            It, for `trainer.remove_callback`.

        Raises:
            TypeError: for something else than a Trainer.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "add_to() takes a transformers.Trainer (or one of TRL's), got "
                f"{type(trainer).__name__}; in a loop of your own log opt.metrics()"
            )
        callback = cls(prefix)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Find the optimizer, or say that there is none."""
        given = [] if optimizer is None else [optimizer]
        self._found = find(given, "the Trainer", ADVICE)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the values to a log of training."""
        if not logs or "loss" not in logs:
            return  # an evaluation's, or the last one, of speed
        metrics = metrics_of(self._found, self.prefix)
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # a copy of `logs`
