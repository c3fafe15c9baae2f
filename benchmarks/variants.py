"""Other choices for the Triton kernels, beside those that are made: for a GPU to decide.

A choice gives constants of `fusedaccum/backends/triton.py` other values. Each passes the gate with
them, and all are timed in turns on the same tensors. `as_it_is` stands twice: its distance from
itself is the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

from fusedaccum.backends import triton
from fusedaccum.bench import gate
from fusedaccum.bench.race import Variant

from . import cases
from .ours import Operations
from .suites import BF16, Suite, operations

CHOICES: dict[str, dict[str, Any]] = {
    "as_it_is": {"VECTOR": triton.VECTOR},
    "as_it_is_again": {"VECTOR": triton.VECTOR},
    "vector_8": {"VECTOR": 8},
    "accumulate_block_1024": {"ACCUMULATE_BLOCK": 1024},
    "accumulate_block_4096": {"ACCUMULATE_BLOCK": 4096},
    "accumulate_block_8192_warps_8": {"ACCUMULATE_BLOCK": 8192, "NUM_WARPS": 8},
    "step_block_512": {"STEP_BLOCK": 512},
    "step_block_2048_warps_8": {"STEP_BLOCK": 2048, "NUM_WARPS": 8},
    "warps_2": {"NUM_WARPS": 2},
    "warps_8": {"NUM_WARPS": 8},
    "finalize_block_256": {"FINALIZE_BLOCK": 256},
    "finalize_block_4096": {"FINALIZE_BLOCK": 4096},
}


def chosen(call: Callable[[], Any], choice: dict[str, Any]) -> Any:
    """What `call` gives where these constants hold."""
    with patch.multiple(triton, **choice):
        return call()


def variants(suite: Suite, shape: str, names: Sequence[str]) -> None:
    """Time an accumulation, the last one with its norm, and a step, with each of these choices."""
    sizes, grads = cases.SHAPES[shape](), cases.gradients(shape, BF16, suite.device)
    form: Any = suite.build([Operations.name], sizes, BF16)[Operations.name]
    passed = {}
    for name in names:
        check = partial(gate.gate, Operations, suite.plan, grads[0], suite.gate_shapes)
        try:
            passed[name] = chosen(check, CHOICES[name])
        except Exception as error:  # a choice that does not compile must not cost the others
            suite.refuse(name, error)
    for operation in ("accumulate", "accumulate_last_norm", "step"):
        run, moved = operations(grads)[operation](form)
        calls = {
            name: Variant(partial(chosen, run, CHOICES[name]), moved, found, form)
            for name, found in passed.items()
        }
        n_elements = cases.count(sizes)
        suite.time(f"variant_{operation}", shape, BF16, calls, n_elements=n_elements)
