"""The loops that `tests.interruptions` interrupts, and the operation of each."""

from __future__ import annotations

from typing import Any

import torch

from tests.interruptions import Scenario
from tests.runs import Kind, Op, Run


def _adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


def _adafactor(groups: Any) -> torch.optim.Optimizer:
    # The default eps is the dtype's own, which differs in the float64 oracle.
    return torch.optim.Adafactor(groups, lr=0.01, eps=(1e-7, 1e-3))


def _muon(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(groups, lr=0.01)


COUNTED = Kind("adamw-fp32", _adamw, options={"max_grad_norm": 1.0})
SPLIT = Kind("adamw-bf16", _adamw, torch.bfloat16)
WEIGHTED = Kind("adamw-bf16-weighted", _adamw, torch.bfloat16, weighted=True)
LOOP = Kind("adamw-bf16-loop", _adamw, torch.bfloat16, steps=None)
LOOP_WEIGHTED = Kind("adamw-fp32-loop-weighted", _adamw, steps=None, weighted=True)
LINKED = Kind("adamw-fp16-scaler", _adamw, torch.float16, scaled=True)
ADAFACTOR = Kind("adafactor-bf16", _adafactor, torch.bfloat16)
# Muon multiplies matrices in bf16, so that a last bit of the gradient can become one of bf16.
MUON = Kind("muon-fp32", _muon, tolerance=0.1)
MUON_LOOP = Kind("muon-bf16-loop", _muon, torch.bfloat16, steps=None, tolerance=0.1)
NATIVE = (ADAFACTOR, MUON, MUON_LOOP)


def _after(kind: Kind, prefix: list[Op], op: Op, suffix: list[Op], note: str = "") -> Scenario:
    """`op` interrupted after `prefix`; `suffix` ends the window, and one more follows.

    Named after the micro-batches so far: "step after 2".
    """
    n = sum(done[0] == "backward" for done in prefix)
    is_open = not note and op[0] not in ("backward", "step") and prefix[-1][0] == "backward"
    name = " ".join(filter(None, (kind.name, op[0], f"after {n}", note or ("open" * is_open))))
    program = (*prefix, op, *suffix, *kind.update(20))
    return Scenario(name, kind, program, len(prefix), traces_torch=kind in NATIVE)


def _every(kind: Kind, windows: int, names: tuple[str, ...]) -> list[Scenario]:
    """Each operation of the last of some windows, if its name is given."""
    program = [op for i in range(windows) for op in kind.update(2 * i)]
    first = len(program) - len(kind.update(0))
    return [
        _after(kind, program[:i], program[i], program[i + 1 :])
        for i in range(first, len(program))
        if program[i][0] in names
    ]


def _flush(kind: Kind) -> list[Scenario]:
    """flush() of a window of one micro-batch, closed and still open."""
    window = kind.update(2)
    closed = window[: len(window) // 2]
    return [
        _after(kind, kind.update(0) + closed, ("flush",), []),
        _after(kind, kind.update(0) + closed[:1], ("flush",), []),
    ]


def _load(kind: Kind) -> list[Scenario]:
    """A checkpoint from inside a window, into a wrapper that trains already and into a new one."""
    ours = kind.update(2)
    half = len(ours) // 2
    other = kind.update(30) + kind.update(32)[:half]
    saved = Run(kind).all(other).saved()
    write: Op = ("write", saved["params"])
    load: Op = ("load", saved["opt"])
    rest = kind.update(32)[half:]
    return [
        _after(kind, [*kind.update(0), *ours[:half], write], load, rest, "trained"),
        _after(kind, [write], load, rest, "new"),
    ]


def _between(kind: Kind) -> list[Scenario]:
    """zero_grad(), clipping and saving between backward() and step()."""
    one = kind.update(2)
    half = one[: len(one) // 2]
    before = kind.update(0)
    return [
        _after(kind, [*before, *half, half[0]], ("zero_grad",), kind.update(4)),
        _after(kind, [*before, *half], ("save",), one[len(half) :]),
        _after(kind, [*before, *half, one[len(half)]], ("clip",), one[len(half) + 1 :]),
    ]


def _converted(kind: Kind, dtype: torch.dtype) -> list[Scenario]:
    """zero_grad() and load_state_dict() that find the model in another dtype."""
    before = [*kind.update(0), ("convert", dtype)]
    saved = Run(kind).all(kind.update(0)).saved()["opt"]
    return [
        _after(kind, before, ("zero_grad",), kind.update(2), "converted"),
        _after(kind, before, ("load", saved), kind.update(2), "converted"),
    ]


ALL = ("backward", "step", "zero_grad")
SCENARIOS: list[Scenario] = [
    *_every(COUNTED, 1, ("step",)),
    *_every(COUNTED, 2, ALL),
    *_flush(COUNTED),
    *_between(COUNTED),
    *_load(COUNTED),
    *_every(SPLIT, 1, ("step",)),
    *_every(SPLIT, 2, ("backward", "step")),
    *_load(SPLIT),
    *_converted(SPLIT, torch.float16),
    *_every(WEIGHTED, 2, ("backward", "step")),
    *_flush(WEIGHTED),
    *_every(LOOP, 1, ("step",)),
    *_every(LOOP, 2, ALL),
    *_load(LOOP),
    *_every(LOOP_WEIGHTED, 2, ("backward", "step")),
    *_every(LINKED, 1, ("step",)),
    *_every(LINKED, 2, ALL),
    *_load(LINKED),
    *_every(ADAFACTOR, 1, ("step",)),
    *_every(ADAFACTOR, 2, ("backward", "step", "zero_grad")),
    *_flush(ADAFACTOR),
    *_load(ADAFACTOR),
    *_converted(ADAFACTOR, torch.float32),
    *_every(MUON, 2, ("step",)),
    *_every(MUON_LOOP, 1, ("step",)),
    *_every(MUON_LOOP, 2, ("step", "zero_grad")),
    *_load(MUON_LOOP),
]
assert len({s.name for s in SCENARIOS}) == len(SCENARIOS)
