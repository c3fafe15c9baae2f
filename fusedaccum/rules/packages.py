"""What has to be known of other packages' optimizers, by package and class name, nothing imported.

Any other `torch.optim.Optimizer` takes its own step() on fp32 gradients and fp32 masters. Here are
those that would not come out right, with the reason, and those that keep precise values themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

_TWO_PASSES = (
    "evaluates the gradient a second time inside its step(), at other parameters, and so does not "
    "take the gradient of a window"
)
_GRAPH = (
    "differentiates the gradients once more (backward(create_graph=True)), and accumulated ones "
    "have no graph"
)
_IN_BACKWARD = "updates each parameter inside the backward, from one micro-batch's gradient"
# "*": all classes of the package.
REFUSED = {
    "bitsandbytes": {
        "*": (
            "chooses its kernel by the gradient's dtype alone, so an fp32 gradient of a bf16 "
            "parameter would make it treat the parameter's memory as fp32; use torch.optim.AdamW "
            "here, or bitsandbytes unwrapped"
        )
    },
    "lomo_optim": dict.fromkeys(("Lomo", "AdaLomo"), _IN_BACKWARD),
    "pytorch_optimizer": {
        **dict.fromkeys(("AdaHessian", "SophiaH"), _GRAPH),
        **dict.fromkeys(("LOMO", "AdaLOMO"), _IN_BACKWARD),
        **dict.fromkeys(("SAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM"), _TWO_PASSES),
        "AliG": "computes its step size from the loss that its closure returns",
    },
    "torchao": {
        "CPUOffloadOptimizer": (
            "copies each micro-batch's gradient to the CPU in hooks of its own, before it is "
            "accumulated"
        )
    },
    "transformers": {"LayerWiseDummyOptimizer": _IN_BACKWARD},  # optim="galore_adamw_layerwise"
}


def _names(optimizer: Optimizer) -> set[tuple[str, str]]:
    """Package and name of its class and of all that it derives from."""
    return {(base.__module__.split(".")[0], base.__name__) for base in type(optimizer).__mro__}


def _values(optimizer: Optimizer) -> Iterable[Any]:
    """Its attributes, and what those that are containers hold."""
    for value in vars(optimizer).values():
        yield value
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()


def refusal(optimizer: Optimizer) -> str | None:
    """Why `optimizer` cannot be wrapped, or None if it can."""
    for package, name in _names(optimizer):
        reasons = REFUSED.get(package, {})
        if reason := reasons.get(name) or reasons.get("*"):
            return f"it {reason}"
    releases = getattr(optimizer, "_gradient_release", False)  # flashoptim
    if releases or any(group.get("gradient_release") for group in optimizer.param_groups):
        return f"with gradient release it {_IN_BACKWARD}; construct it without, and keep step()"
    for inner in _values(optimizer):
        if isinstance(inner, Optimizer):
            if ("torch", "ZeroRedundancyOptimizer") in _names(optimizer):
                return (
                    "it keeps the states of some parameters in each process, and no other "
                    "optimizer can be inside it. Wrap the optimizer itself, over all parameters, "
                    f"with shard_states=True: FusedAccumOptimizer({type(inner).__name__}(...), "
                    "shard_states=True)"
                )
            own = f"FusedAccumOptimizer({type(inner).__name__}(...))"
            return (
                f"it is made around another optimizer, {type(inner).__name__}, whose states would "
                "miss masters and checkpoints. Wrap that one and make this one around it: "
                f"{type(optimizer).__name__}({own}), with gradient_accumulation_steps=None"
            )
    return None


def keeps_precision(optimizer: Optimizer) -> str | None:
    """How `optimizer` itself keeps what bf16 and fp16 parameters would round away, if it does."""
    if getattr(optimizer, "bf16_stochastic_round", False):  # torchao
        return "rounds parameters stochastically (bf16_stochastic_round)"
    for group in optimizer.param_groups:  # flashoptim, and pytorch_optimizer's port of it
        width = group.get("master_bytewidth", group.get("master_byte_width")) or 0
        if any(width > param.element_size() for param in group["params"]):
            return "keeps the rest of each parameter in its states (master_weight_bits)"
    return None


def reads_fp32_gradients(optimizer: Optimizer) -> bool:
    """Whether its step() takes fp32 gradients of bf16 and fp16 parameters."""
    names = _names(optimizer)
    known = {("flashoptim", "FlashOptimizer"), ("pytorch_optimizer", "FlashAdamW")}
    return bool(names & (known | {("torchao", "_AdamBase")}))


def master_weights(optimizer: Optimizer, mode: str | None) -> str | None:
    """`master_weights` for `optimizer`: one that keeps precise values itself gets none beside them.

    Raises:
        ValueError: where somebody asks for both.
    """
    how = keeps_precision(optimizer)
    if how is None:
        return mode
    if mode not in (None, "none"):
        raise ValueError(
            f"master_weights={mode!r}, but {type(optimizer).__name__} {how}; leave "
            "master_weights=None, or construct the optimizer without that"
        )
    return "none"
