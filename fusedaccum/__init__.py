"""Fused gradient accumulation for PyTorch: wrap the optimizer you have.

    opt = fusedaccum.FusedAccumOptimizer(
        torch.optim.AdamW(model.parameters()), gradient_accumulation_steps=8, max_grad_norm=1.0
    )

`FusedAccumOptimizer` is the drop-in wrapper; `functional` has the operations it is made of;
`register_rule` gives an optimizer of your own a fused step.
"""

from importlib import metadata

from . import functional
from .optimizer import FusedAccumOptimizer
from .rules.registry import register_rule, unregister_rules

try:
    __version__ = metadata.version("fusedaccum")
except metadata.PackageNotFoundError:  # run from a checkout
    __version__ = "0+unknown"

__all__ = [
    "FusedAccumOptimizer",
    "__version__",
    "functional",
    "register_rule",
    "unregister_rules",
]
