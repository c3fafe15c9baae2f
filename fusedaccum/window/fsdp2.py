"""The inside of FSDP2 (`fully_shard`), by names that are private to torch.

All that is used of it anywhere is asked for here, before a module is served: a name that is missed
in the middle of a window would leave other processes waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..backends.private import check

_GROUP = "fsdp_params", "_all_reduce_hook", "_reduce_scatter_comm", "_partial_reduce_output"
_CONTEXT = "post_backward_final_callback_queued", "all_states"
_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
_RESETS = ("_reset_iter_state",) if _VERSION >= (2, 13) else ()
_GRAD_DTYPE = "_capture_grad_dtype_policy", "_has_sharded_grad_dtype_override", "sharded_grad_dtype"
_ROUNDS = _GRAD_DTYPE if _VERSION >= (2, 15) else ()


def _state(module: Any) -> Any:
    """What FSDP2 knows of one of its modules."""
    check("FSDPModule", module, "_get_fsdp_state")
    return module._get_fsdp_state()


def fsdp2_groups(module: Module) -> list[Any]:
    """What a module of FSDP2 reduces at once.

    Raises:
        ValueError: for a torch that lacks a name which is needed to serve the module.
    """
    state = _state(module)
    check("FSDPState", state, "_state_ctx", "_is_root", *_RESETS)
    check("FSDPStateContext", state._state_ctx, *_CONTEXT)
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch < 2.12
        check("FSDPState", state, "_fsdp_param_group")
        groups = [group for group in [state._fsdp_param_group] if group is not None]
    for group in groups:
        check("FSDPParamGroup", group, *_GROUP)
        for param in group.fsdp_params:
            check("FSDPParam", param, "sharded_param", "_unsharded_param", *_ROUNDS)
    return list(groups)


def fsdp2_params(group: Any) -> list[Tensor]:
    """The sharded parameters of a group, also while its module shows whole ones."""
    return [param.sharded_param for param in group.fsdp_params]


def forget_broken(modules: Iterable[Module]) -> None:
    """Have roots forget a backward whose end they wait for; called where none is running.

    They would reduce the first layer's gradients no more: their turn is in a callback, which FSDP2
    believes to be queued. torch < 2.13 cannot forget it.
    """
    contexts = [_state(module)._state_ctx for module in modules]
    for context in contexts:
        if context.post_backward_final_callback_queued:
            for state in context.all_states:
                if state._is_root and hasattr(state, "_reset_iter_state"):
                    state._reset_iter_state()
