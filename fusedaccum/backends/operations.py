"""What a backend does: its operations, and the request that each one takes.

An update is one `Finalize` (norm, skip flag, step counts, scalars) and then its `Step`s: one for
all tensors that share rule, parameter dtype and `Keep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..rules.rule import Family, Rule
from .devices import with_float64
from .keep import Keep
from .scalars import UpdateScalars

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch:
    """A launch that is made again and again: what a backend keeps of it.

    Attributes:
        table: its launch table, once there is one.
        found: the addresses in that which may change.
        tensors: whose they are, where these are the same every time.
    """

    __slots__ = ("found", "table", "tensors")

    def __init__(self) -> None:
        self.table: Any = None
        self.found: list[int] = []
        self.tensors: list[Tensor] = []


class Add(NamedTuple):
    """`acc = (0 if stores else acc) + scale * grad` for each pair, in place.

    Attributes:
        pairs: accumulators, each with its gradient.
        scale: a factor on the gradients.
        stores: whether nothing of what the accumulators hold is kept.
        sums: receives the sums of squares of the accumulators, fp32, one per chunk; or None.
        cells: where in `sums` those of each pair begin. A window gives them at every micro-batch,
            so that its launches share a table; None where there are never any sums.
        control: fp32 [2] on the device: `scale` is multiplied by `control[0]`, and a `control[1]`
            of 0 means `stores`; or None.
        launch: one for all requests of the same accumulators and cells, in the same order, whose
            gradients have the same dtype; None for one that need not come again.
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    scale: float
    stores: bool
    sums: Tensor | None = None
    cells: Sequence[int] | None = None
    control: Tensor | None = None
    launch: Launch | None = None


@dataclass(frozen=True, slots=True)
class SumOfSquares:
    """The sums of squares of tensors.

    Attributes:
        tensors: only read.
        sums: receives the sums, fp32, one per chunk.
        cells: where in `sums` those of each tensor begin.
    """

    tensors: Sequence[Tensor]
    sums: Tensor
    cells: Sequence[int]


class StepTensor(NamedTuple):
    """One parameter of an update, with all that its step reads and writes.

    Attributes:
        param: the parameter.
        acc: its accumulator, fp32, only read.
        states: the rule's states, fp32, in its order.
        row: its row in `UpdateScalars.steps`, `.scalars` and `.memory`.
        group: its row in `Finalize.hyper`.
        master: a remainder or an fp32 master, where `Keep` says that there is one.
        key: its random key, for `Keep.STOCHASTIC` (`rounding.tensor_key`).
    """

    param: Tensor
    acc: Tensor
    states: tuple[Tensor, ...]
    row: int
    group: int
    master: Tensor | None = None
    key: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One rule for all tensors of an update that share it, a dtype and a `Keep`.

    Attributes:
        rule: what is done to each element.
        keep: how the parameters keep their precise values.
        tensors: at least one.
        scalars: the numbers that the `Finalize` of the update has written.
        launch: one for all requests of the same tensors; None for one that need not come again.
    """

    rule: Rule
    keep: Keep
    tensors: list[StepTensor]
    scalars: UpdateScalars
    launch: Launch | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """What the accumulated sum is multiplied with to make it the gradient of the update.

    Attributes:
        factor: a number, or a 0-d tensor on the device.
        overflow: 0-d on the device, above 0 where a micro-batch overflowed, which makes the norm
            NaN and so has the update skipped; None where no GradScaler takes part.
    """

    factor: float | Tensor = 1.0
    overflow: Tensor | None = None

    def product(self) -> float | Tensor:
        """The factor, or NaN after an overflow. Nothing waits for the device."""
        if self.overflow is None:
            return self.factor
        overflow = with_float64(self.overflow)
        nan = torch.full((), torch.nan, dtype=torch.float64, device=overflow.device)
        return torch.where(overflow > 0, nan, self.factor)


@dataclass(frozen=True, slots=True)
class Finalize:
    """The norm, the skip flag, the step counts and the rules' scalars of an update.

    Attributes:
        steps: those of the update, at least one; their rules are of one family, and they share
            the `UpdateScalars` that are written.
        hyper: a row per param group: sign of the gradient, then the family's hyper-parameters,
            each a number or a tensor.
        correction: what makes the accumulated sum the gradient.
        sums: fp32 sums of squares of all accumulators of the update, or None for no norm.
        max_norm: clip to it, or None.
        skip_nonfinite: whether a non-finite norm leaves everything as it was.
        launch: of this request, which may be given again while its steps are the same.
    """

    steps: Sequence[Step]
    hyper: Sequence[tuple[Any, ...]]
    correction: Correction = Correction()
    sums: Tensor | None = None
    max_norm: float | None = None
    skip_nonfinite: bool = False
    launch: Launch = field(default_factory=Launch)

    @property
    def family(self) -> Family:
        """Whose scalars function runs."""
        return self.steps[0].rule.family

    @property
    def scalars(self) -> UpdateScalars:
        """What is written."""
        return self.steps[0].scalars

    def rows_and_groups(self) -> npt.NDArray[np.int32]:
        """[n_tensors, 2], of every tensor of the steps; kept by the launch."""
        if self.launch.table is None:
            pairs = [(t.row, t.group) for step in self.steps for t in step.tensors]
            self.launch.table = np.array(pairs, np.int32).reshape(-1, 2)
        found: npt.NDArray[np.int32] = self.launch.table
        return found


class Backend(Protocol):
    """The operations. Tensors are on the backend's device; accumulators and states are fp32."""

    name: str

    def accumulate(self, request: Add) -> None:
        """Add gradients into accumulators, in place."""

    def sum_of_squares(self, request: SumOfSquares) -> None:
        """Leave the sums of squares of tensors."""

    def finalize(self, request: Finalize) -> None:
        """Norm, skip flag, step counts and the rules' scalars, into `request.scalars`."""

    def step(self, request: Step) -> None:
        """Apply the rule to each tensor, in place, unless the skip flag is set."""
