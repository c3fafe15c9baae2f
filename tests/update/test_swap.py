"""Parameters are exchanged and put back whatever interrupts that, and keep their states."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fusedaccum.update import swap
from tests.traps import AtLine


def exchange(line: int) -> bool:
    """Interrupt at the `line`-th line; whether there was one. All is as before then."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.5)
    for param in params[:2]:
        optimizer.state[param]["momentum_buffer"] = torch.ones(2)
    before: dict[Any, Any] = dict(optimizer.state)
    stand_ins = {param: torch.zeros(2) for param in params[1:]}
    exchanges = swap.Swap(optimizer)
    trap = AtLine(line, KeyboardInterrupt, [str(swap.__file__)])
    # A Run is what other traps need.
    with trap.set(None), exchanges.of(stand_ins, with_states=True):  # type: ignore[arg-type]
        pass
    exchanges.undo()
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, params))
    assert optimizer.state.keys() == before.keys()
    assert all(optimizer.state[param] is state for param, state in before.items())
    return trap.fired


def test_states_stay_where_an_exchange_is_interrupted() -> None:
    lines = next(k for k in itertools.count() if not exchange(k))
    assert lines > 20
