"""Private names of torch, which another version of torch may not have.

What every training step needs raises here, as the package is imported. A name that only
`fuse_linear_wgrad()` needs is None where it is missing, and `why_no_products` says so. Those of
torch.distributed's engines are asked for by `check`, before an engine is served.
"""

from __future__ import annotations

from typing import Any

import torch

_LACKING = (
    "fusedaccum needs {}, which is private to torch and is not in torch {}. Install a version of "
    "torch that has it (2.11 to 2.15 do), or a newer fusedaccum"
)


def found(name: str) -> Any:
    """What torch has under a dotted name, None where it has nothing."""
    place: Any = torch
    for part in name.split("."):
        place = getattr(place, part, None)
    return place


def needed(name: str) -> Any:
    """What torch has under a dotted name.

    Raises:
        ImportError: where it has nothing, naming the version of torch.
    """
    value = found(name)
    if value is None:
        raise ImportError(_LACKING.format(f"torch.{name}", torch.__version__))
    return value


def check(kind: str, owner: object, *names: str) -> None:
    """See that an object of torch has what is private to torch.

    Args:
        kind: what people call it.
        owner: the object.
        names: of its attributes, which may be ones that its class only declares.

    Raises:
        ValueError: naming the first that it has not, and the version of torch.
    """
    declared = getattr(type(owner), "__annotations__", {})
    for name in names:
        if not hasattr(owner, name) and name not in declared:
            raise ValueError(_LACKING.format(f"{kind}.{name}", torch.__version__))


# The number of the backward that is running in this thread: its graph task.
current_task = needed("_C._current_graph_task_id")
# Calls a function when that backward is over.
queue_callback = needed("autograd.Variable._execution_engine.queue_callback")

_OF_PRODUCTS = (
    "_C._will_engine_execute_node",
    "_C._functorch.peek_interpreter_stack",
    "_C._get_tracing_state",
)
# Of an AccumulateGrad node: False in autograd.grad() and backward(inputs=) of other tensors; raises
# RuntimeError in autograd.grad() of this one.
is_wanted, transform, tracing_state = map(found, _OF_PRODUCTS)


def why_no_products() -> str | None:
    """Why `fuse_linear_wgrad()` can fuse nothing with this torch; None where it can."""
    missing = [name for name in _OF_PRODUCTS if found(name) is None]
    return f"torch {torch.__version__} has no torch.{missing[0]}" if missing else None
