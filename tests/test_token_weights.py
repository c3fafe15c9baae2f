"""Token weights: micro-batches of unequal length give the gradient of one big batch."""

from __future__ import annotations

import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import Gradients


def test_model_zero_grad_discards_the_weights_too() -> None:
    """Where the loop owns the window; the weights of what is gone would count on otherwise."""
    model = Gradients([torch.zeros(3), torch.zeros(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    for weight, value in ((100, 50.0), (10, 30.0), (2, 1.0), (6, 5.0)):
        if weight == 2:
            assert opt.micro_batches == 2
            model.zero_grad()
        with opt.micro_batch(weight=weight):
            model.backward([torch.full((3,), value), None])
    assert opt.micro_batches == 2
    opt.step()
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -4.0))


def test_a_micro_batch_without_a_gradient_keeps_its_weight() -> None:
    """Its gradient is zero: nothing was discarded."""
    model = Gradients([torch.zeros(3), torch.zeros(2)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    with opt.micro_batch(weight=3):
        pass
    with opt.micro_batch(weight=1):
        model.backward([torch.full((3,), 8.0), None])
    opt.step()
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), -2.0))
