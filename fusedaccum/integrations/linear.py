"""Weight gradients of Linear layers straight from the GEMM: what an optimizer offers for it."""

from __future__ import annotations

from torch import nn

from ..window.linears import FusedLinears, Linears

# Below it the host's time for a layer is more than what its weight's memory traffic costs.
MIN_NUMEL = 1 << 22


class FusesLinear:
    """The methods; an optimizer has its layers as `_linears`."""

    _linears: Linears

    def fuse_linear_wgrad(self, model: nn.Module, min_numel: int = MIN_NUMEL) -> FusedLinears:
        """Let weight gradients of Linear layers go from the GEMM straight into the accumulator.

            acc += scale dYᵀ X          X [tokens, in], dY [tokens, out], acc [out, in] fp32

        A bf16 or fp16 weight gradient is then never written, read or rounded. It pays where
        micro-batches have few tokens (docs/linear.md says when), and needs a GPU whose torch adds
        such a product to float32 (bf16: sm_80 and later); fp32 weights need nothing.

        Results differ in the last bits from those without it, as the weight gradient is not rounded
        to the parameter's dtype in between. What else holds for the window holds: weights of
        micro-batches, clipping, skipped windows, checkpoints, DistributedDataParallel.

        A gradient takes its ordinary path, and comes out right, in a backward where the weight has
        a hook, in `autograd.grad`, with `create_graph`, and in functorch and forward-mode AD.
        `repr()` of the optimizer counts what it can of those. A compiled model has one graph with
        it, and its backward refuses a hook on the weight and `autograd.grad` of it.

        Args:
            model: its modules that are exactly `torch.nn.Linear` or transformers' `Conv1D` are
                changed: their class becomes a subclass of it. The state dict stays, and a copy or a
                pickle of the model is of the stock classes. A copy of the optimizer fuses nothing.
            min_numel: leave weights of fewer elements as they are: each use of a layer costs some
                20 microseconds of Python.

        Returns:
            `fused`, the names of the modules, and `skipped`, a dict of the other Linear modules
            with the reasons: frozen, a subclass, a replaced forward, a computed weight, a hook on
            it, a DTensor (FSDP2), another optimizer's, small, a linked GradScaler, or what the
            device lacks.

        Raises:
            TypeError, ValueError: for a model or a `min_numel` that is none. Nothing is changed.

        Example:
            >>> import torch
            >>> from fusedaccum import FusedAccumOptimizer
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
            >>> opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
            >>> report = opt.fuse_linear_wgrad(model, min_numel=1024)
            >>> report.fused, report.skipped
            (('0',), {'1': 'small: 64 elements, fewer than min_numel=1,024'})
        """
        return self._linears.fuse(model, min_numel)

    def unfuse_linear_wgrad(self) -> None:
        """Undo every `fuse_linear_wgrad`, at any time: modules are of their stock class again.

        The open window goes on. `detach()` does it too, and so does the end of the optimizer.
        """
        self._linears.unfuse()
