"""What torch.compile must not trace: this package.

Launches take addresses of tensors, which do not exist while Dynamo traces, and hooks keep what the
host knows of a window. A training step that is compiled as a whole leaves its graph for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
ROOT = Path(__file__).parents[1]
# Layers of `fuse_linear_wgrad()`: their forward is a part of the model's graph.
TRACED = {ROOT / "window" / name for name in ("linear.py", "linear_traced.py")}


def tell() -> None:
    """Tell Dynamo, if somebody has imported it: torch does where it makes an optimizer."""
    skipped = getattr(sys.modules.get("torch._dynamo.trace_rules"), "FORCE_SKIP_FILES", None)
    if skipped is not None:
        skipped.update(path.as_posix() for path in {*ROOT.rglob("*.py")} - TRACED)


def untraced(function: F) -> F:
    """Have a compiled caller leave its graph for `function`, also before anybody called `tell`."""
    disable = getattr(torch, "_disable_dynamo", None)
    if disable is None:  # the public way imports torch's compiler, which takes some seconds
        disable = torch.compiler.disable
    untraced_function: F = disable(function)
    return untraced_function
