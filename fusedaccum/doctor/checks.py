"""What the checks of `doctor` share: inputs with guards, comparisons, and tolerances.

u = 2**-24 is fp32's unit roundoff. An operation is given what is in memory, and the float64
reference is given the same, so that errors do not add up from one call to the next:

    accumulate  two roundings, one where the GPU contracts product and sum to FMA
    norm        a square is rounded at most 512 + 12 times: a lane sums at most 512 of a chunk's
                8,192 (sixteen lanes), a tree of at most 4,096 lanes is 12 deep
    step        fewer than 16 roundings on any path from an input to an output, relative to
                |before| + |after| + |change|; and what 4 of them make of each input (gradient times
                coefficient, decay), where terms cancel
    rounding    to bf16 or fp16 is monotone, also at random for given random bits: what is stored
                lies between the rounded ends of the allowed interval
    scalars     float64 rounded to fp32 once; twice that for exp and log
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..kernels.layout import CHUNK

U = 2.0**-24
TINY = 2.0**-126  # below it roundings are absolute
ACCUMULATE_ROUNDINGS = 2
SUM_ROUNDINGS = 512 + 12 + 1
STEP_ROUNDINGS = 16
INPUT_ROUNDINGS = 4
SCALAR_ROUNDINGS = 2

# Nothing, one, around the blocks of the step (1,024), the accumulation (2,048) and a chunk, and a
# prime of several chunks: enough in all that a CPU takes more than one thread.
SIZES = (0, 1, 1023, 1024, 1025, 2047, 2048, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 40_009)
# Elements before and after each tensor that nothing may write, and what stands there.
MARGIN, MARK = 16, 77


class Wrong(AssertionError):
    """A result that is not what it must be: by how much and where."""


@dataclass(frozen=True)
class Check:
    """One operation in one variant.

    Attributes:
        name: for people.
        run: raises `Wrong`, or whatever the operation itself raises.
    """

    name: str
    run: Callable[[], object]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Runner:
    """A backend on all its threads, where all around it runs on one.

    The reference's operations are many and small: on a machine with other work to do a team of
    threads takes ten times as long for them as one does.
    """

    def __init__(self, backend: Backend, device: torch.device, n: int) -> None:
        self._backend, self._n = backend, n
        self.device = device

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        operation = getattr(self._backend, name)

        def run(request: Any) -> None:
            with threads(self._n):
                operation(request)

        return run


class Memory:
    """Tensors of one check, each between two margins that must stay as they are.

    Args:
        device: where they are.
        offset: elements from an aligned address to each tensor's start: 1 makes it unaligned.
    """

    def __init__(self, device: torch.device, offset: int = 0) -> None:
        self.device, self.offset = device, offset
        self._margins: list[tuple[str, Tensor]] = []

    def empty(self, n: int, dtype: torch.dtype = torch.float32, name: str = "tensor") -> Tensor:
        """A tensor of `n` elements."""
        start = MARGIN + self.offset
        memory = torch.full((start + n + MARGIN,), MARK, dtype=dtype, device=self.device)
        self._margins += [(name, memory[:start]), (name, memory[start + n :])]
        return memory[start : start + n]

    def holding(self, values: Tensor, dtype: torch.dtype, name: str = "tensor") -> Tensor:
        """A tensor with these values."""
        return self.empty(values.numel(), dtype, name).copy_(values)

    def check(self) -> None:
        """Raise if something was written beside a tensor."""
        sound = torch.stack([(margin == MARK).all() for _, margin in self._margins]).tolist()
        if not all(sound):
            name, _ = self._margins[sound.index(False)]
            raise Wrong(f"memory beside a {name} was overwritten")


def short(dtype: torch.dtype) -> str:
    """A dtype as people call it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def normal(n: int, seed: int) -> Tensor:
    """`n` normal numbers, the same on every machine; a new tensor."""
    return _normal(n, seed).clone()


@lru_cache(maxsize=512)
def _normal(n: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(10_000 * seed + n % 9_973)
    return torch.randn(n, generator=generator, dtype=torch.float32, device="cpu")


def host(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU."""
    return tensor.detach().cpu().double()


def require_between(what: str, got: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise unless low <= got <= high for every element; NaN never is."""
    wrong = ~((low <= got) & (got <= high))
    if not bool(wrong.any()):
        return
    got, low, high, wrong = (t.flatten() for t in (got, low, high, wrong))
    middle, allowed = (low + high) / 2, (high - low) / 2
    errors = (got - middle).abs().nan_to_num(nan=torch.inf).where(wrong, 0.0)
    i = int(errors.argmax())
    raise Wrong(
        f"{what} of {got.numel():,} elements, element {i}: {got[i]:.9g} where {middle[i]:.9g} is "
        f"right, off by {errors[i]:.1e} (allowed {allowed[i]:.1e}); {int(wrong.sum()):,} elements "
        "are wrong"
    )


def require_close(what: str, got: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Raise unless every element of `got` is within `allowed` of `expected` (all float64)."""
    require_between(what, got, expected - allowed, expected + allowed)


def require_same(what: str, got: Tensor, expected: Tensor) -> None:
    """Raise unless two tensors are equal to the bit."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    got, expected = (t.detach().cpu().flatten() for t in (got, expected))
    wrong = got.view(integers) != expected.view(integers)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise Wrong(
            f"{what} of {got.numel():,} elements, element {i}: {got[i]:.9g} where exactly "
            f"{expected[i]:.9g} is right; {int(wrong.sum()):,} elements are wrong"
        )


def require_number(what: str, got: float, expected: float, relative: float) -> None:
    """Raise unless a number is within a relative error; NaN and Inf only where they are right."""
    same = got == expected or (got != got and expected != expected)
    if not same and not abs(got - expected) <= relative * abs(expected):
        raise Wrong(f"{what} is {got:.9g}, {expected:.9g} is right (within {relative:.1e} of it)")
