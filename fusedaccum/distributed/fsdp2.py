"""Hooks in FSDP2's reductions: before one, to weigh what is reduced; after it, to see the result.

FSDP2 has a place for each (`FSDPModule.set_custom_reduce_scatter`, `set_all_reduce_hook`). Several
optimizers may have parameters of one group, so one pair of hooks serves all of them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..backends.private import current_task
from ..window.fsdp2 import forget_broken, fsdp2_groups, fsdp2_params
from ..window.hooks import is_owned

_KEPT = "unsharded_accumulated_grad"  # of FSDP2's parameters, before torch 2.15
_CAPTURE = "_capture_grad_dtype_policy"  # of FSDP2's parameters, since torch 2.15


class Listener(NamedTuple):
    """Who wants to know of reductions.

    Attributes:
        scale: called before one, with the parameters of the group; the factor on this process's
            gradients, or None where none of the parameters is its own.
        reduced: called after it with the parameters, the flat gradient, which FSDP2 will round and
            assign to `p.grad` in parts, and whether it is of gradients with that factor.
    """

    scale: Callable[[Sequence[Tensor]], float | None]
    reduced: Callable[[Sequence[Tensor], Tensor, bool], None]


class _Hooks:
    """Of one group of parameters that FSDP2 reduces at once.

    Attributes:
        n_replaced: how often somebody has set others in their place.
    """

    def __init__(self, group: Any) -> None:
        self._group = weakref.ref(group)
        self._listeners: list[Listener] = []
        self._is_scaled = False
        self._hook, self._scatter = group._all_reduce_hook, group._reduce_scatter_comm
        group._all_reduce_hook, group._reduce_scatter_comm = self._reduced, self
        self.n_replaced = 0
        for param in group.fsdp_params:
            _hide_grad_dtype(param)

    def take_back(self) -> None:
        """Where somebody has set others since, in the place of ours: have ours call those."""
        group = self._group()
        if group is None:
            return
        if group._all_reduce_hook != self._reduced:
            self._hook, group._all_reduce_hook = group._all_reduce_hook, self._reduced
            self.n_replaced += 1
        if group._reduce_scatter_comm is not self:
            self._scatter, group._reduce_scatter_comm = group._reduce_scatter_comm, self
            self.n_replaced += 1

    def add(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        self.take_back()
        self._listeners.remove(listener)
        group = self._group()
        if not self._listeners and group is not None:
            group._all_reduce_hook, group._reduce_scatter_comm = self._hook, self._scatter
            for param in group.fsdp_params:
                vars(param).pop(_CAPTURE, None)
                _let_round(param, rounds=True)
            del _hooks[group]

    def _params(self) -> list[Tensor]:
        group = self._group()
        return [] if group is None else fsdp2_params(group)

    def _fsdp_params(self) -> Sequence[Any]:
        group = self._group()
        return [] if group is None else group.fsdp_params

    def _reduced(self, flat: Tensor) -> None:
        if self._hook is not None:
            self._hook(flat)
        is_scaled, self._is_scaled = self._is_scaled, False
        for listener in list(self._listeners):
            listener.reduced(self._params(), flat, is_scaled)
        for param in self._fsdp_params():
            is_exact = flat.dtype is torch.float32 and is_owned(param.sharded_param)
            _let_round(param, rounds=not is_exact)

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        """See torch.distributed's ReduceScatter, also for `__call__`."""
        return self._scatter.allocate(*args, **kwargs)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **more: Any) -> Any:
        scales = {listener.scale(self._params()) for listener in self._listeners} - {None}
        if len(scales) > 1:
            raise RuntimeError(
                f"several optimizers have parameters that FSDP2 reduces together, and give this "
                f"micro-batch different factors ({sorted(map(float, scales))}). Enter "  # type: ignore[arg-type]
                "micro_batch(weight=...) with the same weight on each of them"
            )
        scale = scales.pop() if scales else None
        if scale not in (None, 1.0):
            input_tensor.mul_(scale)
        self._is_scaled = scale is not None
        return self._scatter(output_tensor, input_tensor, *args, **more)


