"""Callbacks that log `FusedAccumOptimizer.metrics()`, each where its framework is installed.

    from fusedaccum.integrations.callbacks import TrainerMetrics    # needs transformers
    from fusedaccum.integrations.callbacks import LightningMetrics  # needs lightning

This module imports neither; a callback's framework is imported when the callback is asked for.
`docs/frameworks.md` has complete examples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightning_metrics import LightningMetrics
    from .trainer_metrics import TrainerMetrics

__all__ = ["LightningMetrics", "TrainerMetrics"]

# Where each is, and which package it needs.
_PLACES = {
    "LightningMetrics": ("lightning_metrics", "lightning"),
    "TrainerMetrics": ("trainer_metrics", "transformers"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _PLACES[name]
    try:
        return getattr(import_module(f".{module}", __package__), name)
    except ImportError as error:
        raise ImportError(
            f"{name} needs {package} ({error}): pip install {package}. In a loop of your own log "
            "opt.metrics(), which needs nothing"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
