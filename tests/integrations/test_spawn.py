"""A wrapper that is given to another process, as torch lets people give plain optimizers."""

from __future__ import annotations

import torch
from torch import nn

import fusedaccum


def update(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    for x in torch.arange(48.0).view(2, 3, 8):
        model(x.bfloat16()).float().sum().backward()
        opt.step()
        opt.zero_grad()


def test_a_process_that_spawn_starts_takes_the_wrapper_with_its_states() -> None:
    """torch shares the memory of what is pickled by its descriptor, which must still be open."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).bfloat16()
    twin = nn.Linear(8, 4).bfloat16()
    twin.load_state_dict(model.state_dict())
    pairs = [
        (m, fusedaccum.FusedAccumOptimizer(torch.optim.AdamW(m.parameters(), lr=0.1), 2))
        for m in (model, twin)
    ]
    for pair in pairs:
        update(*pair)
    process = torch.multiprocessing.get_context("spawn").Process(target=update, args=pairs[0])
    process.start()
    process.join()
    assert process.exitcode == 0
    update(*pairs[1])
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=0)  # its memory is shared
