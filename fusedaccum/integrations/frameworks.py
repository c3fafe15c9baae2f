"""Who is calling: engines and frameworks that count windows or own parameters, and checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..window.engines import PLAIN

# The modules that replace a client optimizer's parameters, or the optimizer.
_ZERO = tuple(
    f"deepspeed.runtime.{name}" for name in ("zero", "fp16", "bf16_optimizer", "superoffload",
    "zenflow")
)  # fmt: skip
# Functions that save what one process has, and whose they are.
_SAVES = {
    "_save_optimizer_and_scheduler": "the Trainer",
    "save_accelerator_state": "Accelerate's save_state()",
    "dump_checkpoint": "Lightning",
}
_PASSED_OVER = ("fusedaccum", "torch", "contextlib")


def _callers() -> Iterator[FrameType]:
    """The stack from the function that asks on, outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_asked_for_keys() -> bool:
    """Whether torch.distributed.checkpoint wants a state dict, of which it takes "state" alone."""
    name = "torch.distributed.checkpoint.state_dict"
    return any(frame.f_globals.get("__name__") == name for frame in _callers())


def refuse_part() -> None:
    """Raise where somebody who saves the state dict of one process asks for it, as that one has the
    states of some parameters only (`shard_states=True`).

    Raises:
        RuntimeError: naming who asks, and what to do.
    """
    for frame in _callers():
        asks = _SAVES.get(frame.f_code.co_name)
        info: Any = frame.f_locals.get("info")
        if frame.f_code.co_name == "_get_optim_state_dict" and info.full_state_dict:
            asks = "StateDictOptions(full_state_dict=True)"
        if asks is not None:
            raise RuntimeError(
                f"{asks} saves the state dict of one process, but with shard_states=True each has "
                "the states of some parameters only; nothing was saved. Use "
                "torch.distributed.checkpoint (get_optimizer_state_dict, dcp.save) in all "
                "processes, or leave shard_states out"
            )


def is_asked_by(function: str) -> bool:
    """Whether a function of this name asks for an attribute of the optimizer, directly or through
    an engine's own optimizer; called by what the attribute is made with."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(3):  # no more, as attributes are asked for often
        if frame is None:
            return False
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def stood_before() -> Any:
    """What a framework calls `optimizer` as it makes the class of an object to put before it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__init_subclass__":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("optimizer")


def refuse_second_count(steps: int | None) -> None:
    """Raise where a framework and the wrapper would both count micro-batches.

    The framework calls step() once per window of its own, so that the wrapper would update after N
    of those, the framework clip a sum that is not complete, and the schedule run N times too fast,
    without a word. Accelerate, and with it the Trainer, loads the state dict of every optimizer
    that it prepares: that is where to ask who is calling. Nothing is imported, and a step costs
    nothing.

    Args:
        steps: the wrapper's `gradient_accumulation_steps`.

    Raises:
        ValueError: naming both.
    """
    if steps is None or steps == 1:
        return  # a step() is an update
    counting = None
    for frame in _callers():
        module = frame.f_globals.get("__name__")
        if module == "transformers.trainer":
            counting = "the Trainer, which divides the loss, clips and counts updates"
        elif module == "accelerate.optimizer":
            state = getattr(frame.f_locals.get("self"), "gradient_state", None)
            n = getattr(state, "num_steps", 1)
            if n > 1:
                counting = f"Accelerator(gradient_accumulation_steps={n})"
    if counting is not None:
        raise ValueError(
            f"FusedAccumOptimizer(gradient_accumulation_steps={steps}) counts micro-batches, and "
            f"so does {counting}: one of the two has to. Wrap with "
            "gradient_accumulation_steps=None, and every step() is an update"
        )


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
    for frame in _callers():
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in _PASSED_OVER:
            return module
    return ""
