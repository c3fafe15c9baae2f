"""A wrapper that was detached, or whose parameters another one has, does nothing more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.cases import small_model
from tests.tolerances import equal_bits

USES: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: opt.step(),
    "step-closure": lambda opt: opt.step(lambda: 1.0),
    "flush": lambda opt: opt.flush(),
    "clip": lambda opt: opt.clip_grad_norm_(1.0),
    "state_dict": lambda opt: opt.state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict(opt.optimizer.state_dict()),
    "add_param_group": lambda opt: opt.add_param_group(
        {"params": [torch.nn.Parameter(torch.ones(3))]}
    ),
}


def train(model: torch.nn.Module, opt: torch.optim.Optimizer, n: int) -> None:
    for i in range(n):
        x = torch.full((2, model[0].in_features), 0.1 * i, dtype=torch.bfloat16)  # type: ignore[index]
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("is_taken_over", [False, True], ids=["detached", "taken over"])
def test_what_is_gone_refuses(use: Callable[[Any], Any], is_taken_over: bool) -> None:
    """It attached itself to the parameters once more, and wrote beyond the end of its sums."""
    model = small_model(torch.bfloat16)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    old = FusedAccumOptimizer(inner, 2, max_grad_norm=1.0)
    train(model, old, 4)
    new: Any = FusedAccumOptimizer(inner, 2) if is_taken_over else old.detach()
    reason = "has taken them over" if is_taken_over else r"detach\(\) was called on this"
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=rf"{reason}.*nothing was done\. Use"):
        use(old)
    old.zero_grad()
    assert len(inner.param_groups) == 1
    assert "serves no parameters" in repr(old) or "taken them over" in repr(old)
    train(model, new, 4)
    after = list(model.parameters())
    assert not any(equal_bits(a, b.detach()) for a, b in zip(before, after, strict=True))


def test_what_is_detached_may_be_detached_again_and_wrapped() -> None:
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
    train(model, opt, 3)
    opt.flush()
    plain = opt.detach()
    model(torch.ones(2, model[0].in_features, dtype=torch.bfloat16)).sum().backward()
    assert opt.detach() is plain and all(p.grad is not None for p in model.parameters())
    plain.zero_grad()
    again = FusedAccumOptimizer(plain, 2)
    train(model, again, 4)
    assert opt.detach() is plain, "an old wrapper takes nothing from a new one"
    train(model, again, 2)
    assert float(again.state[model[0].weight]["step"]) == 5
