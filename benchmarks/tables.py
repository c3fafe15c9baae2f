"""Tables of rows, and what they say about the targets; wins and losses alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fusedaccum.bench.run import COLUMNS as BENCH
from fusedaccum.doctor import output
from fusedaccum.doctor.output import column

from .forms import is_exact
from .measure import Row
from .suites import COPY

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
COLUMNS: dict[str, output.Column] = {
    "": column("variant"),
    "B/elem": lambda row: f"{row['bytes'] / row['n_elements']:.0f}",
    **{name: BENCH[name] for name in ("p20", "p50", "p80 ms", "x copy")},
    "GB/s": lambda row: f"{row['bytes'] / row['p50_ms'] / 1e6:.1f}",
    **{name: BENCH[name] for name in ("% of copy rate", "host ms", "grad error")},
}
REDUCED: dict[str, output.Column] = COLUMNS | {
    "before the end": lambda row: f"{row['early']} of {row['launched']}" if row["launched"] else "",
}
TRAINING: dict[str, output.Column] = {
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
    """One group: variants, fastest first and ceilings on top; or training loops."""
    head = rows[0]
    if "tax_p50" in head:
        what = (
            f"{head['model']}, {head['n_elements']:,} parameters, {head['tokens']} tokens in "
            f"sequences of {head['length']}"
        )
    else:
        what = (
            f"{head['operation']}, {head['shape']} ({head['n_elements']:,} {head['dtype']} "
            f"elements)"
        )
        what += f", {head['tokens']} tokens" if head.get("tokens") else ""
        rows = sorted(rows, key=lambda r: (r["grad_error"] is not None, r["p50_ms"]))
    title = f"{what}, N={head['n']}, {head['samples']} samples, load {head['load']}"
    columns = TRAINING if "tax_p50" in head else REDUCED if "launched" in head else COLUMNS
    output.print_rows(title, rows, columns)


def judge(rows: Sequence[Row], device: str) -> list[str]:
    """What the rows say about the targets; wins and losses alike."""
    lines = []
    for _, members in groupby(rows, key=lambda row: row["group"]):
        group = {row["variant"]: row for row in members}
        ours = {name: row for name, row in group.items() if name.startswith("fused_")}
        rivals = {
            name: row
            for name, row in group.items()
            if row["grad_error"] is not None and name not in ours and is_exact(name)
        }
        if COPY not in group or not ours or not rivals:
            continue
        best = min(rivals, key=lambda name: rivals[name]["p50_ms"])
        for name, row in ours.items():
            speedup = rivals[best]["p50_ms"] / row["p50_ms"]
            text = (
                f"{row['operation']}, {row['shape']}, {row['dtype']}: {name} takes "
                f"{row['ratio']:.2f} x copy and is {speedup:.2f} x as fast as {best}"
            )
            target = TARGETS[device].get(row["operation"])
            if target:
                column, bound, is_upper = target
                value = speedup if column == "speedup" else row[column]
                met = value <= bound if is_upper else value >= bound
                text += (
                    f": target {column} {'<=' if is_upper else '>='} {bound} "
                    f"{'met' if met else 'MISSED'} ({value:.2f})"
                )
            lines.append(text)
    return lines


def report(rows: Sequence[Row], *, targets: bool = False) -> None:
    """Print tables and verdicts."""
    for _, members in groupby(rows, key=lambda row: row["group"]):
        show(list(members))
    if targets:
        print("\n" + "\n".join(judge(rows, "cuda" if rows[0]["driver"] else "cpu")))
