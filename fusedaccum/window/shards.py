"""DTensors: tensors of which each process holds a shard, or a copy.

All that is computed here is computed on what this process holds, which is an ordinary tensor
(FSDP2 and tensor parallelism: each element where it lives). What people see (`p.grad`, states,
masters) is a DTensor around that memory, placed as the parameter is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.dlpack import from_dlpack

from ..backends.tensors import is_dtensor

if TYPE_CHECKING:  # it takes half a second, and whoever has DTensors has imported it
    from torch.distributed.tensor import DTensor


def shard_of(param: Tensor) -> Shard | None:
    """How `param` lies over the processes; None for an ordinary tensor."""
    return Shard(cast("DTensor", param)) if is_dtensor(type(param)) else None


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, Tensor) and is_dtensor(type(tensor))


def local_of(param: Tensor) -> Tensor:
    """What this process holds of a parameter: its memory."""
    shard = shard_of(param)
    return param if shard is None else shard.local(param)


class Shard:
    """How one parameter lies over a mesh of processes.

    Args:
        param: the parameter.

    Attributes:
        mesh, placements: of the parameter.
        groups: the process groups over which its elements are spread; the others hold copies.
        index: number of this process's shard.

    Raises:
        TypeError: for a parameter that is a sum still to be made (`Partial`).
    """

    def __init__(self, param: DTensor) -> None:
        self.mesh, self.placements = param.device_mesh, param.placements
        self._shape, self._stride = param.shape, param.stride()
        self.groups: list[ProcessGroup] = []
        self.index = 0
        for dim, placement in enumerate(self.placements):
            n = self.mesh.size(dim)
            if placement.is_replicate() or n == 1:
                continue
            if placement.is_partial():
                raise TypeError(
                    f"a parameter of shape {tuple(param.shape)} is a DTensor with placements "
                    f"{self.placements}; allowed: Shard and Replicate. Use redistribute()"
                )
            self.groups.append(self.mesh.get_group(dim))
            self.index = self.index * n + self.mesh.get_local_rank(dim)

    @torch.no_grad()
    def local(self, tensor: Tensor) -> Tensor:
        """What this process holds of a DTensor that is placed as the parameter; its memory."""
        return cast("DTensor", tensor).to_local()

    @torch.no_grad()
    def part(self, tensor: Tensor) -> Tensor:
        """What this process holds of any tensor of the parameter's shape.

        Of one that is placed otherwise, all processes of the mesh have to ask.
        """
        if is_dtensor(type(tensor)):
            return self.local(self.placed(tensor))
        if tensor.shape != self._shape:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, self.mesh, self.placements, src_data_rank=None).to_local()

    def placed(self, tensor: Tensor) -> Tensor:
        """A DTensor as one that is placed as the parameter: what is partial is summed."""
        given = cast("DTensor", tensor)
        if given.placements == self.placements and given.device_mesh == self.mesh:
            return given
        return given.redistribute(self.mesh, self.placements)

    @torch.no_grad()
    def whole(self, local: Tensor) -> Any:
        """The DTensor around what each process holds; the same memory."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            _alone(local),
            self.mesh,
            self.placements,
            run_check=False,
            shape=self._shape,
            stride=self._stride,
        )


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own, not as part of a flat buffer.

    torch pickles a DTensor as what it is only where its storage offset is 0.
    """
    n_bytes = tensor.numel() * tensor.element_size()
    if tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == n_bytes:
        return tensor
    alone = from_dlpack(tensor)
    return alone.as_strided(tensor.shape, tensor.stride())  # dlpack forgets strides of length 1
