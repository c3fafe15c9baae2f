"""Which process updates which parameter, where each keeps the states of some only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Deal:
    """Deals parameters out to processes, whole ones, so that all have about as many elements.

    Every process deals the same parameters in the same order, and so comes to the same result.

    Args:
        rank: of this process in its group.
        world: how many processes there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._numels = [0] * world

    def owners(self, params: Sequence[Tensor]) -> list[int]:
        """The rank that each of these is given to: the largest first, to who has least."""
        found = [0] * len(params)
        for i in sorted(range(len(params)), key=lambda i: -params[i].numel()):
            owner = min(range(self.world), key=self._numels.__getitem__)
            self._numels[owner] += params[i].numel()
            found[i] = owner
        return found
