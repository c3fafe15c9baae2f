"""Parameters in shards: FSDP2 (`fully_shard`), tensor parallelism, and both together.

Gradients come averaged over the processes, and each process gets the shard that it holds of the
parameter. What is left to do together is small: the window's numbers, and the sum of squares.

FSDP2 reduces the gradients of some parameters at once, in float32 where it is told to, and adds
them to `p.grad` in the parameter's dtype. A hook after that reduction is where we take the
accumulator away and keep the float32 numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from ..backends.mirror import Mirror
from ..backends.private import current_task
from ..window.reducing import Alone, Parts
from ..window.slots import Slot
from ..window.weights import Window
from .agreement import Comparison, Settings, disagreement
from .fsdp2 import Listener, Reductions
from .reduction import correction_of, total_of

_KEPT_WHOLE = (
    "FSDP2 keeps the gradient of a micro-batch with a weight back, to add it up unweighted "
    "(set_requires_gradient_sync(False), or a framework's no_sync()). Nothing was updated. Reduce "
    "in every micro-batch, which FSDP2 does by itself, or give no weights"
)
_KEPT = (
    "FSDP2 keeps gradients back (set_requires_gradient_sync(False), set_requires_all_reduce(False),"
    " or a framework's no_sync()) at the end of the window. Nothing was updated. Let the last "
    "backward() of a window reduce them"
)
_REPLACED = (
    "set_all_reduce_hook() or set_custom_reduce_scatter() of FSDP2 was called after the "
    "FusedAccumOptimizer was made, which has such a hook itself and has missed gradients without "
    "it. Nothing was updated. From now on it calls yours; in the next run call them before the "
    "FusedAccumOptimizer is made"
)
_OUTSIDE = (
    "FSDP2 reduced gradients outside a backward() (set_manual_backward_finalization(True) and "
    "finalize_backward()), where they cannot be taken as they arrive. Nothing was updated. Leave "
    "manual finalization off: the wrapper accumulates over as many backward() calls as you like"
)
_NO_SCATTER = (
    "micro_batch(weight=...) with FSDP2 on a mesh that has one process in the dimension of its "
    "shards: what copies average cannot be weighed before. Nothing was updated. Use a mesh of one "
    "dimension, or DistributedDataParallel"
)


class Sharded(Alone):
    """Goes with one collector whose parameters are DTensors, all or some.

    Args:
        parts: of the collector.
        modules: of FSDP2, which reduce gradients of the parameters.
        settings: gives those that hold now, by name; all processes must have the same.
    """

    def __init__(self, parts: Parts, modules: Sequence[Module], settings: Settings) -> None:
        self._slots, self._window, self._scaling, self._trouble, device, self._arrive = parts
        self.is_average, self.comes_averaged = False, True
        self._settings: Settings | None = settings  # until they were compared
        self._groups = _groups_of(self._slots.values())
        self.world, rank = 1, 0  # among those that train together
        for group in self._groups:
            self.world *= group.size()
            rank = rank * group.size() + group.rank()
        self._comparison = Comparison(settings, self.world, rank)
        self._numbers = Mirror(device)
        self._sums: Tensor | None = None
        self._norm = ShardedSums(self._slots.values(), device)
        self._flats: dict[Slot, Tensor] = {}
        self._weighed: set[Slot] = set()
        self._stream: torch.Stream | None = None  # on which FSDP2 assigns gradients
        self._reductions = Reductions(modules, self._listener())
        self._end = weakref.finalize(self, self._reductions.stop)
        parts.window.is_shared = True

    def _listener(self) -> Listener:
        this = weakref.ref(self)

        def scale(params: Sequence[Tensor]) -> float | None:
            own = this()
            if own is None or not any(param in own._slots for param in params):
                return None
            return own._factor()

        def reduced(params: Sequence[Tensor], flat: Tensor, is_scaled: bool) -> None:
            if (own := this()) is not None:
                own._take([s for p in params if (s := own._slots.get(p))], flat, is_scaled)

        return Listener(scale, reduced)

    def is_instead_of(self, modules: Sequence[Module]) -> bool:
        return not any(isinstance(module, DistributedDataParallel) for module in modules)

    # --- in a backward ---

    def _factor(self) -> float:
        """The factor on the gradients that are about to be averaged over processes."""
        return self._window.scale() if self._window.weight is not None else 1.0

    def _take(self, slots: Sequence[Slot], flat: Tensor, is_scaled: bool) -> None:
        """FSDP2 has reduced the gradients of some of these, and assigns them now."""
        arrive = self._arrive()
        if arrive is None or not slots:
            return
        if current_task() == -1:
            self._fail(_OUTSIDE)
        arrive(slots)
        if flat.is_cuda:
            self._stream = torch.cuda.current_stream(flat.device)
        is_weighed = self._window.weight is not None
        if is_weighed and not is_scaled and any(_world(slot) > 1 for slot in slots):
            self.watch_hooks()
            if self._trouble.reason is None:
                self._fail(_NO_SCATTER)
        for slot in slots:
            if flat.dtype is torch.float32 and slot.dtype is not torch.float32:
                self._flats[slot] = flat
            if is_weighed and is_scaled:
                self._weighed.add(slot)

    def begin(self) -> None:
        self.is_average = False
        self._flats.clear()
        self._weighed.clear()

    def precise(self, slot: Slot, grad: Tensor) -> Tensor:
        flat = self._flats.pop(slot, None)
        if flat is None:
            return grad
        shown = slot.param.grad
        is_whole = grad.untyped_storage().nbytes() == flat.numel() * grad.element_size()
        if not is_whole or shown is None or shown._version != 0:
            return grad  # a hook of somebody has written or replaced it
        # FSDP2 has cut its rounded copy in the same way.
        return flat.as_strided(grad.shape, grad.stride(), grad.storage_offset())

    def weighed(
        self, fresh: Sequence[tuple[Slot, Tensor]], scale: float
    ) -> Iterable[tuple[Sequence[tuple[Slot, Tensor]], float]]:
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for _, grad in fresh:
                grad.record_stream(current)
        if not self._weighed:
            return [(fresh, scale)]
        before = [pair for pair in fresh if pair[0] in self._weighed]
        return [(before, 1.0), ([p for p in fresh if p[0] not in self._weighed], scale)]

    def added(self, slots: Iterable[Slot]) -> None:
        self.is_average = False

    # --- between backwards ---

    def changed(self) -> None:
        self.is_average = False

    def watch_hooks(self) -> None:
        if self._reductions.take_back():
            self._trouble.note(_REPLACED)

    def keeps_back(self) -> bool:
        return self._reductions.keeps

    def refuse_kept(self, is_over: bool) -> None:
        if self._window.weight is not None and self._reductions.keeps_whole:
            self._fail(_KEPT_WHOLE)
        if is_over and self.keeps_back():
            self._fail(_KEPT)

    def complete(self, closes: bool) -> None:
        self.refuse_kept(is_over=True)
        if self.is_average:
            return
        with self._trouble.unless_done("sharing a window's numbers with other processes"):
            if self._settings is not None:
                self._compare(self._settings)
            is_filled = any(slot.fill for slot in self._slots.values())
            total = self._window.total_so_far(closes)
            said = self._comparison.numbers(self._window, is_filled, is_behind=False)
            host = np.array([total, self._window.is_weighted, *said], dtype=np.float64)
            self._sums = self._numbers.set(host).clone()
            for group in self._groups:
                dist.all_reduce(self._sums, group=group)
            self.is_average = True
        if reason := self._comparison.disagreement(self._sums[2:]):
            self._fail(reason)

    def _compare(self, settings: Settings) -> None:
        for group in self._groups:
            if reason := disagreement(group, settings(), list(self._slots.values())):
                self._fail(reason)
        self._settings = None

    def _fail(self, reason: str) -> NoReturn:
        self._trouble.note(reason)
        raise RuntimeError(reason)

    def correction(self, window: Window) -> float | Tensor:
        if not self.is_average or self._sums is None:
            return window.correction()
        return correction_of(self._sums, self.world, window, self._comparison)

    def total(self, window: Window) -> float | Tensor:
        return total_of(self._sums if self.is_average else None, window)

    def whole(self, sums: Tensor) -> Tensor:
        return self._norm.whole(sums)

    def reset(self) -> None:
        self.is_average = False
        self._flats.clear()
        self._weighed.clear()
        self._reductions.drop()
        self._reductions.take_back()

    def detach(self) -> None:
        self._window.is_shared = False
        self._end()


class ShardedSums:
    """Sums of squares over processes, each element once: shards are summed, copies are not.

    Args:
        slots: of all parameters.
        device: where they are.
    """

    def __init__(self, slots: Iterable[Slot], device: torch.device) -> None:
        self._groups: dict[str, ProcessGroup] = {}
        kinds: dict[tuple[str, ...], int] = {}  # by the groups over which the elements are spread
        kind_of: list[int] = []
        for slot in slots:
            groups = slot.shard.groups if slot.shard is not None else []
            self._groups.update((group.group_name, group) for group in groups)
            key = tuple(group.group_name for group in groups)
            kind_of += [kinds.setdefault(key, len(kinds))] * slot.n_cells
        self._members = {
            name: [kind for key, kind in kinds.items() if name in key] for name in self._groups
        }
        self._n_kinds = len(kinds)
        self._kind_of = torch.tensor(kind_of, dtype=torch.int64, device=device)

    @torch.no_grad()
    def whole(self, sums: Tensor) -> Tensor:
        """Sums of the whole gradient, fp32: a number and the rest that its rounding has cut off.

        Args:
            sums: partial ones of what this process holds, fp32, by cell.
        """
        totals = torch.zeros(self._n_kinds, dtype=torch.float64, device=sums.device)
        totals.index_add_(0, self._kind_of, sums.double())
        for name, group in self._groups.items():
            spread = totals[self._members[name]]
            dist.all_reduce(spread, group=group)
            totals[self._members[name]] = spread
        total = totals.sum()
        rounded = total.float()
        rest = torch.where(rounded.isfinite(), total - rounded.double(), 0.0).float()
        return torch.stack([rounded, rest])


def serve(parts: Parts, modules: Sequence[Module], settings: Settings) -> Sharded:
    """Go with shards from now on.

    Raises:
        ValueError: for what cannot be served, naming it and the way round.
    """
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        raise ValueError(
            "DistributedDataParallel (DDP) wraps parameters of this optimizer, others of which are "
            "sharded (DTensors): give each kind an optimizer of its own, or let fully_shard with a "
            "mesh of two dimensions (HSDP) replicate shards"
        )
    for slot in parts.slots.values():
        mesh = slot.shard.mesh if slot.shard is not None else None
        if mesh is not None and slot.device.type != mesh.device_type:
            raise ValueError(
                f"shards on {slot.device} of a mesh on {mesh.device_type!r} (CPUOffloadPolicy) are "
                "not supported: their gradients arrive after the backward. Leave offload_policy out"
            )
    return Sharded(parts, modules, settings)


def _world(slot: Slot) -> int:
    return 1 if slot.shard is None else slot.shard.mesh.size()


def _groups_of(slots: Iterable[Slot]) -> list[ProcessGroup]:
    """Of the processes that train together: those of the largest mesh, a group for each of its
    dimensions, or all in one where these are all that there are."""
    meshes: Callable[[DeviceMesh], int] = DeviceMesh.size
    mesh = max((s.shard.mesh for s in slots if s.shard is not None), key=meshes)
    if mesh.size() == dist.get_world_size():
        return [dist.group.WORLD]  # type: ignore[list-item]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]
