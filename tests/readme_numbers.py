"""Hold the tables of a README against the benchmark rows that it names.

A table's rows come from the JSON files that the text before it names, or, where that names none,
the files named before in the section. A cell's label, its column and the paragraph before say in
words which rows are meant (`WORDS`); its numbers must each equal one of their values (`COLUMNS`),
or the ratio of their time to that of one of ours in the same group, at the precision printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Test = Callable[[Row], bool]

COLUMNS = (
    *("p50_ms", "ratio", "grad_error", "tax_p50", "tokens_per_s"),
    *("rest_per_parameter", "peak_per_parameter"),
)
PERCENT = ("copy_share",)
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
OURS = ("fused_backend", "fused_functional")
# Words for variants, each before those it contains; a variant's own name in backticks comes first.
WORDS: list[tuple[str, tuple[str, ...]]] = [
    (r"hooks|wrapper", ("fused_hooks",)),
    (r"best native", ("best",)),
    (r"foreach_add", ("foreach_add",)),
    (r"grad_dtype", ("native_fp32",)),
    (r"plain bf16", ("plain_bf16",)),
    (r"torch\.compile", ("compiled",)),
    (r"\bours\b|fusedaccum", OURS),
]
OPERATIONS: list[tuple[str, str]] = [
    (r"whole window", "window"),
    (r"training|tax", "train_window"),
    (r"last micro-batch", "accumulate_last_norm"),
    (r"first micro-batch", "accumulate_first"),
    (r"later micro-batch|accumulate", "accumulate"),
    (r"AdamW", "step"),
    (r"\bnorm\b", "norm"),
]
SHAPES = [("GPT-2", "gpt2_small"), ("LoRA", "lora_500"), ("64 Mi", "flat_64mi")]
SHAPES += [(r"1\.1 B", "llama_1b"), (r"\b8 B", "llama_8b_slice"), (r"\b11 M\b", "llama_11m")]
# Forms that have these in common have one row.
NATIVE = {"native_fp32", "per_tensor_add", "foreach_add", "cast_add", "blocked_add"}
SHARED = {
    "norm": {**dict.fromkeys(NATIVE, "get_total_norm"), "fused_backend": "fused_functional"},
    "step": dict.fromkeys(NATIVE, "native_fp32"),
}


@dataclass(frozen=True)
class Claim:
    """A number in a table, and what stands around it."""

    number: str
    label: str
    column: str
    text: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f'{self.number} in row "{self.label}", column "{self.column}"'


def section(markdown: str, heading: str) -> str:
    """The text under `## heading`."""
    _, _, rest = markdown.partition(f"\n## {heading}\n")
    assert rest, f'no section "## {heading}"'
    return rest.split("\n## ")[0]


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]


def _part(words: str, index: int, count: int) -> str | None:
    """The index-th of "a, b / c", if those are `count`."""
    parts = re.split(r"[,/]", words)
    return parts[index] if len(parts) == count else None


def claims(text: str) -> Iterator[Claim]:
    """Every number in the tables of a section."""
    named: list[str] = []
    for block in re.finditer(r"((?:(?!\|).*\n)*)((?:\|.*(?:\n|$))+)", text):
        before, table = block[1], block[2].splitlines()
        files = re.findall(r"[\w./-]+\.json", before)
        named += files
        header = _cells(table[0])
        paragraph = before.strip().split("\n\n")[-1]
        for line in table[2:]:
            label, *cells = _cells(line)
            for error in re.findall(r"\d(?:\.\d+)?e-\d+", label):
                yield Claim(error, label, "", paragraph, tuple(files or named))
            for column, cell in zip(header[1:], cells, strict=True):
                numbers = re.findall(rf"(?<![\w.]){NUMBER}", cell)
                for index, number in enumerate(numbers):
                    own_label, own_column = label, column
                    if len(numbers) > 1 and (part := _part(column, index, len(numbers))):
                        own_column = part + (" beside" if "beside" in column else "")
                    elif len(numbers) > 1 and (part := _part(label, index, len(numbers))):
                        own_label = part
                    yield Claim(number, own_label, own_column, paragraph, tuple(files or named))


def read(results: Path, name: str) -> list[Row]:
    """The rows of a file, which is named with as many folders as make it the only one.

    Raises:
        ValueError: if there is none, or several.
    """
    found = [p for p in results.rglob("*.json") if f"/{p.as_posix()}".endswith(f"/{name}")]
    if len(found) != 1:
        raise ValueError(f"{name}: {len(found)} files of that name under {results.name}/")
    rows: list[Row] = json.loads(found[0].read_text("utf-8"))
    return [row | {"group": (name, row["group"])} for row in rows]


def _first(words: list[tuple[str, Any]], *texts: str) -> Any:
    """What the first pattern found in the first of these texts stands for."""
    for text in texts:
        for pattern, meaning in words:
            if re.search(pattern, text):
                return meaning
    return None


def meant(claim: Claim, rows: list[Row]) -> list[Row]:
    """The rows that a claim is about."""
    label, text = claim.label, claim.text
    # "of fusedaccum" names what a ratio is of, and not whose it is.
    column = "" if claim.column.startswith("of ") else claim.column
    operation = _first(OPERATIONS[:2], text) or _first(OPERATIONS, label, column, text)
    shape = _first(SHAPES, label, column, text)
    n = re.search(r"N = (\d+)", " ".join((label, column, text)))
    dtypes = re.search(r"AdamW, (bf16|fp32)", label)
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[dtypes[1]] if dtypes else None
    names = {row["variant"] for row in rows}
    variants = [v for v in names if re.search(rf"`{v}`|^{v}\b", column)]
    variants = variants or [v for v in names if re.search(rf"`{v}`|^{v}\b", label)]
    variants = variants or _first(WORDS, column, label) or ()
    if operation in SHARED:
        variants = [SHARED[operation].get(name, name) for name in variants]
    tests: list[Test] = [
        lambda row: operation in (None, row["operation"]),
        lambda row: shape in (None, row["shape"]),
        lambda row: not n or row["n"] == int(n[1]),
        lambda row: dtype in (None, row["dtype"]),
    ]
    found = [row for row in rows if all(test(row) for test in tests)]
    members: dict[Any, list[Row]] = {}
    for row in found:
        members.setdefault(row["group"], []).append(row)
    if "beside" in label + column:
        members = {k: g for k, g in members.items() if any(r["variant"] == "compiled" for r in g)}
    chosen = []
    for group in members.values():
        exact = [r for r in group if r["variant"] in NATIVE or r["variant"] == "get_total_norm"]
        if "best" in variants and exact:
            chosen.append(min(exact, key=lambda row: row["p50_ms"]))
        chosen += [row for row in group if row["variant"] in variants]
    return chosen


def values(chosen: list[Row], rows: list[Row]) -> dict[str, float]:
    """Every value that may be printed for these rows, by where it comes from."""
    found = {}
    for row in chosen:
        file, group = row["group"]
        place = f"{row['variant']}, {row['operation']}, {row['shape']}, group {group} of {file}"
        for name in COLUMNS:
            if row.get(name) is not None:
                found[f"{name} of {place}"] = float(row[name])
        for name in PERCENT:
            if row.get(name) is not None:
                found[f"{name} in % of {place}"] = 100 * row[name]
        for other in rows:
            if other["group"] == row["group"] and other["variant"].startswith("fused_"):
                key = f"{place}, over {other['variant']}"
                found[key] = row["p50_ms"] / other["p50_ms"]
    return found


def agrees(number: str, value: float) -> bool:
    """Whether a value is printed as `number`, give or take which way a tie is rounded."""
    digits, _, exponent = number.replace(",", "").partition("e")
    _, _, decimals = digits.partition(".")
    unit = 10.0 ** (int(exponent or 0) - len(decimals))
    return abs(value - float(number.replace(",", ""))) <= unit / 2 * (1 + 1e-9)


def wrong(markdown: str, heading: str, results: Path) -> list[str]:
    """What does not agree, in words."""
    found = []
    cache: dict[str, list[Row]] = {}
    for claim in claims(section(markdown, heading)):
        if not claim.files:
            found.append(f"{claim}: the text before the table names no .json file")
            continue
        for name in claim.files:
            if name not in cache:
                cache[name] = read(results, name)
        rows = [row for name in claim.files for row in cache[name]]
        chosen = meant(claim, rows)
        known = values(chosen, rows)
        if not chosen:
            found.append(
                f"{claim}: no row of {', '.join(claim.files)} is meant by these words; name the "
                "variant in backticks, or teach tests/readme_numbers.py the words"
            )
        elif not any(agrees(claim.number, value) for value in known.values()):
            number = float(claim.number.replace(",", ""))
            near = sorted(known, key=lambda key: abs(known[key] - number))
            closest = "; ".join(f"{known[key]:.5g} ({key})" for key in near[:3])
            found.append(f"{claim}: no row says so; closest: {closest}")
    return found