_hooks: weakref.WeakKeyDictionary[Any, _Hooks] = weakref.WeakKeyDictionary()


class Reductions:
    """Those of some modules, of which `listener` is told.

    Args:
        modules: of FSDP2.
        listener: is told until `stop`.
    """

    def __init__(self, modules: Iterable[Module], listener: Listener) -> None:
        self._listener = listener
        modules = list(modules)
        self._modules: list[weakref.ref[Any]] = list(map(weakref.ref, modules))
        self._groups: list[weakref.ref[Any]] = []
        for group in itertools.chain.from_iterable(map(fsdp2_groups, modules)):
            if group not in _hooks:
                _hooks[group] = _Hooks(group)
            _hooks[group].add(listener)
            self._groups.append(weakref.ref(group))
        self._n_replaced = 0
        self.take_back()

    def _alive(self) -> Iterator[Any]:
        return (group for ref in self._groups if (group := ref()) is not None)

    def take_back(self) -> bool:
        """Have the hooks of all in their place again.

        Returns:
            Whether somebody had set others since this was last asked.
        """
        before, self._n_replaced = self._n_replaced, 0
        for group in self._alive():
            _hooks[group].take_back()
            self._n_replaced += _hooks[group].n_replaced
        return self._n_replaced != before

    def stop(self) -> None:
        for group in self._alive():
            _hooks[group].remove(self._listener)
        self._groups.clear()

    @property
    def keeps_whole(self) -> bool:
        """Whether gradients are kept back that were not reduced at all."""
        params = (param for group in self._alive() for param in group.fsdp_params)
        return any(
            vars(param).get(_KEPT) is not None or _unsharded_grad(param) is not None
            for param in params
        )

    @property
    def keeps(self) -> bool:
        """Whether gradients are kept back that were not reduced over all processes."""
        return self.keeps_whole or any(g._partial_reduce_output is not None for g in self._alive())

    def drop(self) -> None:
        """Forget the gradients that are kept back, and a backward that raised."""
        if current_task() == -1:
            forget_broken(module for ref in self._modules if (module := ref()))
        for group in self._alive():
            group._partial_reduce_output = None
            for param in group.fsdp_params:
                if _KEPT in vars(param):
                    setattr(param, _KEPT, None)
                if _unsharded_grad(param) is not None:
                    param._unsharded_param.grad = None


def _hide_grad_dtype(fsdp_param: Any) -> None:
    """Have FSDP2 reduce and round as it does where nobody has set `grad_dtype`.

    Ours is None, so that `grad` can show the accumulator. FSDP2 would take it over for good, also
    for the whole parameter: it would not reduce unused parameters, and after detach() it would
    assign gradients of a dtype that the parameter does not take any more.
    """
    if not hasattr(type(fsdp_param), _CAPTURE):
        return
    this = weakref.ref(fsdp_param)

    def capture(param: Tensor) -> None:
        own = this()
        if own is not None and not is_owned(param):
            getattr(type(own), _CAPTURE)(own, param)

    setattr(fsdp_param, _CAPTURE, capture)
    if is_owned(fsdp_param.sharded_param):
        # It may be made of a parameter that we had already.
        fsdp_param._has_sharded_grad_dtype_override = False
        fsdp_param.sharded_grad_dtype = fsdp_param.sharded_param.dtype


def _let_round(fsdp_param: Any, rounds: bool) -> None:
    """Whether FSDP2 rounds what it has reduced to the parameter's dtype (torch >= 2.15).

    Where it rounds some parameters of a group and not others, the rounded ones lie in a memory of
    their own, whose place in the flat gradient nobody says.
    """
    if getattr(fsdp_param, "_has_sharded_grad_dtype_override", True):
        return
    fsdp_param.sharded_grad_dtype = fsdp_param.sharded_param.dtype if rounds else None


def _unsharded_grad(param: Any) -> Tensor | None:
    """The gradient of a whole parameter, which is there only from its backward to its reduction."""
    unsharded = getattr(param, "_unsharded_param", None)
    return None if unsharded is None else unsharded.grad
