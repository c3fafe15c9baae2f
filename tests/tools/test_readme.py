"""The READMEs' tables are those that the rows and the code give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import readme_tables
from tests.readme_tables import READMES, TABLES, least_is_bold, names, pick, remade


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_tables_are_up_to_date(path: Path) -> None:
    """Else `python -m tests.readme_tables --write`. The one of optimizers is tested below."""
    text = path.read_text(encoding="utf-8")
    assert names(text)
    assert remade(text, [name for name in names(text) if name != "optimizers"]) == text


def test_the_table_of_optimizers_is_the_codes() -> None:
    for module in ("lion_pytorch", "optimi", "torchao", "bitsandbytes", "flashoptim"):
        pytest.importorskip(module)
    pytest.importorskip("expecttest")
    pytest.importorskip("pytorch_optimizer")
    text = READMES[0].read_text(encoding="utf-8")
    assert remade(text, ["optimizers"]) == text
    assert "| torch.optim | `Adadelta`" in text


def test_every_table_is_shown() -> None:
    shown = [name for path in READMES for name in names(path.read_text(encoding="utf-8"))]
    assert set(shown) == set(TABLES)


def test_a_changed_digit_is_found() -> None:
    text = READMES[0].read_text(encoding="utf-8")
    changed = text.replace("through autograd hooks | 337 |", "through autograd hooks | 338 |")
    assert changed != text == remade(changed, ["windows in short"])


def test_a_cell_is_of_one_row() -> None:
    rows = [{"variant": "a", "n": 1}, {"variant": "a", "n": 8}]
    assert pick(rows, variant="a", n=8) is rows[1]
    for which in ({"variant": "a"}, {"variant": "b"}):
        with pytest.raises(LookupError, match="rows have"):
            pick(rows, **which)


def test_the_least_of_the_exact_ones_is_bold() -> None:
    assert least_is_bold([0.849, 0.851, None, 0.5], range(3), 2) == ["**0.85**", "0.85", "", "0.50"]
    assert least_is_bold([1.0, None], range(2), 2) == ["1.00", ""]
    assert readme_tables.table(["", "ms"], [["a", "1"]]) == "|  | ms |\n| --- | --: |\n| a | 1 |\n"
