"""What only Lightning Fabric has; what it shares is in test_framework_laws.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests import frameworks as fw
from tests.frameworks import own_state as own_state
from tests.same_runs import are_equal

fabric_module = pytest.importorskip("lightning.fabric")

pytestmark = pytest.mark.filterwarnings("ignore")
BF16 = torch.bfloat16


def trained(model: Any, n: int | None, precision: str, apart: bool) -> tuple[Any, Any]:
    """Windows of 4, by Fabric's loop or by the wrapper's count; the optimizer is made first."""
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
    optimizer = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), n)
    if apart:
        module = fabric.setup_module(model)
        given = fabric.setup_optimizers(optimizer)
    else:
        module, given = fabric.setup(model, optimizer)
    data = fw.sequences(24)
    for i in range(12):
        loss = module(**fw.collate(data[2 * i : 2 * i + 2])).loss
        fabric.backward(loss if n else loss / 4)
        if n or i % 4 == 3:
            given.step()
            given.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("apart", [False, True], ids=["setup", "setup-apart"])
@pytest.mark.parametrize("n", [None, 4], ids=["loop", "counted"])
def test_setup_converts_a_model_whose_optimizer_is_wrapped(n: int | None, apart: bool) -> None:
    """setup() moves the model to its device and dtype, and its loop steps before it zeroes."""
    converted, optimizer = trained(fw.tiny_llama(), n, "bf16-true", apart)
    direct, _ = trained(fw.tiny_llama(BF16), n, "bf16-true", apart)
    assert next(converted.parameters()).dtype == BF16
    assert "split master" in repr(optimizer)
    assert are_equal(converted, direct)
    assert not are_equal(converted, fw.tiny_llama(BF16))


def test_setup_with_a_dtype_that_cannot_be_served_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"has dtype torch\.float64; allowed: "):
        trained(fw.tiny_llama(), None, "64-true", apart=False)


def test_setup_inside_a_window_does_not_lose_it() -> None:
    """What has arrived for the parameters as they were is refused by step()."""
    model = fw.tiny_llama()
    optimizer = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    model(**fw.collate(fw.sequences(2))).loss.backward()
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    _, given = fabric.setup(model, optimizer)
    with pytest.raises(RuntimeError, match="parameters changed after they were wrapped"):
        given.step()
    given.zero_grad()
    assert "split master" in repr(optimizer)
