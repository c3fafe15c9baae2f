"""Other tensors in the place of an optimizer's parameters, for a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer


class Swap:
    """Exchanges parameters in an optimizer's `param_groups` and `state`.

    Putting them back can be repeated: whatever interrupts it (Ctrl-C), the next call ends it.

    Args:
        optimizer: whose groups and state are changed in place.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._originals: dict[Tensor, Tensor] = {}
        # What has states of its own from before; None once those that were added are complete.
        self._known: set[Tensor] | None = None

    @contextmanager
    def of(self, stand_ins: Mapping[Tensor, Tensor], with_states: bool) -> Iterator[None]:
        """Let each parameter's stand-in take its place; what it has as state comes back with it.

        States that an exception left half made are forgotten.

        Args:
            stand_ins: by parameter.
            with_states: whether the parameters' states go along; else the stand-ins have none.
        """
        known = set(self._optimizer.state)
        self._known = known.union(stand_ins.get(key, key) for key in known)
        self._originals = {stand_in: param for param, stand_in in stand_ins.items()}
        try:
            self._exchange(stand_ins, with_states)
            yield
            self._known = None
        finally:
            self.undo()

    def undo(self) -> None:
        """Put the parameters back, if that is not done."""
        if self._known is not None:
            for key in list(self._optimizer.state):
                if key not in self._known:
                    del self._optimizer.state[key]
            self._known = None
        if self._originals:
            self._exchange(self._originals, True)
            self._originals = {}

    def _exchange(self, others: Mapping[Tensor, Tensor], with_states: bool) -> None:
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            group["params"][:] = [others.get(p, p) for p in group["params"]]
        for tensor, other in others.items() if with_states else ():
            if tensor in state:
                state[other] = state[tensor]  # first there twice, so that it is never lost
                del state[tensor]
