"""What a backend does, and what the table-driven ones (Triton, compiled C) share.

An update is `finalize` (norm, skip flag, step counts, scalars) and then one `step` for each
`StepBatch`: the tensors that share rule, parameter dtype and master layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import ScalarsRow, StepRow
from ..rules.rule import Family, Rule
from .tables import LaunchTable, Mirror, TableCache, addresses

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class StepBatch:
    """Tensors of one update that take one launch.

    Attributes:
        rule: what is done to each element.
        master: "none", "split" (masters are int16 remainders), "fp32", or "stochastic" (none, and
            the parameter is rounded at random).
        params, masters, accs: one tensor each; masters is empty where there are none.
        keys: each tensor's random key, for "stochastic" (`rounding.tensor_key`).
        states: for each tensor its states, fp32, in the rule's order.
        rows: each tensor's row in `UpdateScalars.steps` and `.scalars`.
        groups: each tensor's row in `UpdateScalars.hyper`.
    """

    rule: Rule
    master: str
    params: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    accs: list[Tensor] = field(default_factory=list)
    states: list[tuple[Tensor, ...]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


class UpdateScalars:
    """The numbers of an update, on the device.

    Attributes:
        steps: fp32 [n_tensors], updates so far.
        scalars: fp32 [n_tensors, OWN + n_scalars]: gradient coefficient, step count, then the
            rule's scalars.
        memory: fp32 [n_tensors, n_memory], what the rules keep per tensor.
        norm: fp32 [], the last update's norm before clipping.
        skip: int32 [1], whether the last update was skipped.
        skipped: int64 [], how many were.
        hyper, tensors: the tables that `finalize` reads: hyper-parameters per group, and (row,
            group) per tensor of the update.
    """

    def __init__(
        self, n_tensors: int, n_scalars: int, device: torch.device, n_memory: int = 0
    ) -> None:
        self.steps = torch.zeros(n_tensors, dtype=torch.float32, device=device)
        self.scalars = torch.zeros(
            n_tensors, ScalarsRow.OWN + n_scalars, dtype=torch.float32, device=device
        )
        self.memory = torch.zeros(n_tensors, n_memory, dtype=torch.float32, device=device)
        self.norm = torch.zeros((), dtype=torch.float32, device=device)
        self.skip = torch.zeros(1, dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.hyper = Mirror(device)
        self.tensors = Mirror(device)


@dataclass
class UpdateRequest:
    """What `finalize` is asked for.

    Attributes:
        family: whose scalars function runs.
        hyper: a row per param group: sign of the gradient, then the family's hyper-parameters,
            each a number or a tensor.
        partials: fp32 sums of squares of all accumulators of the update, or None for no norm.
        correction: factor on the accumulated sum (normalisation), maybe a 0-d tensor.
        max_norm: clip to it, or None.
        skip_nonfinite: whether a non-finite norm leaves everything as it was.
    """

    family: Family
    hyper: list[tuple[Any, ...]]
    partials: Tensor | None
    correction: float | Tensor
    max_norm: float | None
    skip_nonfinite: bool


class Backend(Protocol):
    """The operations. Tensors are on the backend's device; accumulators and states are fp32."""

    name: str

    def accumulate(
        self,
        accs: Sequence[Tensor],
        grads: Sequence[Tensor],
        scale: float,
        first: bool,
        partials: Tensor | None = None,
        cells: Sequence[int] | None = None,
        control: Tensor | None = None,
    ) -> None:
        """`acc = (0 if first else acc) + scale * grad` for each pair, in place.

        With `partials`, tensor i's sums of squares go to `partials[cells[i]:]`, one per chunk.
        With `control`, fp32 [2] on the device, `scale` is multiplied by `control[0]`, and a
        `control[1]` of 0 means `first`.
        """

    def sum_of_squares(
        self, tensors: Sequence[Tensor], partials: Tensor, cells: Sequence[int]
    ) -> None:
        """Sums of squares of `tensors`, one per chunk, to the cells of `partials`."""

    def finalize(
        self, request: UpdateRequest, batches: Sequence[StepBatch], scalars: UpdateScalars
    ) -> None:
        """Norm, skip flag, step counts and the rules' scalars, into `scalars`."""

    def step(self, batch: StepBatch, scalars: UpdateScalars) -> None:
        """Apply the rule to each tensor of `batch`, in place, unless the skip flag is set."""


