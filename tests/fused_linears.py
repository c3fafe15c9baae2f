"""`pytest -p tests.fused_linears`: every optimizer of a test fuses every Linear that it can.

What holds without fusing has to hold with it, but for rounding: a weight gradient is not rounded to
bf16 or fp16, and a GEMM adds in another order than a pass over a gradient does.
"""

from __future__ import annotations

import gc
from functools import wraps
from typing import Any

from torch import nn

N_FUSED = 0


def pytest_sessionstart() -> None:
    """After conftest.py has chosen how Triton runs."""
    from fusedaccum import FusedAccumOptimizer

    init = FusedAccumOptimizer.__init__

    @wraps(init)
    def fusing(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _fuse(self)

    FusedAccumOptimizer.__init__ = fusing  # type: ignore[method-assign]


def _fuse(self: Any) -> None:
    global N_FUSED
    own = {id(p) for group in self.param_groups for p in group["params"]}
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Linear) or "_parameters" not in vars(module):
            continue
        if id(module._parameters.get("weight")) in own:
            N_FUSED += len(self.fuse_linear_wgrad(module, min_numel=0).fused)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{N_FUSED} Linear modules were fused")
