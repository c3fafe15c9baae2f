"""`micro_batch()`: forward and backward of one micro-batch, with a weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from .collector import Collector

_OPEN = (
    "micro_batch() was entered while another micro-batch is open: call step() after "
    "each micro_batch() block (or, with gradient_accumulation_steps=None, run every "
    "backward() of the window inside such a block). After an exception call zero_grad()"
)


def block(
    ready: Callable[[], Collector], weigh: Callable[[], float]
) -> AbstractContextManager[None]:
    """See `FusedAccumOptimizer.micro_batch`.

    Args:
        ready: notices parameters that were added or changed, and gives the collector.
        weigh: gives the weight, or raises for one that is none.
    """
    own: list[weakref.ref[Iterator[None]]] = []
    made = _run(ready, weigh, own)
    # The window asks the generator itself whether it runs: of a flag that would be taken back at
    # the end, an interruption just there could leave it up.
    own.append(weakref.ref(made.gen))
    return made


@contextmanager
def _run(
    ready: Callable[[], Collector],
    weigh: Callable[[], float],
    own: list[weakref.ref[Iterator[None]]],
) -> Iterator[None]:
    value = weigh()
    collector = ready()
    window = collector.window
    collector.look()
    if window.weight is not None or collector.slots.has_arrivals:
        raise RuntimeError(_OPEN)
    try:
        window.weight, window.block = value, own[0]
        yield
        if window.steps is None:
            window.check_arrival()
            collector.close_micro_batch()
    except BaseException:
        collector.fail_block()
        window.weight = None
        raise