class TableBackend:
    """`accumulate`, `sum_of_squares` and `step` by launch tables; subclasses launch.

    The columns are those of the rows of `kernels/layout.py`, in its order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables = TableCache()

    def accumulate(
        self,
        accs: Sequence[Tensor],
        grads: Sequence[Tensor],
        scale: float,
        first: bool,
        partials: Tensor | None = None,
        cells: Sequence[int] | None = None,
        control: Tensor | None = None,
    ) -> None:
        cells = cells or [0] * len(accs)
        for dtype, members in _by_dtype(grads).items():
            numels = [accs[i].numel() for i in members]
            own_cells = [cells[i] for i in members]
            acc_addresses = addresses([accs[i] for i in members])
            grad_addresses = addresses([grads[i] for i in members])
            rows = np.stack([grad_addresses, acc_addresses, numels, own_cells], axis=1)
            # The accumulators are part of the key, so that two buckets of equal shapes, such as two
            # layers of a model, keep a table each and neither is uploaded again.
            key = ("accumulate", dtype, acc_addresses.tobytes(), tuple(numels), tuple(own_cells))
            table = self._tables.get(key, rows, numels, (0, 1), self.device)
            if table.n_chunks:
                self._launch_accumulate(table, dtype, scale, first, partials, control)

    def sum_of_squares(
        self, tensors: Sequence[Tensor], partials: Tensor, cells: Sequence[int]
    ) -> None:
        for dtype, members in _by_dtype(tensors).items():
            numels = [tensors[i].numel() for i in members]
            own_cells = [cells[i] for i in members]
            rows = np.stack([addresses([tensors[i] for i in members]), numels, own_cells], axis=1)
            key = ("sum_of_squares", dtype, tuple(numels), tuple(own_cells))
            table = self._tables.get(key, rows, numels, (0,), self.device)
            if table.n_chunks:
                self._launch_sum_of_squares(table, dtype, partials)

    def step(self, batch: StepBatch, scalars: UpdateScalars) -> None:
        numels = [acc.numel() for acc in batch.accs]
        dtype = batch.params[0].dtype
        keys: Any = batch.keys or [0] * len(numels)
        masters = addresses(batch.masters) if batch.masters else keys
        accs = addresses(batch.accs)
        columns: list[Any] = [addresses(batch.params), masters, accs, numels, batch.rows]
        columns += [addresses(states) for states in zip(*batch.states, strict=True)]
        address_columns = [
            StepRow.PARAM, StepRow.MASTER, StepRow.ACC, *range(StepRow.STATES, len(columns))
        ]  # fmt: skip
        if batch.keys:
            address_columns.remove(StepRow.MASTER)
        key = ("step", batch.rule.name, dtype, batch.master, accs.tobytes(), tuple(numels))
        table = self._tables.get(
            key, np.stack(columns, axis=1), numels, address_columns, self.device
        )
        if table.n_chunks:
            self._launch_step(table, batch, dtype, scalars)

    def _launch_accumulate(
        self,
        table: LaunchTable,
        dtype: torch.dtype,
        scale: float,
        first: bool,
        partials: Tensor | None,
        control: Tensor | None,
    ) -> None:
        raise AssertionError("a subclass launches")

    def _launch_sum_of_squares(
        self, table: LaunchTable, dtype: torch.dtype, partials: Tensor
    ) -> None:
        raise AssertionError("a subclass launches")

    def _launch_step(
        self, table: LaunchTable, batch: StepBatch, dtype: torch.dtype, scalars: UpdateScalars
    ) -> None:
        raise AssertionError("a subclass launches")


def _by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """Indices of `tensors` by dtype; nearly always one dtype."""
    members: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        members[tensor.dtype].append(index)
    return members
