"""Engines that shard parameters, or reduce gradients, themselves: each is refused by name, at once.

`p.grad` is our accumulator. An engine that averages, replaces or shards gradients and parameters
behind our back would train wrong without a word: DistributedDataParallel (DDP) copies its average
of one micro-gradient over the accumulator; FSDP, tensor parallelism and DeepSpeed's ZeRO put other
tensors in the place of the parameters. Three nets, each of which is enough by itself where it is
reached:

parameters
    `refuse_tensor`: a tensor that does not own its memory has no place for a kernel to write to.
    `refuse_exchange`: none of the wrapped parameters is in the param groups any more.
objects
    `Watch.look`: once, where torch.distributed is in use, the engines among Python's objects.
writes
    `Watch.end`: at the end of each backward, whether somebody wrote `p.grad` after we did.

Nothing is imported, and outside of torch.distributed only the last one costs anything: a look at
one tensor per backward.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from .trouble import Trouble

REDUCE = (
    "Leave the model unwrapped, wrap the optimizer with gradient_accumulation_steps=None, "
    "broadcast the parameters from rank 0 once, and average between the last backward() and "
    "step(): `for p in params: torch.distributed.all_reduce(p.grad); p.grad /= world_size`"
)
SHARDED = (
    "Use the plain optimizer with the engine's own accumulation; for FSDP2, "
    "fully_shard(..., mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)) reduces "
    "gradients in float32"
)
PLAIN = (
    "Give DeepSpeed the plain optimizer, which detach() returns without our hooks: DeepSpeed "
    "accumulates, clips and averages by itself, in float32 with "
    '"data_types": {"grad_accum_dtype": "fp32"} in its config. Or train without DeepSpeed'
)
# The modules that replace a client optimizer's parameters, or the optimizer.
_ZERO = tuple(
    f"deepspeed.runtime.{name}" for name in ("zero", "fp16", "bf16_optimizer", "superoffload",
    "zenflow")
)  # fmt: skip
_PASSED_OVER = ("fusedaccum", "torch", "contextlib")


class Owned(Protocol):
    """What is asked of a segment."""

    param: Tensor
    grad: Tensor | None
    shape: torch.Size
    is_due: bool


class Owner(Protocol):
    """What is asked of a collector."""

    trouble: Trouble
    groups: Sequence[dict[str, Any]]

    @property
    def segments(self) -> Mapping[Tensor, Any]:
        """By parameter."""


def is_distributed() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def may_reduce() -> bool:
    """Whether somebody may have reduced `p.grad` over processes unseen.

    `torch.distributed.all_reduce` moves no version counter.
    """
    return is_distributed() and torch.distributed.get_world_size() > 1


# --- parameters ---


def refuse_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose memory is not one block of its own that holds its values.

    Raises:
        TypeError: naming its class and what to do.
        ValueError: for memory that is not there.
    """
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        _refuse_kind(name, kind)
    if getattr(tensor, "_is_flat_param", False):  # FSDP1; its class is Parameter
        raise TypeError(
            f"{name} is a FlatParameter of FullyShardedDataParallel (FSDP1), which holds many "
            f"parameters and moves its memory: it is not supported. {SHARDED}"
        )
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor, which is not one dense block of memory")
    if tensor.layout is not torch.strided or tensor.is_meta:
        return  # others say what is wrong there
    if tensor.is_neg():
        raise TypeError(
            f"{name} is the negative of what its memory holds; make it from tensor.resolve_neg()"
        )
    if tensor.numel() and tensor.data_ptr() == 0:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has no memory: an engine that shards it has "
            "taken that away, or it was freed. Wrap the optimizer where the parameters are whole"
        )


def _refuse_kind(name: str, kind: type[Tensor]) -> None:
    """Refuse a subclass of Tensor that is not one block of memory.

    Raises:
        TypeError: naming it.
    """
    if _is_dtensor(kind):
        raise TypeError(
            f"{name} is a {kind.__name__}, whose memory is in shards (fully_shard, which is FSDP2, "
            f"or tensor parallelism): sharded tensors are not supported yet. {SHARDED}"
        )
    if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(
            f"{name} is a {kind.__name__}, a tensor subclass that runs operations itself "
            "(__torch_dispatch__): its memory is not one block that a kernel could write. Keep "
            "such tensors out of here: freeze them, or use the plain optimizer"
        )


def _is_dtensor(kind: type[Tensor]) -> bool:
    """By name: nothing of torch.distributed is imported for those who do not use it."""
    return any(base.__name__ == "DTensor" for base in kind.__mro__)


