"""Optimizers that update inside the backward, beside those of test_third_party.py, are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer


@pytest.mark.parametrize("name", ["Lomo", "AdaLomo"])
def test_lomo_optim_is_refused_before_its_first_backward(name: str) -> None:
    """It updates in hooks, so that weights had moved when the backward raised.

    It is made on a GPU only; what is refused is the class.
    """
    kind: Any = type(name, (torch.optim.SGD,), {"__module__": "lomo_optim.lomo"})
    with pytest.raises(ValueError, match="inside the backward"):
        FusedAccumOptimizer(kind([torch.nn.Parameter(torch.ones(3))]))


def test_the_trainers_layerwise_optimizers_are_not_told_to_go_around_the_wrapper() -> None:
    """`optim="galore_adamw_layerwise"` and such: an optimizer for each parameter, in its hook."""
    kind = pytest.importorskip("transformers.trainer_pt_utils").LayerWiseDummyOptimizer
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = kind(optimizer_dict={param: torch.optim.AdamW([param])})
    with pytest.raises(ValueError, match="inside the backward") as caught:
        FusedAccumOptimizer(optimizer)
    assert "around" not in str(caught.value)
