"""Which backwards are running: by autograd's graph tasks, with those that cannot come out right.

A backward is known by its graph task, so reentrant checkpoints and a parameter that arrives twice
come out right, and a backward that raised half-way is remembered.
"""

from __future__ import annotations

import sys
import threading

import torch

from . import compiling

# Reentrant backwards that run inside each other on one thread; torch takes a new thread beyond.
MAX_NESTED = 50


class Backwards:
    """The backwards of one optimizer's parameters.

    There is no lock that an exception could leave locked: a backward enters first, and then looks
    whether another thread is there too.

    Attributes:
        count: how many began in the open micro-batch; one inside another does not count.
        threads: by graph task, the thread of each backward that has not ended.
    """

    def __init__(self) -> None:
        self.count = 0
        self.threads: dict[int, int] = {}

    @property
    def is_any_open(self) -> bool:
        """Whether one has not ended: it is running, or it raised."""
        return bool(self.threads)

    def enter(self, task: int) -> bool:
        """A backward reaches its first parameter.

        Returns:
            Whether another one of this thread has not ended: it runs around this, or it raised.

        Raises:
            RuntimeError: where another thread's has not ended, saying how several threads can
                share an optimizer.
        """
        compiling.ready()
        thread = self.threads[task] = threading.get_ident()
        others = list(self.threads.values())
        if len(others) <= MAX_NESTED and any(other != thread for other in others):
            self.end(task)
            raise RuntimeError(
                "backward() was called while a backward() of another thread on the same "
                "parameters was still running, or after one that raised there; nothing of this "
                "one was accumulated. Let one thread at a time run backward() and step() of one "
                "FusedAccumOptimizer (a threading.Lock around both does that); after an exception "
                "call zero_grad()"
            )
        return len(others) > 1

    def begin(self, task: int) -> None:
        """What it brings will be accumulated."""
        self.threads[task] = threading.get_ident()
        if len(self.threads) == 1:
            self.count += 1

    def end(self, task: int) -> None:
        """A backward has reached all of its parameters, or was refused."""
        self.threads.pop(task, None)

    def forget(self) -> None:
        """Those that raised are over, too."""
        self.count = 0
        self.threads.clear()


def refuse_kind() -> None:
    """Raise in a backward whose gradients cannot be taken as they arrive.

    Raises:
        RuntimeError: naming the kind, and the way round.
    """
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    is_compiled = getattr(compiled, "in_compiled_autograd_region", None)
    if is_compiled is None and compiled is not None:  # a torch without that name
        is_compiled = torch._dynamo.config.compiled_autograd
    if is_compiled:
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
