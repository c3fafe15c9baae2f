"""DistributedDataParallel around our parameters: its reducer rests, and we average instead of it.

DDP averages each micro-gradient and writes that over `p.grad`, which is the accumulator. So the
hooks of its reducer are removed; its forward (buffers, `no_sync()`, devices) stays what it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import JoinHook
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..backends.private import check
from ..window.hooks import is_owned
from ..window.reducing import Parts, Reducing
from .agreement import Settings
from .joining import DdpHook, Membership
from .reduction import Reduction

_HOOK = (
    "a communication hook, which does not run: gradients are averaged in float32 here. Make DDP "
    "without one"
)
_ONE = (
    "Use one of each; or leave Join, and let that process call flush(), which may close a window "
    "early, also an empty one"
)
# Of a DDP module, also for detach() and Join: missed there, DDP would rest for good, and other
# processes would wait.
_NAMES = (
    "_build_debug_param_to_name_mapping", "_build_params_for_reducer", "_comm_hooks",
    "_check_and_sync_module_buffers", "_check_global_requires_backward_grad_sync",
    "_ddp_init_helper", "_delay_all_reduce_all_params", "_has_rebuilt_buckets", "_join_config",
    "_remove_autograd_hooks", "_sync_final_model", "_use_python_reducer", "join_hook", "logger",
    "parameters_to_ignore", "reducer", "require_backward_grad_sync", "require_forward_param_sync",
    "static_graph",
)  # fmt: skip
_STATIC = "_static_graph_delay_allreduce_enqueued"  # of one with a static graph
# Who averages instead of each DDP's reducer: tokens, and what takes part in Join for each.
_served: WeakIdKeyDictionary = WeakIdKeyDictionary()
# DDP modules whose reducer sees nothing.
_resting: WeakIdKeyDictionary = WeakIdKeyDictionary()


class DdpReduction(Reduction):
    """Averages instead of the reducers of DDP modules.

    Args:
        parts: of a collector.
        modules: all of one process group.
        settings: see `Reduction`.
        shares: whether other wrappers have some of their parameters. Processes whose graphs differ
            would start the collectives of two wrappers in different orders, but step() is called
            in the same.
        membership: of the optimizer in Join blocks.
    """

    def __init__(
        self,
        parts: Parts,
        modules: Sequence[DistributedDataParallel],
        settings: Settings,
        shares: bool,
        membership: Membership,
    ) -> None:
        held = [weakref.ref(module) for module in modules]
        # Frozen ones too, which may be unfrozen later: DDP itself would miss those then.
        params = {p for module in modules for p in _named(module).values()}

        def alive() -> list[DistributedDataParallel]:
            return [module for ref in held if (module := ref()) is not None]

        def is_over() -> bool:
            return not alive()

        def is_due() -> bool:
            return all(module.require_backward_grad_sync for module in alive())

        def is_joint() -> bool:
            return any(module._join_config.enable for module in alive())

        super().__init__(
            parts,
            modules[0].process_group,
            is_served=params.__contains__,
            is_over=is_over,
            is_due=is_due,
            waits=shares,
            is_joint=is_joint,
            settings=settings,
        )
        self._alive = alive
        self._token = token = object()
        for module in modules:
            _rest(module)
            _served.setdefault(module, {})[token] = membership
        # Without us a DDP that rests would average nothing, and say nothing.
        self._wake = weakref.finalize(self, _wake, held, token)
        self._wake.atexit = False

    def is_instead_of(self, modules: Sequence[Module]) -> bool:
        return all(self._token in _served.get(module, ()) for module in modules)

    def watch_hooks(self) -> None:
        if any(module._comm_hooks for module in self._alive()):
            self._trouble.note(
                "DistributedDataParallel (DDP) of parameters of this optimizer was given "
                f"{_HOOK}. Nothing was updated"
            )

    def detach(self) -> None:
        super().detach()
        self._wake()


def serve(
    parts: Parts,
    modules: Sequence[DistributedDataParallel],
    settings: Settings,
    membership: Membership,
) -> Reducing:
    """Average instead of DDP from now on; called in a backward, before a gradient was added.

    Raises:
        ValueError: for a DDP that does more than averaging, naming what, and the way round.
    """
    for module in modules:
        check("DistributedDataParallel", module, *_NAMES)
        if module.static_graph:
            check("DistributedDataParallel", module, _STATIC)
        check("Reducer", module.reducer, "_rebuild_buckets", "_set_static_graph")
        if reason := _refusal(module, parts):
            raise ValueError(
                f"DistributedDataParallel (DDP) wraps parameters of this optimizer, {reason}"
            )
    if len({_ranks(module) for module in modules}) > 1:
        raise ValueError(
            f"{len(modules)} DistributedDataParallel (DDP) modules have parameters of this "
            "optimizer and average over different process groups: give the parameters of each "
            "group an optimizer of their own, or delete a DDP module that is not used any more"
        )
    shares = any(_others(module, parts.slots) for module in modules)
    return DdpReduction(parts, modules, settings, shares, membership)


def _ranks(module: DistributedDataParallel) -> tuple[int, ...] | None:
    """Of the processes over which this DDP averages; None where its group was destroyed."""
    try:
        return tuple(dist.get_process_group_ranks(module.process_group))
    except KeyError:
        return None


def _named(module: DistributedDataParallel) -> dict[str, Tensor]:
    """The parameters that DDP is not told to ignore."""
    named = module.module.named_parameters()
    return {name: param for name, param in named if name not in module.parameters_to_ignore}


def _others(module: DistributedDataParallel, slots: Mapping[Tensor, Any]) -> dict[str, Tensor]:
    """The parameters that need a gradient and are not ours, by name."""
    named = _named(module).items()
    return {name: p for name, p in named if p.requires_grad and p not in slots}


def _refusal(module: DistributedDataParallel, parts: Parts) -> str | None:
    """Why this DDP cannot be served, and what to do."""
    others = _others(module, parts.slots)
    nobodys = [name for name, param in others.items() if not is_owned(param)]
    if nobodys:
        return (
            f"and {len(nobodys)} parameters that no FusedAccumOptimizer has "
            f"({', '.join(nobodys[:3])}): nobody would average those. Wrap the optimizer of those "
            "too, freeze them (requires_grad_(False)) before DDP is made, or have DDP ignore them "
            "(DistributedDataParallel._set_params_and_buffers_to_ignore_for_model)"
        )
    if others and parts.window.steps is None:
        return (
            f"and {len(others)} parameters of another FusedAccumOptimizer: they average in step() "
            "then, which is after a loop's own clipping. Let each of them count the window "
            "(gradient_accumulation_steps=N, max_grad_norm=), or give all parameters to one"
        )
    if module.mixed_precision is not None:
        return (
            "with mixed_precision=, which keeps parameters of its own for the forward: use "
            "torch.autocast, or a model in bfloat16, whose masters are kept here"
        )
    if module._comm_hooks:
        return f"with {_HOOK}"
    if module._join_config.enable and module not in _resting:
        return (
            "and met it inside Join (DDP knows no end of a Join block): make the "
            "FusedAccumOptimizer after DDP, and before Join"
        )
    if module._use_python_reducer:
        return (
            'with torch._dynamo.config.optimize_ddp="python_reducer", which averages in the '
            'compiled graph: set it to "ddp_optimizer", which is the default'
        )
    is_queued = module.static_graph and module._static_graph_delay_allreduce_enqueued
    if is_queued and not module._has_rebuilt_buckets and module not in _resting:
        _rest(module)
        return (
            "with static_graph=True, and was made after it: its first backward() averages in a way "
            "that cannot be stopped any more. Call zero_grad() and go on, as from now on it is "
            "served; or make DDP before the FusedAccumOptimizer"
        )
    if module._delay_all_reduce_all_params:
        return "with delay_all_reduce_named_params=, which takes p.grad away: leave that out"
    return None


def _rest(module: DistributedDataParallel) -> None:
    """Have the reducer see no gradient any more."""
    module._remove_autograd_hooks()
    _resting[module] = True
    # A static graph reduces its first backward from a callback of its own.
    module._static_graph_delay_allreduce_enqueued = True
    module.join_hook = MethodType(join_hook, module)  # type: ignore[method-assign]
    if hasattr(type(module), "finalize_backward"):  # torch >= 2.15
        vars(module)["finalize_backward"] = MethodType(finalize_backward, module)


def join_hook(module: DistributedDataParallel, **options: Any) -> JoinHook:
    """What DDP's own `join_hook` gives, for a module that rests; Join calls it.

    Its name is that of the method, so that a copy or a pickle of the module has that one.

    Raises:
        ValueError: for what cannot take part, with the way round.
    """
    found = [m for m in _served.get(module, {}).values() if not m.is_over]
    if any(_others(module, m.member.collector.slots) for m in found):
        raise ValueError(
            "Join around a DDP module that several FusedAccumOptimizers share: a process without "
            f"data does not know in which order they step. {_ONE}"
        )
    served = [m for m in _served if any(other is n for other in _served[m].values() for n in found)]
    if len(served) > 1:
        raise ValueError(
            f"Join around one of {len(served)} DDP modules that share a FusedAccumOptimizer: a "
            f"process without data would close each micro-batch as often. {_ONE}"
        )
    hook: JoinHook = type(module).join_hook(module, **options)
    for membership in found[-1:]:
        membership.check(options)
        hook = DdpHook(module, membership)
    return hook


def finalize_backward(module: DistributedDataParallel) -> None:
    """What a loop calls that ends DDP's reductions itself: step() waits for ours."""


def _wake(held: Sequence[weakref.ref[DistributedDataParallel]], token: object) -> None:
    """Give DDP a reducer again, unless another optimizer averages instead of it by now."""
    for ref in held:
        module: Any = ref()
        if module is None or token not in _served.get(module, ()):
            continue
        del _served[module][token]
        if _served[module]:
            continue
        del _served[module], _resting[module], module.join_hook
        vars(module).pop("finalize_backward", None)
        parameters, is_sparse = module._build_params_for_reducer()
        names = module._build_debug_param_to_name_mapping(parameters)
        module._ddp_init_helper(parameters, is_sparse, names, module.static_graph)
        module._static_graph_delay_allreduce_enqueued = False
        if module.static_graph:
            module.reducer._set_static_graph()
            module.logger._set_static_graph()
        if getattr(module, "require_manual_backward_finalization", False):
            module.require_manual_backward_finalization = True  # of the new reducer