def refuse_partitioned(name: str, param: Tensor) -> None:
    """Refuse a parameter that DeepSpeed's ZeRO-3 has taken apart.

    Raises:
        TypeError: naming what to do.
    """
    if hasattr(param, "ds_id"):
        raise TypeError(f"{name} is partitioned by DeepSpeed's ZeRO-3. {PLAIN}")


def refuse_exchange(segments: Mapping[Tensor, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Refuse param groups in which none of the wrapped parameters is left.

    Raises:
        RuntimeError: naming who does that, and what to do.
    """
    if not segments:
        return
    newcomer: Tensor | None = None
    for group in groups:
        for param in group["params"]:
            if param in segments:
                return
            if newcomer is None and param.requires_grad:
                newcomer = param
    if newcomer is None:
        return
    refuse_tensor("a parameter that replaced the wrapped ones", newcomer)
    raise RuntimeError(
        "all wrapped parameters were replaced in param_groups (by others, the first of shape "
        f"{tuple(newcomer.shape)}): DeepSpeed's ZeRO and other sharding engines do that and then "
        "step their own partitions, for which there is no accumulator here; nothing was updated. "
        f"{PLAIN}. If you replaced them yourself: wrap the optimizer after that"
    )


# --- DeepSpeed, by who is calling ---


def refuse_deepspeed(steps: int | None) -> None:
    """Refuse DeepSpeed where it takes the optimizer over: asked where somebody reads param_groups.

    ZeRO (stages 1 to 3) and the bf16 and fp16 optimizers replace the parameters. Stage 0 in fp32
    leaves them, and then only one of the two may count micro-batches.

    Args:
        steps: the wrapper's `gradient_accumulation_steps`.

    Raises:
        RuntimeError: saying what to do.
    """
    if "deepspeed.runtime.engine" not in sys.modules:
        return
    caller = _caller()
    if caller.startswith(_ZERO) or caller == "accelerate.utils.deepspeed":
        raise RuntimeError(
            f"DeepSpeed ({caller}) replaces the parameters of the optimizer by partitions of its "
            f"own, which FusedAccumOptimizer would never see a gradient of. {PLAIN}"
        )
    if caller == "deepspeed.runtime.engine" and steps not in (None, 1):
        raise RuntimeError(
            f"FusedAccumOptimizer(gradient_accumulation_steps={steps}) counts micro-batches, and "
            f"so does DeepSpeed's engine. {PLAIN}, or, with ZeRO stage 0 in float32 only, wrap "
            "with gradient_accumulation_steps=None"
        )


def _caller() -> str:
    """The module that asks us: the first one on the stack that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    try:
        while frame is not None:
            module = str(frame.f_globals.get("__name__", ""))
            if module.split(".")[0] not in _PASSED_OVER:
                return module
            frame = frame.f_back
        return ""
    finally:
        del frame  # or it would keep every local of the caller alive


# --- engines among Python's objects, and writes behind our back ---


class Watch:
    """What one collector knows of engines around it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = weakref.proxy(owner)
        self._looked = False
        self._kept: list[tuple[Owned, int]] = []

    def begin(self) -> None:
        """A backward begins.

        Raises:
            RuntimeError: for an engine that owns a parameter of ours, and for param groups in which
                somebody replaced the parameters. The window is marked.
        """
        refuse_exchange(self._owner.segments, self._owner.groups)
        if not self._looked and is_distributed():
            self._look()

    def at_step(self) -> None:
        """The window is about to be used; an engine that replaced parameters left it empty.

        Raises:
            RuntimeError: as `begin` does.
        """
        if is_distributed() and (not self._looked or self._is_empty()):
            self._look()

    def _is_empty(self) -> bool:
        return all(param.grad is None for param in self._owner.segments)

    def _look(self) -> None:
        found = _engine(self._owner.segments)
        if found is not None:
            gc.collect()  # one that is only garbage has no say, and its hooks go with it
            found = _engine(self._owner.segments)
        self._looked = found is None
        if found is not None:
            self._fail(found)

    def end(self) -> None:
        """Have the end of this backward see whether somebody writes `p.grad` after we did.

        To be called when our own callback is queued. Those of engines are queued later, when the
        last gradient has arrived, and a callback that is queued by a callback runs after all.

        Raises:
            RuntimeError: from the backward. The window is marked.
        """
        queue = Variable._execution_engine.queue_callback

        def remember() -> None:
            # Wherever an engine may be, all of them: it may own some parameters only.
            most = None if is_distributed() else 1
            shown = (
                (segment, segment.grad._version)
                for segment in self._owner.segments.values()
                if segment.grad is not None and segment.param.grad is segment.grad
            )
            self._kept = list(islice(shown, most))
            queue(compare)

        def compare() -> None:
            kept, self._kept = self._kept, []
            for segment, version in kept:
                grad = segment.param.grad
                if grad is None or grad is not segment.grad or grad._version != version:
                    self._fail(_WRITTEN.format(tuple(segment.shape)))

        queue(remember)

    def refuse_taken(self, segment: Owned) -> None:
        """A gradient that arrived is not there when it is to be added.

        Raises:
            RuntimeError: if there was one. The window is marked.
        """
        if segment.is_due:
            self._fail(_TAKEN.format(tuple(segment.shape)))

    def _fail(self, reason: str) -> NoReturn:
        self._owner.trouble.note(reason)
        raise RuntimeError(f"{reason}. Nothing was updated")


def _modules() -> list[Module]:
    """Every module that Python's collector knows. `type`, for proxies that answer to any class."""
    return [o for o in gc.get_objects() if issubclass(type(o), Module)]


def _parameters(module: Module) -> Iterator[Tensor]:
    """A module's own parameters, also if it is being made just now."""
    return (p for p in vars(module).get("_parameters", {}).values() if p is not None)


def _reason(module: Module) -> str | None:
    """Why the parameters of `module` cannot be ours, if it is an engine."""
    kind = type(module)
    if issubclass(kind, DistributedDataParallel) and "reducer" in vars(module):
        return _DDP
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is not None and issubclass(kind, fsdp):
        return _FSDP1
    deepspeed = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if deepspeed is not None and issubclass(kind, deepspeed):
        optimizer = type(vars(module).get("optimizer"))
        if not any(base.__module__.split(".")[0] == "fusedaccum" for base in optimizer.__mro__):
            return _DEEPSPEED.format(optimizer.__name__)
    return None


def _engine(segments: Mapping[Tensor, Owned]) -> str | None:
    """Which engine has a parameter of `segments`, and what to do; None if there is none."""
    held: set[Tensor] = set()
    sharded: set[torch.Size] = set()
    for module in _modules():
        reason = _reason(module)
        if reason is not None and any(param in segments for param in Module.parameters(module)):
            return reason
        for param in _parameters(module):
            held.add(param)
            if _is_dtensor(type(param)):
                sharded.add(param.shape)
            else:
                sharded.update(getattr(param, "_shapes", ()))  # FlatParameter
    if not sharded:
        return None
    for param, segment in segments.items():
        if param not in held and param.grad is None and segment.param.shape in sharded:
            return _REPLACED.format(tuple(param.shape))
    return None


_DDP = (
    "DistributedDataParallel (DDP) wraps parameters of this optimizer: it averages each "
    "micro-gradient itself and would write that over p.grad, which is the accumulator. DDP is not "
    f"supported yet. {REDUCE}"
)
_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) wraps parameters of this optimizer: it moves their memory "
    f"and writes p.grad, which is the accumulator, itself. It is not supported. {SHARDED}"
)
_REPLACED = (
    "no gradient can arrive any more: an engine (fully_shard, which is FSDP2, tensor parallelism "
    "or FullyShardedDataParallel) replaced the model's parameters after the optimizer was made; "
    f"one of shape {{}} is in no module now. Sharded parameters are not supported yet. {SHARDED}"
)
_WRITTEN = (
    "something else wrote p.grad, which is this optimizer's accumulator, at the end of a "
    "backward() (a parameter of shape {}). DistributedDataParallel and engines like it do "
    f"that: the average of one micro-gradient takes the place of the sum. {REDUCE}"
)
_TAKEN = (
    "a gradient (of a parameter of shape {}) was taken away during the backward(), before it was "
    "accumulated. Gradient release does that (an optimizer step in a hook), and DeepSpeed, also "
    "where the Trainer or Accelerate use it beside this optimizer. Call detach() on this optimizer "
    "to train that way. " + PLAIN.replace("{", "{{").replace("}", "}}")
)
_DEEPSPEED = (
    "DeepSpeed's engine has parameters of this optimizer and another optimizer for them ({}), as "
    "it has where the Trainer gets both `optimizers` and a DeepSpeed config: its hooks would read "
    "single micro-gradients where they expect a sum. " + PLAIN.replace("{", "{{").replace("}", "}}")
)
