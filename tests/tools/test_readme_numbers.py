"""Every number in the tables of the two READMEs is in a row of the benchmarks that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.readme_numbers import agrees, claims, section, wrong

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = [("README.md", "Numbers"), ("benchmarks/README.md", "CPU rows")]


@pytest.mark.parametrize(("file", "heading"), TABLES)
def test_every_number_is_in_a_row(file: str, heading: str) -> None:
    assert wrong((ROOT / file).read_text("utf-8"), heading, RESULTS) == []


@pytest.mark.parametrize(("file", "heading"), TABLES)
def test_a_changed_digit_is_found(file: str, heading: str) -> None:
    """The last digit of each number in turn, up by one: hardly any stays unseen."""
    markdown = (ROOT / file).read_text("utf-8")
    text = section(markdown, heading)
    numbers = list(claims(text))
    unseen = []
    for line in {line for line in text.splitlines() if line.startswith("|")}:
        label, cells = line.split("|", 2)[1:]
        for match in re.finditer(r"\d+\.\d+|\d{2,}", cells):
            digit = str((int(match[0][-1]) + 1) % 10)
            changed = cells[: match.end() - 1] + digit + cells[match.end() :]
            new = text.replace(line, f"|{label}|{changed}")
            if not wrong(f"\n## {heading}\n{new}", heading, RESULTS):
                unseen.append(f"{match[0]} in {line}")
    # A tenth: a ratio has two digits, and a cell may mean two rows.
    assert len(numbers) >= 10 and len(unseen) <= len(numbers) // 10, unseen


ROWS = [
    {"group": 1, "operation": "window", "variant": name, "shape": "gpt2_small", "n": 8,
     "dtype": "bfloat16", "p50_ms": ms, "ratio": ms / 10, "grad_error": 4e-3}
    for name, ms in [("fused_hooks", 40.0), ("foreach_add", 80.26), ("blocked_add", 60.0)]
]  # fmt: skip


def page(row: str, file: str = "a.json") -> str:
    return f"# x\n\n## Numbers\n\nA whole window on GPT-2, `{file}`:\n\n| | ms | of ours |\n|---|--:|--:|\n{row}\n\n## y\n"  # noqa: E501


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("| through hooks | 40 | 1 |", ""),
        ("| native: `foreach_add` | 80.3 | 2.01 |", ""),
        ("| best native | 60 | **1.50** |", ""),
        ("| best native | 80 | |", "80.26|60"),
        ("| through hooks | 41 | 1 |", "closest: 40"),
        ("| through hooks | 40 | 1.5 |", "closest: 1 "),
        ("| the other way | 40 | |", "no row of a.json is meant"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, row: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS), "utf-8")
    found = wrong(page(row), "Numbers", tmp_path)
    assert len(found) == bool(problem)
    assert not found or re.search(problem, found[0])


def test_a_file_must_be_there_and_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json: 0 files"):
        wrong(page("| hooks | 40 | |"), "Numbers", tmp_path)
    for device in ("one", "two"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "a.json").write_text(json.dumps(ROWS), "utf-8")
    with pytest.raises(ValueError, match=r"a\.json: 2 files"):
        wrong(page("| hooks | 40 | |"), "Numbers", tmp_path)
    assert wrong(page("| hooks | 40 | |", "one/a.json"), "Numbers", tmp_path) == []


@pytest.mark.parametrize(
    ("number", "value", "is_so"),
    [
        ("0.86", 0.8549, False), ("0.86", 0.855, True), ("394", 394.4, True), ("394", 394.6, False),
        ("4e-3", 0.0044, True), ("4e-3", 0.0046, False), ("9.1e-3", 0.00912, True),
        ("12,345", 12345.2, True),
    ],
)  # fmt: skip
def test_printed_precision(number: str, value: float, is_so: bool) -> None:
    assert agrees(number, value) is is_so
