"""A checkpoint that the first version of the format wrote still loads and trains on to the bit.

tests/data/checkpoint_v1.pt was written by commit f7e154e in the middle of a window of weighted
micro-batches; "later" are the parameters that commit reached seven micro-batches on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusedaccum import FusedAccumOptimizer

FILE = Path(__file__).resolve().parents[1] / "data" / "checkpoint_v1.pt"
MAKE = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, dampening=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


def batch(i: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randn(4, 5, generator=generator).bfloat16()


@pytest.mark.parametrize("name", MAKE)
def test_it_goes_on(name: str) -> None:
    saved = torch.load(FILE, weights_only=True)[name]
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).bfloat16()
    model.load_state_dict(saved["model"])
    opt = FusedAccumOptimizer(MAKE[name](model.parameters()), 3, max_grad_norm=1.0)
    opt.load_state_dict(saved["optimizer"])
    assert opt.micro_batches == 2
    for i in range(8, 15):
        with opt.micro_batch(weight=1 + i % 3):
            model(batch(i)).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved["later"][key]), key
        assert not torch.equal(value, saved["model"][key]), key
