"""Tables of rows, and what they say about the targets; wins and losses alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fusedaccum.bench import run as bench
from fusedaccum.bench.race import COPY
from fusedaccum.doctor.output import Column, column, print_rows

from .forms import is_exact
from .measure import Row

# Targets, per device and operation: (column, bound, whether smaller is better). `ratio` is in units
# of an fp32 copy, `copy_share` is of the copy's bandwidth, `speedup` over the best native form.
TARGETS = {
    "cpu": {"accumulate": ("ratio", 1.0, True), "window": ("speedup", 1.5, False)},
    "cuda": {
        "accumulate": ("copy_share", 0.95, False),
        "step": ("copy_share", 0.93, False),
        "window": ("speedup", 1.7, False),
    },
}
REDUCED: dict[str, Column] = bench.COLUMNS | {
    "before the end": lambda row: f"{row['early']} of {row['launched']}" if row["launched"] else "",
}
HOST: dict[str, Column] = {
    **{name: bench.COLUMNS[name] for name in ("", "p20", "p50", "p80 ms")},
    "us per tensor": column("us_per_tensor", ".2f"),
    "launches": column("launches"),
}
TRAINING: dict[str, Column] = {
    "": column("variant"),
    "p20": column("p20_ms", ".1f"),
    "p50": column("p50_ms", ".1f"),
    "p80 ms": column("p80_ms", ".1f"),
    "tokens/s": column("tokens_per_s", ",.0f"),
    "tax p20": column("tax_p20", ".2f"),
    "tax p50": column("tax_p50", ".2f"),
    "tax p80 %": column("tax_p80", ".2f"),
    "at rest": column("rest_per_parameter", ".2f"),
    "peak B/param": column("peak_per_parameter", ".1f"),
    "error": column("grad_error", ".0e"),
}


def show(rows: Sequence[Row]) -> None:
    """One group: of variants, or of training loops."""
    head = rows[0]
    if "us_per_tensor" in head:
        bench.show(rows, HOST)
        return
    if "tax_p50" not in head:
        bench.show(rows, REDUCED if "launched" in head else bench.COLUMNS)
        return
    what = f"{head['model']}, {head['n_elements']:,} parameters, {head['tokens']} tokens in "
    what += f"sequences of {head['length']}, N={head['n']}"
    print_rows(f"{what}, {head['samples']} samples, load {head['load']}", rows, TRAINING)


def judge(rows: Sequence[Row], device: str) -> list[str]:
    """What the rows say about the targets; wins and losses alike."""
    lines = []
    for _, members in groupby(rows, key=lambda row: row["group"]):
        group = {row["variant"]: row for row in members}
        if COPY not in group or "tax_p50" in group[COPY]:
            continue
        for name, (best, speedup) in bench.speedups([*group.values()], is_exact).items():
            row = group[name]
            text = (
                f"{row['operation']}, {row['shape']}, {row['dtype']}: {name} takes "
                f"{row['ratio']:.2f} x copy and is {speedup:.2f} x as fast as {best}"
            )
            if target := TARGETS[device].get(row["operation"]):
                column, bound, is_upper = target
                value = speedup if column == "speedup" else row[column]
                met = value <= bound if is_upper else value >= bound
                text += f": target {column} {'<=' if is_upper else '>='} {bound} "
                text += f"{'met' if met else 'MISSED'} ({value:.2f})"
            lines.append(text)
    return lines


def report(rows: Sequence[Row], *, targets: str | None = None) -> None:
    """Print tables and, where `targets` names a kind of device ("cpu", "cuda"), verdicts."""
    for _, members in groupby(rows, key=lambda row: row["group"]):
        show(list(members))
    if targets is not None:
        print("\n" + "\n".join(judge(rows, targets)))
