"""Training loops as lists of operations, which a test can stop at, repeat, skip and resume.

A gradient is chosen by the number of its micro-batch, so that a float64 oracle needs no forward:
loss = sum(p * g).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer

N = 2  # micro-batches per window
SHAPES = ((5, 7), (6, 4), (3, 3))
WEIGHTS = (3.0, 5.0, 2.0)  # of weighted micro-batches, in turn
# An operation: its name, and what it is of.
Op = tuple[Any, ...]


@functools.cache
def _gradients(i: int) -> tuple[Tensor, ...]:
    """Whoever gets them only reads them."""
    generator = torch.Generator().manual_seed(i)
    return tuple(torch.randn(shape, generator=generator).bfloat16().float() for shape in SHAPES)


@dataclass(frozen=True)
class Kind:
    """An optimizer as it is wrapped."""

    name: str
    make: Callable[[Any], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    steps: int | None = N
    weighted: bool = False
    scaled: bool = False
    scale: float = 16.0  # of the GradScaler: a power of two, so that scaling rounds nothing
    options: dict[str, Any] = field(default_factory=dict)
    # How far one update may be from the float64 oracle's, as a share of the largest change.
    tolerance: float = 1e-4

    def weight(self, i: int) -> float:
        return WEIGHTS[i % len(WEIGHTS)] if self.weighted else 1.0

    def grads(self, i: int) -> list[Tensor]:
        """The gradients of micro-batch `i`, numbers that bf16 and fp16 have."""
        return list(_gradients(i))

    def params(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(99)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        return [torch.nn.Parameter(v.to(self.dtype)) for v in values]

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]

    def update(self, i: int) -> list[Op]:
        """A window of two micro-batches, from number `i` on, as a loop has it."""
        if self.steps is None:
            return [("backward", i), ("backward", i + 1), ("step",), ("zero_grad",)]
        ops: list[Op] = []
        for j in (i, i + 1):
            ops += [("backward", j), ("step",), *[("update",)] * self.scaled, ("zero_grad",)]
        return ops


class Run:
    """A model, its optimizer, and what was done to them."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.params = kind.params()
        inner = kind.make(kind.groups(self.params))
        self.scaler: Any = None
        if kind.scaled:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=kind.scale)
            self.scaler.scale(torch.zeros(()))  # it makes its scale, and refuses a step() without
        self.opt = FusedAccumOptimizer(inner, kind.steps, grad_scaler=self.scaler, **kind.options)

    def do(self, op: Op) -> None:
        getattr(self, op[0])(*op[1:])

    def all(self, ops: list[Op]) -> Run:
        for op in ops:
            self.do(op)
        return self

    # --- the operations ---

    def backward(self, i: int) -> None:
        pairs = zip(self.params, self.kind.grads(i), strict=True)
        loss = torch.stack([(p * g.to(p.dtype)).sum() for p, g in pairs]).sum()
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self.kind.weighted:
            with self.opt.micro_batch(weight=self.kind.weight(i)):
                loss.backward()
        else:
            loss.backward()

    def step(self) -> None:
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)

    def closure(self, i: int) -> None:
        def evaluate() -> None:
            self.in_closure("before its backward")
            self.backward(i)
            self.in_closure("after its backward")

        self.opt.step(evaluate)

    def in_closure(self, where: str) -> None:
        """Nothing, unless a test puts something here."""

    def update(self) -> None:
        self.scaler.update()

    def zero_grad(self) -> None:
        self.opt.zero_grad()

    def flush(self) -> None:
        self.opt.flush()

    def clip(self) -> None:
        self.opt.clip_grad_norm_(0.7)

    def save(self) -> None:
        self.opt.state_dict()

    def convert(self, dtype: torch.dtype) -> None:
        """The model's to()."""
        for param in self.params:
            param.data = param.data.to(dtype)
            param.grad = None

    def write(self, params: list[Tensor]) -> None:
        """The model's load_state_dict()."""
        if params[0].dtype is not self.params[0].dtype:
            self.convert(params[0].dtype)
        with torch.no_grad():
            for param, value in zip(self.params, params, strict=True):
                param.copy_(value)

    def load(self, state_dict: dict[str, Any]) -> None:
        self.opt.load_state_dict(copied(state_dict))

    # --- what a test reads ---

    def saved(self) -> dict[str, Any]:
        """All that a checkpoint has, copied."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        params = [p.detach() for p in self.params]
        found = {"params": params, "opt": self.opt.state_dict(), "scaler": scaler}
        return {name: copied(value) for name, value in found.items()}

    def resumed(self, saved: dict[str, Any]) -> Run:
        self.write(saved["params"])
        self.load(saved["opt"])
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        return self


def copied(value: Any) -> Any:
    """A deep copy. `copy.deepcopy` of a small tensor takes far longer than a clone."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return copy.deepcopy(value)


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two nested structures differ, to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype is not b.dtype or a.shape != b.shape or a.device != b.device:
            yield f"{path}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
            return
        bits = [t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (a, b)]
        if not torch.equal(*bits):
            n = int((bits[0] != bits[1]).any(1).sum())
            yield f"{path}: {n} of {a.numel()} numbers"
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                yield f"{path}.{key}: only in {'the first' if key in a else 'the second'}"
            else:
                yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}[{i}]")
    elif type(a) is not type(b) or a != b:
        yield f"{path}: {a!r}, {b!r}"


