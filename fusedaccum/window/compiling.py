"""What torch.compile does not see while it traces: fp32 gradients of bf16 and fp16 parameters.

Dynamo refuses such a parameter ("dtype mismatch between tensor and its gradient"), so that the
graph of a model that is compiled in the middle of a window, for a new length of its input, say,
would break at each of its layers. While it traces, those parameters show no gradient. It looks at
gradients of parameters for nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor

from ..backends import untraced


class Owner(Protocol):
    """What is asked of those who have parameters."""

    @property
    def slots(self) -> Mapping[Tensor, Any]:
        """By parameter."""


_owners: WeakSet[Any] = WeakSet()
_hidden: list[tuple[Tensor, Tensor]] = []


def watch(owner: Owner) -> None:
    """Whose gradients those are."""
    _owners.add(owner)
    ready()


def ready() -> None:
    """Gradients are looked at or come: show them, and hide them from traces to come.

    torch._dynamo.reset() forgets whom it told, so this is said again at each backward. A compiler
    that nobody has imported traces nothing.
    """
    show()
    handler = getattr(sys.modules.get("torch._dynamo"), "callback_handler", None)
    if handler is not None and _hide not in handler.start_callbacks:
        untraced.tell()
        handler.register_start_callback(_hide)
        handler.register_end_callback(show)


def _hide(started: object = None) -> None:
    for owner in list(_owners):
        for param in owner.slots:
            grad = param.grad
            if grad is not None and grad.dtype is not param.dtype:
                _hidden.append((param, grad))
                param.grad = None


def show(ended: object = None) -> None:
    """Give back what is hidden, but to a parameter that has got another gradient."""
    while _hidden:
        param, grad = _hidden.pop()
        if param.grad is None:
            param.grad = grad
