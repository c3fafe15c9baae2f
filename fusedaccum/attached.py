"""The parameters of one optimizer: their segments, and the hook on each.

The hook is on the AccumulateGrad node and not on the tensor: a tensor's hook also fires in
`autograd.grad`. Autograd holds that node weakly, so the segment holds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .buffers import Block
from .engines import refuse_exchange
from .segments import Segment, check_param, master_kind

# Whose live hooks are on a parameter: two owners would take each other's accumulators for
# gradients.
_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Attached:
    """Parameters with segments and hooks; a subclass takes what arrives.

    Args:
        master_weights: see `FusedAccumOptimizer`, or "stochastic".

    Attributes:
        segments: by parameter.
        groups: the optimizer's param groups, as they were last seen.
        n_cells: partial sums of squares of all of them.
    """

    def __init__(self, master_weights: str | None) -> None:
        self.segments: dict[Tensor, Segment] = {}
        self.groups: Sequence[dict[str, Any]] = ()
        self.n_cells = 0
        self._master_weights = master_weights

    def _arrive(self, segment: Segment) -> None:
        """A gradient of `segment` is about to be accumulated by autograd."""
        raise AssertionError("a subclass takes it")

    def attach(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        """Give each named parameter a segment and a hook. All of them, or none if one is wrong."""
        named = list(named_params)
        if not named:
            return
        device = next(iter(self.segments.values())).device if self.segments else named[0][1].device
        for name, param in named:
            check_param(name, param)
            master_kind(self._master_weights, param.dtype)
            owner = _owners.get(param, lambda: None)()
            if owner is not None and owner is not self:
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} already belongs to another "
                    "FusedAccumOptimizer; call its detach(), or delete it, first"
                )
            if param.device != device:
                raise ValueError(
                    f"{name} is on {param.device} but others are on {device}; one wrapper serves "
                    "one device: make an optimizer, and wrap it, for each device"
                )
        for dtype in dict.fromkeys(param.dtype for _, param in named):
            kind = master_kind(self._master_weights, dtype)
            params = [param for _, param in named if param.dtype is dtype]
            block = Block(params)
            for position, param in enumerate(params):
                segment = Segment(param, block, position, len(self.segments), self.n_cells, kind)
                self.n_cells += segment.n_cells
                self.segments[param] = segment
                self._hook(segment)

    def attach_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Attach parameters of param groups that need a gradient and have no segment yet."""
        refuse_exchange(self.segments, groups)
        self.groups = groups
        self.attach(
            (f"param_groups[{i}]['params'][{j}]", param)
            for i, group in enumerate(groups)
            for j, param in enumerate(group["params"])
            if param.requires_grad and param not in self.segments
        )

    def changed(self) -> Segment | None:
        """A parameter that is not what it was when it was attached, if there is one."""
        return next((s for s in self.segments.values() if s.difference()), None)

    def refuse_changed(self) -> None:
        """Raise if a parameter changed.

        Raises:
            RuntimeError: naming one, and the way out.
        """
        first = self.changed()
        if first is not None:
            n = sum(1 for s in self.segments.values() if s.difference())
            raise RuntimeError(
                f"{n} parameters changed after they were wrapped (one of shape "
                f"{tuple(first.shape)}: {first.difference()}) and lost their hooks; nothing was "
                "updated. Call zero_grad() after moving or converting the model, or wrap after it"
            )

    def _hook(self, segment: Segment) -> None:
        param = segment.param
        if segment.dtype != torch.float32:
            # Since torch 2.10 this lets `grad` have another dtype than the parameter.
            param.grad_dtype = None
        segment.node = torch.autograd.graph.get_gradient_edge(param).node
        # The node holds the hook and the segment the node: a strong reference back would be a
        # cycle that Python's collector cannot see.
        segment_ref, owner_ref = weakref.ref(segment), weakref.ref(self)

        def prehook(_: tuple[Tensor, ...]) -> None:
            arriving, owner = segment_ref(), owner_ref()
            if arriving is not None and owner is not None:
                owner._arrive(arriving)

        segment.hook = segment.node.register_prehook(prehook)
        _owners[param] = owner_ref

    def detach(self) -> None:
        """Remove every hook and give `grad` its usual dtype again."""
        for segment in self.segments.values():
            segment.hook.remove()
            segment.node = None
            _owners.pop(segment.param, None)
            segment.param.grad = None
            if segment.dtype != torch.float32:
                segment.param.grad_dtype = segment.dtype
        self.segments.clear()
