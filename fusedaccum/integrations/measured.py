"""What an optimizer offers to those who log its updates."""

from __future__ import annotations

from ..update.record import Metric
from ..update.updater import Updater


class Measured:
    """The method; an optimizer has its updater as `_updates`."""

    _updates: Updater

    def metrics(self) -> dict[str, Metric]:
        """What people log of the last update, without waiting for the device.

        Each value is a Python number that the host knows, or a 0-d tensor on the parameters'
        device. A tensor is a copy, which later updates do not overwrite, so you can keep a list of
        them and read all at once. `float(value)` reads a tensor, and that waits. Nothing is
        changed, and no other process takes part. Call it between `step()` and the next `step()`.

        Returns:
            A new dict with the keys that mean something here:

            updates (int): updates so far, with those that were skipped on the device. An update
                that a GradScaler of the loop left out is none. `state_dict()` has it, but
                torch.distributed.checkpoint does not take it from there. The host counts, so a
                replayed CUDA graph does not.
            skipped_steps (int64 tensor): those of them that were skipped because of NaN or Inf.
            grad_norm (float32 tensor): L2 norm of the mean gradient before `max_grad_norm` clips
                it. NaN or Inf where the window was not finite, and NaN where a GradScaler found an
                overflow. Absent before the first update, and where nobody needs the norm (no
                clipping, `skip_nonfinite=False`, no GradScaler). A clip of somebody else
                (`torch.nn.utils.clip_grad_norm_`) comes before it.
            clip_coefficient (float32 tensor): what the gradient was multiplied with to clip it,
                min(1, max_norm / (grad_norm + 1e-6)): 1 where nothing was clipped, NaN where the
                norm is NaN, 0 where it is Inf. Absent where the last update had no `max_norm`.
            micro_batches (int): closed micro-batches of the last window, in this process. Absent
                before the first update, and where the loop owns the window and gives no weights.
            weight_sum (float, or a float64 tensor): the sum of the last window's weights over all
                processes, where a micro-batch without a weight has 1. It is a tensor where
                processes average, and processes that share a micro-batch (tensor parallelism) each
                count it. Absent where `micro_batches` is.
            loss_scale (float32 tensor): what the linked GradScaler multiplies the next loss with.
                Absent without `grad_scaler=`.

            All but `micro_batches` are the same in every process.

        Example:
            >>> import torch
            >>> from fusedaccum import FusedAccumOptimizer
            >>> model = torch.nn.Linear(4, 1)
            >>> opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
            >>> for n_tokens in (3, 5):
            ...     with opt.micro_batch(weight=n_tokens):
            ...         model(torch.ones(n_tokens, 4)).mean().backward()
            ...     opt.step()
            >>> metrics = opt.metrics()
            >>> sorted(metrics)
            ['grad_norm', 'micro_batches', 'skipped_steps', 'updates', 'weight_sum']
            >>> f"{float(metrics['grad_norm']):.4f}"  # this waits
            '2.2361'
        """
        updater = self._updates
        scale = updater.collector.scaling.scale
        return updater.record.metrics(updater.grad_norm, updater.states.scalars.skipped, scale)
