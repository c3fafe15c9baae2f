"""Parameters that an engine has taken apart or replaced: refused by name, at once.

DeepSpeed's ZeRO puts other tensors in the place of the parameters. `watch.py` sees the engines that
write gradients. Nothing is imported for any of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..backends.tensors import is_dtensor, refuse_tensor

PLAIN = (
    "Give DeepSpeed the plain optimizer, which detach() returns without our hooks: DeepSpeed "
    "accumulates, clips and averages by itself, in float32 with "
    '"data_types": {"grad_accum_dtype": "fp32"} in its config. Or train without DeepSpeed'
)


def refuse_partitioned(name: str, param: Tensor) -> None:
    """Refuse a parameter that DeepSpeed's ZeRO-3 has taken apart.

    Raises:
        TypeError: naming what to do.
    """
    if hasattr(param, "ds_id"):
        raise TypeError(f"{name} is partitioned by DeepSpeed's ZeRO-3. {PLAIN}")


def exchanged(slots: Mapping[Tensor, Any], groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The parameters that need a gradient, where none of the wrapped ones is left in the groups."""
    if not slots:
        return []
    newcomers: list[Tensor] = []
    for group in groups:
        for param in group["params"]:
            if param in slots:
                return []
            if param.requires_grad:
                newcomers.append(param)
    return newcomers


def refuse_exchange(slots: Mapping[Tensor, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Refuse param groups in which none of the wrapped parameters is left.

    Raises:
        RuntimeError: naming who does that, and what to do.
    """
    newcomers = exchanged(slots, groups)
    if not newcomers:
        return
    shape = tuple(newcomers[0].shape)
    if is_dtensor(type(newcomers[0])):
        raise RuntimeError(
            f"all wrapped parameters were replaced in param_groups by shards (DTensors, the first "
            f"of shape {shape}), but what was accumulated or learnt for them is of whole ones; "
            "nothing was updated. Shard (fully_shard, Accelerate's prepare()) before the first "
            "backward(), and load a checkpoint after it"
        )
    refuse_tensor("a parameter that replaced the wrapped ones", newcomers[0])
    raise RuntimeError(
        "all wrapped parameters were replaced in param_groups (by others, the first of shape "
        f"{shape}), for which there is no accumulator here; nothing was updated. If your code "
        "replaces parameters (3D Gaussian splatting does): call detach() before that, and wrap the "
        "optimizer again after it. DeepSpeed's ZeRO and other sharding engines replace them too, "
        f"and then step their own partitions. {PLAIN}"
    )
