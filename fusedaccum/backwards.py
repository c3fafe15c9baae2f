"""Which backwards are running: by autograd's graph tasks, with those that cannot come out right.

A backward is known by its graph task, so reentrant checkpoints and a parameter that arrives twice
come out right, and a backward that raised half-way is remembered.
"""

from __future__ import annotations

import sys
import threading

import torch

# Reentrant backwards that run inside each other on one thread; torch takes a new thread beyond.
MAX_NESTED = 50


class Backwards:
    """The backwards of one optimizer's parameters.

    Attributes:
        count: how many began in the open micro-batch; one inside another does not count.
        beginning: a lock to hold from `refuse_overlap` to `begin`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.beginning = threading.Lock()
        # The thread of each graph task whose backward has not ended.
        self._threads: dict[int, int] = {}

    def __contains__(self, task: int) -> bool:
        return task in self._threads

    @property
    def is_any_open(self) -> bool:
        """Whether one has not ended: it is running, or it raised."""
        return bool(self._threads)

    def begin(self, task: int) -> None:
        """A backward has reached its first parameter."""
        if not self._threads:
            self.count += 1
        self._threads[task] = threading.get_ident()

    def end(self, task: int) -> None:
        """A backward has reached all of its parameters."""
        del self._threads[task]

    def forget(self) -> None:
        """Those that raised are over, too."""
        self.count = 0
        self._threads.clear()

    def refuse_overlap(self) -> None:
        """Raise where another thread's backward has not ended.

        Raises:
            RuntimeError: saying how several threads can share an optimizer.
        """
        thread, others = threading.get_ident(), self._threads.values()
        if len(others) < MAX_NESTED and any(other != thread for other in others):
            raise RuntimeError(
                "backward() was called while a backward() of another thread on the same "
                "parameters was still running, or after one that raised there; nothing of this "
                "one was accumulated. Let one thread at a time run backward() and step() of one "
                "FusedAccumOptimizer (a threading.Lock around both does that); after an exception "
                "call zero_grad()"
            )


def refuse_kind() -> None:
    """Raise in a backward whose gradients cannot be taken as they arrive.

    Raises:
        RuntimeError: naming the kind, and the way round.
    """
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if getattr(compiled, "in_compiled_autograd_region", False):
        raise RuntimeError(
            "compiled autograd makes one graph of the backward, in which no gradient can be "
            "taken as it arrives; it is not supported. Compile the model "
            "(torch.compile(model)) and leave torch._dynamo.config.compiled_autograd off"
        )
    if torch.is_grad_enabled():  # so it is in a backward that makes a graph, and in no other
        raise RuntimeError(
            "backward(create_graph=True) was called on parameters of a FusedAccumOptimizer, "
            "whose accumulated gradients have no graph; nothing was accumulated. For a gradient "
            "penalty, take the gradients that it needs by "
            "torch.autograd.grad(loss, inputs, create_graph=True), and call backward() without "
            "create_graph on the sum of loss and penalty"
        )
