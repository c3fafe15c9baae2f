"""What README says and the code can tell."""

from __future__ import annotations

import pytest


def test_the_table_of_optimizers_is_the_codes() -> None:
    """Written by `python -m tests.optimizer_table --write`."""
    for module in ("expecttest", "lion_pytorch", "optimi", "torchao", "bitsandbytes"):
        pytest.importorskip(module)
    pytest.importorskip("flashoptim")
    pytest.importorskip("pytorch_optimizer")
    from tests import optimizer_table

    text = optimizer_table.README.read_text(encoding="utf-8")
    _, table, _ = optimizer_table.in_readme(text)
    assert table == optimizer_table.table()
    assert "| torch.optim | `Adadelta`" in table
