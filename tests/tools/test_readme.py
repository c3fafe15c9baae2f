"""README and docs: tables as the rows and the code give them, code that runs, links that lead
somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fusedaccum
from tests import readme_tables
from tests.readme_tables import PAGES, ROOT, TABLES, least_is_bold, names, pick, remade


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
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
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert remade(text, ["optimizers"]) == text
    assert "| torch.optim | `Adadelta`" in text


def test_every_table_is_shown() -> None:
    shown = [name for path in PAGES for name in names(path.read_text(encoding="utf-8"))]
    assert set(shown) == set(TABLES)


def test_a_changed_digit_is_found() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
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


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


def test_the_program_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("README.md")
    exec(compile(program, "README.md", "exec"), {})
    assert "fused rule 'adam'; 2 tensors, 65 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("block", range(5))
def test_the_loops_of_the_page_run(block: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    names = {
        "torch": torch,
        "fusedaccum": fusedaccum,
        "model": net,
        "loader": [(torch.randn(2, 4), torch.randn(2, 1)) for _ in range(20)],
    }
    code = blocks("docs/loops.md")
    assert len(code) == 5

    class Model(torch.nn.Module):
        """Returns its loss, as the page has it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(x).float(), y)

    names["model"] = Model()
    before = net.weight.detach().clone()
    if block in (2, 3):  # they go on from the first
        exec(code[0].split("scheduler")[0], names)
    exec(code[block].replace('"cuda"', '"cpu"'), names)
    assert not torch.equal(before, net.weight)


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    missing = []
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not link.startswith("http") and not (page.parent / link).exists():
                missing.append(f"{page.relative_to(ROOT)}: {link}")
        for name in re.findall(r"`((?:docs|examples)/\w+\.(?:md|py))`", page.read_text("utf-8")):
            if not (ROOT / name).exists():
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert missing == []
