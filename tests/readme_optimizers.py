"""README's table of which optimizer takes which path, made from the code (`readme_tables.py`)."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.testing._internal.common_optimizers import optim_db

from fusedaccum import FusedAccumOptimizer
from fusedaccum.rules import packages

# Packages and, of each, optimizers that stand for it: (module, classes, options).
OTHERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "lion-pytorch": ("lion_pytorch", ("Lion",), {}),
    "torch-optimi": ("optimi", ("Adam", "AdamW", "Adan", "Lion", "StableAdamW"), {}),
    "flashoptim": (
        "flashoptim",
        ("FlashAdamW", "FlashLion"),
        {"quantize": False, "master_weight_bits": None, "fused": False},
    ),
    "torchao": ("torchao.optim", ("AdamW8bit", "AdamW4bit", "AdamWFp8"), {}),
    "pytorch-optimizer": ("pytorch_optimizer", ("AdaBelief", "ADOPT", "Lamb", "Prodigy"), {}),
    "bitsandbytes": ("bitsandbytes.optim", ("AdamW", "AdamW8bit", "Lion8bit"), {}),
    "lomo-optim": ("lomo_optim", (), {}),
    "transformers": ("transformers", (), {}),
}


@dataclass
class Package:
    """Names of a package's optimizers by what becomes of them."""

    fused: list[str] = field(default_factory=list)
    native: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Ask the code where `optimizer` belongs."""
        if packages.refusal(optimizer):
            names = self.refused
        else:
            wrapped = FusedAccumOptimizer(optimizer)
            names = self.fused if wrapped._core.updater.is_fused else self.native
            wrapped.detach()
        name = f"`{type(optimizer).__name__}`"
        if name not in names:
            names.append(name)


def _torch() -> Package:
    """Every optimizer of PyTorch's own database, with every set of options."""
    found = Package()
    for info in optim_db:
        for entry in info.optim_inputs_func(device="cpu"):
            options = {k: v for k, v in entry.kwargs.items() if k not in ("foreach", "fused")}
            found.add(info.optim_cls([torch.nn.Parameter(torch.ones(4, 4))], **options))
    return found


def _other(module_name: str, names: tuple[str, ...], options: dict[str, Any]) -> Package:
    found = Package()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            module = importlib.import_module(module_name)
            params = [torch.nn.Parameter(torch.ones(64, 64))]
            found.add(getattr(module, name)(params, lr=1e-3, **options))
    return found


def table() -> str:
    """The table and the reasons beneath it, in Markdown."""
    tables = {"torch.optim": _torch()}
    tables |= {package: _other(*arguments) for package, arguments in OTHERS.items()}
    reasons = []
    for module, refusals in packages.REFUSED.items():
        package = next(name for name, (m, *_) in OTHERS.items() if m.split(".")[0] == module)
        by_reason: dict[str, list[str]] = {}
        for name, reason in refusals.items():
            by_reason.setdefault(reason, []).append("all" if name == "*" else f"`{name}`")
        for reason, names in by_reason.items():
            if names != ["all"]:
                tables[package].refused += names
            reasons.append(f"- {package}, {', '.join(names)}: {reason}.")
    lines = ["| package | fused rule | its own `step()` | refused |", "|---|---|---|---|"]
    for package, found in tables.items():
        columns = (found.fused, found.native, found.refused)
        cells = [", ".join(dict.fromkeys(names)) for names in columns]
        lines.append(f"| {package} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Why some are refused:", "", *reasons]) + "\n"
