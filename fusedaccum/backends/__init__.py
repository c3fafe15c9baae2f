"""Backends: the same operations on the same requests, on Triton or on torch.

`get` picks one. Only `backends/triton.py` launches the Triton kernels; `backends/aten.py` runs the
reference in blocks, or, on a CPU with a C compiler, loops compiled from the kernels' own rules.
"""

from __future__ import annotations

import sys

# Not `import torch`: the name is that of a module of this package.
from torch import device as Device

from .devices import norm_of
from .keep import Keep
from .operations import (
    Add,
    Backend,
    Correction,
    Finalize,
    Launch,
    Step,
    StepTensor,
    SumOfSquares,
)
from .scalars import UpdateScalars

__all__ = [
    "Add", "Backend", "Correction", "Finalize", "Keep", "Launch", "Step", "StepTensor",
    "SumOfSquares", "UpdateScalars", "get", "norm_of", "why",
]  # fmt: skip


def _triton_missing(device: Device) -> str | None:
    """Why Triton cannot serve `device`, or None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton has no kernels for {device.type} tensors"


def why(name: str | None, device: Device) -> tuple[str, str]:
    """The backend that `get` would return and the reason, in words for people."""
    if name not in (None, "triton", "torch"):
        raise ValueError(f'backend must be None, "triton" or "torch", got {name!r}')
    if name == "torch":
        return "torch", "asked for"
    missing = _triton_missing(device)
    if name == "triton":
        if missing and sys.modules.get("triton") is None:
            raise ValueError(
                f'backend="triton" cannot be used: {missing}. Install triton, or use backend=None'
            )
        if missing:
            raise ValueError(
                f'backend="triton" cannot be used: {missing}. Use backend=None, move the model to '
                "a GPU, or set TRITON_INTERPRET=1 before the import to run the kernels' interpreter"
            )
        return "triton", "asked for"
    if device.type == "cpu":
        return "torch", "parameters are on the CPU"
    return ("torch", missing) if missing else ("triton", f"parameters are on {device}")


def get(name: str | None, device: Device) -> Backend:
    """A backend for tensors on `device`: `name`, or the fastest one where it is None."""
    chosen, _ = why(name, device)
    if chosen == "triton":
        from .triton import TritonBackend

        return TritonBackend(device)
    from .aten import TorchBackend

    return TorchBackend(device)
