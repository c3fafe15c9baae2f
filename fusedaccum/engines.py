"""Tensors, parameters and callers that belong to an engine: each is refused by name, at once.

An engine that replaces or shards parameters behind our back would train wrong without a word: FSDP,
tensor parallelism and DeepSpeed's ZeRO put other tensors in the place of the parameters. `watch.py`
sees those that write gradients. Nothing is imported for any of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

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
    if is_dtensor(kind):
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


def is_dtensor(kind: type[Tensor]) -> bool:
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
