"""What other processes have to do with one wrapper: who averages, who updates what, Join.

What needs torch.distributed is imported where there are several processes: not every build of torch
has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..backends.private import needed
from ..options import Options
from ..window.deal import Deal
from ..window.reducing import Parts, Reducing
from ..window.watch import Watch

if TYPE_CHECKING:
    from torch.distributed.algorithms.join import JoinHook


class Processes:
    """Those that one wrapper trains together with.

    Args:
        member: gives what `distributed.joining.Member` asks for, a weak reference.
        kind: of the wrapped optimizer.
        options: the settings.

    Attributes:
        options: those that hold now.
    """

    def __init__(self, member: Callable[[], Any], kind: type[Optimizer], options: Options) -> None:
        self._member, self._kind, self.options = member, kind, options
        self._membership: Any = None  # of process_group, in Join blocks

    def deal(self) -> Deal:
        """Which process updates which parameter."""
        group = self.options.process_group
        if not self.options.shard_states:
            return Deal()
        needed("distributed._broadcast_coalesced")  # of what gives others what one has updated
        return Deal(dist.get_rank(group), dist.get_world_size(group))

    def serve(self, parts: Parts, modules: Sequence[Module]) -> Reducing:
        """See `distributed.serving`."""
        from . import serving

        has_group = self.options.process_group is not None
        shares = self.options.shard_states
        request = serving.Request(self._settings, self._member, has_group, shares)
        return serving.serve(parts, modules, request)

    def average_in_group(self, engines: Watch) -> None:
        """Have gradients averaged in `process_group`, where one was given."""
        group = self.options.process_group
        if group is None:
            return
        from .joining import Membership
        from .reduction import Reduction

        if self._membership is None:
            self._membership = Membership(self._member, group)
        engines.reduction = Reduction(
            engines.parts,
            group,
            is_joint=self._membership.is_joint,
            notify=self._membership.notify,
            settings=self._settings,
        )

    def broadcast(self, params: Iterable[Tensor]) -> None:
        """Give all processes of `process_group` the parameters of its first one."""
        if self.options.process_group is not None:
            from . import reduction

            reduction.broadcast(params, self.options.process_group)

    def refuse_alone(self, reduction: Reducing) -> None:
        """Raise where each process would update a part of the parameters, but nothing averages.

        Raises:
            RuntimeError: naming what to do.
        """
        if self.options.shard_states and not reduction.shares:
            raise RuntimeError(
                "shard_states=True, but nothing averages gradients over processes, each of which "
                "updates a part of the parameters; nothing was updated. Wrap the model in "
                "DistributedDataParallel (DDP), or give process_group= to FusedAccumOptimizer"
            )

    def join(self, joinable: Any, options: dict[str, Any]) -> JoinHook:
        """See `FusedAccumOptimizer.join_hook`."""
        if self._membership is None:
            raise ValueError(
                "Join with a FusedAccumOptimizer in its list is for one that was given "
                "process_group=. With DistributedDataParallel leave it out: Join([ddp_model])"
            )
        return self._membership.hook(joinable, options)  # type: ignore[no-any-return]

    def _settings(self) -> dict[str, Any]:
        """Those that all processes must have in common, by name."""
        options = self.options
        names = (
            "gradient_accumulation_steps", "max_grad_norm", "master_weights", "skip_nonfinite",
            "stochastic_rounding", "seed", "fused_unscale", "shard_states",
        )  # fmt: skip
        of_scaler = options.grad_scaler is not None and options.grad_scaler.is_enabled()
        named = {"optimizer": self._kind.__name__, "grad_scaler (linked)": of_scaler}
        return named | {name: getattr(options, name) for name in names}