def _master(saved: dict[str, Any], i: int) -> Tensor | None:
    """The precise value of parameter `i`: beside its states, or where those are not there."""
    apart: dict[int, Tensor] = saved["opt"]["fusedaccum"]["masters"]
    master: Tensor | None = saved["opt"]["state"].get(i, {}).get("master_param", apart.get(i))
    return master


class Oracle:
    """The plain optimizer in float64, from a checkpoint of the wrapper between two windows."""

    def __init__(self, kind: Kind, saved: dict[str, Any]) -> None:
        self.kind = kind
        states = saved["opt"]["state"]
        self.params: list[Tensor] = []
        for i, stored in enumerate(saved["params"]):
            precise = _master(saved, i)
            value = stored if precise is None else precise
            if precise is not None and not torch.equal(precise.to(stored.dtype), stored):
                raise AssertionError(f"the master of parameter {i} is not what the parameter shows")
            self.params.append(torch.nn.Parameter(value.double()))
        self.plain = kind.make(kind.groups(self.params))
        self.before = [p.detach().clone() for p in self.params]
        for i, param in enumerate(self.params):
            own = {
                name: value
                for name, value in states.get(i, {}).items()
                if name != "master_param" and not name.startswith("window_")
            }
            for name, value in own.items():
                if isinstance(value, Tensor):
                    own[name] = value.double() if value.dim() else value.clone()
            if own:
                self.plain.state[param] = own

    def update(self, micro_batches: list[int]) -> None:
        """One update with the mean of these, or the sum where the loop owns the window."""
        kind = self.kind
        weights = [kind.weight(i) for i in micro_batches]
        total = sum(weights) if kind.steps is not None or kind.weighted else 1.0
        for j, param in enumerate(self.params):
            pairs = zip(weights, micro_batches, strict=True)
            param.grad = sum(w * kind.grads(i)[j].double() for w, i in pairs) / total  # type: ignore[assignment]
        max_norm = kind.options.get("max_grad_norm")
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.plain.step()

    def check(self, saved: dict[str, Any]) -> None:
        """Raise AssertionError if the wrapper's parameters are not what the update makes."""
        for i, (exact, before) in enumerate(zip(self.params, self.before, strict=True)):
            precise = _master(saved, i)
            stored = saved["params"][i]
            ours = (stored if precise is None else precise).double()
            change = float((exact - before).abs().max())
            assert change > 0, "the oracle itself does nothing"
            error = float((ours - exact).abs().max())
            # Beside the share of the change: what fp32 rounds of the parameter itself.
            allowed = self.kind.tolerance * change + 2**-23 * float(exact.abs().max())
            if precise is None and stored.dtype is not torch.float32:
                allowed += torch.finfo(stored.dtype).eps * float(exact.abs().max())
            if not error <= allowed:
                raise AssertionError(
                    f"parameter {i} changed by {change:.2e} in float64, and ours is off by "
                    f"{error:.2e}, where {allowed:.1e} is rounding"
                )
