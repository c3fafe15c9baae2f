"""The numbers of an update that are not a parameter's elements, on the device."""

from __future__ import annotations

import torch

from ..kernels.layout import ScalarsRow
from .mirror import Mirror


class UpdateScalars:
    """The numbers of an update, on the device.

    Attributes:
        steps: fp32 [n_tensors], updates so far.
        scalars: fp32 [n_tensors, ScalarsRow.OWN + n_scalars]: gradient coefficient, step count,
            then the rule's scalars.
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
        n_columns = ScalarsRow.OWN + n_scalars
        self.scalars = torch.zeros(n_tensors, n_columns, dtype=torch.float32, device=device)
        self.memory = torch.zeros(n_tensors, n_memory, dtype=torch.float32, device=device)
        self.norm = torch.zeros((), dtype=torch.float32, device=device)
        self.skip = torch.zeros(1, dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.hyper = Mirror(device)
        self.tensors = Mirror(device)
