"""`python -m benchmarks.plot`: figures of the newest rows of each device, as SVG beside them.

    share.svg    how much of the copy's rate each operation reaches
    cycle.svg    time of a window against N
    tax.svg      what accumulating and updating add to a training loop, against the micro-batch size
    memory.svg   bytes per parameter, between two windows and at the peak of one

A line is drawn through rows of the same file only; the conditions stand beneath. What has no rows
is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .forms import is_exact
from .measure import ROOT, Row

# Colours of Okabe and Ito, told apart by the colour-blind too; markers differ as well.
STYLES = {
    "fused_hooks": ("#0072B2", "o"),
    "fused_backend": ("#56B4E9", "o"),
    "fused_functional": ("#56B4E9", "o"),
    "fused_assigned": ("#0072B2", "v"),
    "native_fp32": ("#D55E00", "s"),
    "blocked_add": ("#E69F00", "^"),
    "foreach_add": ("#009E73", "D"),
    "per_tensor_add": ("#CC79A7", "P"),
    "compiled": ("#000000", "X"),
    "plain_bf16": ("#777777", "*"),
}
OTHER = ("#BBBBBB", ".")
CEILINGS = ("copy", "copy_again", "read_modify_write")
OPERATIONS = {
    "accumulate_first": "first micro-batch",
    "accumulate": "later micro-batch",
    "accumulate_last_norm": "last one, with the norm",
    "norm": "norm alone",
    "step": "step",
}
Group = list[Row]


def style(variant: str) -> tuple[str, str]:
    """Colour and marker."""
    return STYLES.get(variant.removesuffix("_graph"), OTHER)


# --- rows ---


def groups(folder: Path) -> list[Group]:
    """Every group of rows under a folder, oldest first; each row knows its file."""

    def age(path: Path) -> list[tuple[int, str]]:
        # 2026-11-22-cycle-eager-10.json after 2026-11-22-cycle-eager-9.json
        return [(int(part or 0), "") if part.isdigit() else (0, part) for part in
                re.split(r"(\d+)", path.stem)]  # fmt: skip

    found: list[Group] = []
    for path in sorted(folder.glob("*.json"), key=age):
        rows = json.loads(path.read_text("utf-8"))
        members: dict[int, Group] = defaultdict(list)
        for row in rows if isinstance(rows, list) else ():
            members[row["group"]].append(row | {"file": path.name})
        found += members.values()
    return found


def newest(found: Iterable[Group], *keys: str) -> dict[tuple[Any, ...], Group]:
    """The last group for each value of these columns."""
    return {tuple(group[0].get(key) for key in keys): group for group in found}


def conditions(rows: Sequence[Row]) -> str:
    """What the figure's numbers were measured under."""

    def several(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None))

    loads = [row["load"] for row in rows]
    parts = [
        several("device"),
        f"driver {several('driver')}" if several("driver") else f"{several('n_threads')} threads",
        f"torch {several('torch')}",
        several("model"),
        f"commit {several('commit')}",
        several("date"),
        f"load {min(loads):.1f} to {max(loads):.1f}",
        f"medians, bars from p20 to p80; rows: {several('file')}",
    ]
    return "; ".join(filter(None, parts))


# --- drawing ---


def finish(figure: Any, rows: Sequence[Row], path: Path) -> None:
    """Print the conditions beneath and save."""
    width = figure.get_size_inches()[0]
    text = textwrap.fill(
        conditions(rows), int(width * 19), break_long_words=False, break_on_hyphens=False
    )
    lines = text.count("\n") + 1
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, (0.13 * lines + 0.1) / height, 1, 1))
    figure.text(0.01, 0.06 / height, text, fontsize=6.5, color="#555555", va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def label_ends(axes: Any, ends: Sequence[tuple[float, str]]) -> None:
    """Name lines at their right ends, apart from each other."""
    low, high = axes.get_ylim()
    step, last = (high - low) / 19, float("-inf")
    for y, variant in sorted(ends):
        last = max(y, last + step)
        axes.annotate(
            variant,
            (1.02, last),
            xycoords=("axes fraction", "data"),
            color=style(variant)[0] if style(variant) != OTHER else "#777777",
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def lines(axes: Any, rows: Sequence[Row], x: str, columns: tuple[str, str, str]) -> None:
    """A line per variant, with bars from p20 to p80."""
    members: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row[x]):
        members[row["variant"]].append(row)
    low, middle, high = columns
    ends = []
    for variant, own in members.items():
        color, marker = style(variant)
        y = [row[middle] for row in own]
        bars = [
            [max(0.0, row[middle] - row[low]) for row in own],
            [max(0.0, row[high] - row[middle]) for row in own],
        ]
        axes.errorbar(
            [row[x] for row in own],
            y,
            yerr=bars,
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.8 if variant.startswith("fused") else 1.2,
            linestyle="-" if is_exact(variant) else ":",
            elinewidth=0.8,
            capsize=2,
        )
        ends.append((y[-1], variant))
    axes.set_xscale("log", base=2)
    ticks = sorted({row[x] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    label_ends(axes, ends)


def panels(plt: Any, titles: Sequence[str], *, width: float, height: float) -> tuple[Any, Any]:
    """A figure with a panel per title, side by side; inches are of a panel."""
    figure, axes = plt.subplots(
        1, len(titles), figsize=(width * len(titles), height), squeeze=False
    )
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, axes[0]


def share(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Bytes that the operation needs, per time, as a share of the copy's rate."""
    chosen = newest((g for g in found if g[0]["operation"] in OPERATIONS and not compiles(g)),
                    "shape", "operation", "dtype")  # fmt: skip
    extra = newest((g for g in found if g[0]["operation"] in OPERATIONS and compiles(g)),
                   "shape", "operation", "dtype")  # fmt: skip
    shapes = sorted({shape for shape, *_ in chosen})
    if not shapes:
        return False
    figure, axes = panels(plt, [title(shape) for shape in shapes], width=5.4, height=3.6)
    used: list[Row] = []
    handles: dict[str, Any] = {}
    for axis, shape in zip(axes, shapes, strict=True):
        keys = [key for op in OPERATIONS for key in sorted(chosen) if key[:2] == (shape, op)]
        for y, key in enumerate(reversed(keys)):
            rows = [r for r in chosen[key] if is_form(r["variant"])]
            rows += [r for r in extra.get(key, ()) if r["variant"] == "compiled"]
            needed = min(row["bytes"] for row in rows)
            used += rows
            for row in rows:
                color, marker = style(row["variant"])
                # A row's own bytes would flatter a form that moves more than it has to.
                scale = 100 * row["copy_share"] * needed / row["bytes"]
                values = [scale * row["p50_ms"] / row[p] for p in ("p80_ms", "p50_ms", "p20_ms")]
                axis.plot(values[::2], [y, y], color=color, linewidth=1, alpha=0.7)
                (handles[row["variant"]],) = axis.plot(
                    values[1], y, marker=marker, color=color, linestyle="", markersize=7,
                    zorder=3 if row["variant"].startswith("fused") else 2,
                )  # fmt: skip
        names = [
            f"AdamW, {dtype}" if op == "step" else OPERATIONS[op] for _, op, dtype in reversed(keys)
        ]
        axis.set_yticks(range(len(keys)), names)
        axis.set_ylim(-0.6, len(keys) - 0.4)
        axis.axvline(100, color="#999999", linewidth=0.8, zorder=0)
        axis.set_xlim(0, 1.04 * axis.get_xlim()[1])
        axis.grid(axis="y", color="#EEEEEE", zorder=0)
        axis.set_xlabel("% of an fp32 copy's rate, counting the bytes that are needed", fontsize=8)
    known = [name for name in STYLES if name in handles]
    other = [name for name in handles if name not in STYLES]
    axes[-1].legend(
        [handles[name] for name in known + other], known + other, fontsize=7, frameon=False,
        loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    finish(figure, used, path)
    return True


def title(shape: str) -> str:
    """A shape's name for people."""
    return shape.replace("_", " ")


def compiles(group: Group) -> bool:
    """Whether a group was measured for torch.compile."""
    return any(row["variant"] == "compiled" for row in group)


def is_form(variant: str) -> bool:
    """Whether a variant is drawn: no ceiling, and as precise as ours."""
    return variant not in CEILINGS and is_exact(variant)


def cycle(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Time of a window against N, for shapes that have more than one N in a file."""
    windows = [g for g in found if g[0]["operation"] == "window" and not compiles(g)]
    chosen: dict[str, list[Row]] = {}
    by_file = newest(windows, "shape", "file", "n")
    for shape, file, _ in by_file:
        members = [g for key, g in by_file.items() if key[:2] == (shape, file)]
        if len(members) > 1:
            chosen[shape] = [row for g in members for row in g if row["variant"] not in CEILINGS]
    if not chosen:
        return False
    shapes = sorted(chosen)
    figure, axes = panels(plt, [title(shape) for shape in shapes], width=5.4, height=3.8)
    for axis, shape in zip(axes, shapes, strict=True):
        axis.set_ylim(0, 1.08 * max(row["p50_ms"] for row in chosen[shape]))
        lines(axis, chosen[shape], "n", ("p20_ms", "p50_ms", "p80_ms"))
        axis.set_xlabel("N, micro-batches per window (dotted: sums in bf16)", fontsize=8)
        axis.set_ylabel("ms per window, clipped AdamW", fontsize=8)
    finish(figure, [row for shape in shapes for row in chosen[shape]], path)
    return True


def training(found: Sequence[Group]) -> list[Group]:
    """The groups of the file with the most end-to-end groups, the last such file."""
    files: dict[str, list[Group]] = defaultdict(list)
    for group in found:
        if group[0]["operation"] == "train_window":
            files[group[0]["file"]].append(group)
    # max() takes the first of equals.
    return max(reversed(files.values()), key=len, default=[])


def tax(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """The accumulation tax against the micro-batch size at one N, and against N at one size."""
    own = training(found)
    rows = [row for group in own for row in group if row["variant"] != "floor"]
    sweeps = []
    for x, fixed, heading, label in (
        ("tokens", "n", "N = {:,}", "tokens per micro-batch"),
        ("n", "tokens", "micro-batches of {:,} tokens", "N, micro-batches per window"),
    ):
        by: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by[row[fixed]].append(row)
        longest = max(by.values(), key=lambda m: len({row[x] for row in m}), default=[])
        if len({row[x] for row in longest}) > 1:
            sweeps.append((heading.format(longest[0][fixed]), x, label, longest))
    if not sweeps:
        return False
    figure, axes = panels(plt, [sweep[0] for sweep in sweeps], width=4.9, height=3.8)
    for axis, (_, x, label, members) in zip(axes, sweeps, strict=True):
        values = [row["tax_p50"] for row in members]
        low, high = min(0.0, *values), max(values)
        axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axis.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        lines(axis, members, x, ("tax_p20", "tax_p50", "tax_p80"))
        axis.set_xlabel(label, fontsize=8)
        axis.set_ylabel("% above forward and backward alone", fontsize=8)
    finish(figure, [row for sweep in sweeps for row in sweep[3]], path)
    return True


def memory(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Bytes per parameter, where micro-batches are smallest."""
    own = training(found)
    if not own:
        return False
    group = max(own, key=lambda g: (-g[0]["tokens"], g[0]["n"]))
    rows = [row for row in group if row["variant"] != "floor_again"][::-1]
    head = rows[0]
    name = f"{title(head['shape'])}, micro-batches of {head['tokens']:,} tokens, N = {head['n']}"
    figure, (axis,) = panels(plt, [name], width=6.4, height=2.7)
    for y, row in enumerate(rows):
        color = style(row["variant"])[0]
        rest, peak = row["rest_per_parameter"], row["peak_per_parameter"]
        axis.barh(y, peak, color=color, alpha=0.3, height=0.62)
        axis.barh(y, rest, color=color, height=0.62)
        axis.text(rest, y, f" {rest:.1f}", fontsize=8, va="center", color="#222222")
        axis.text(peak, y, f" {peak:.1f}", fontsize=8, va="center", color="#222222")
    names = {"floor": "forward, backward"}
    axis.set_yticks(range(len(rows)), [names.get(r["variant"], r["variant"]) for r in rows])
    axis.set_xlabel(
        "bytes per parameter: between windows, and (pale) at the peak, activations included",
        fontsize=8,
    )
    finish(figure, rows, path)
    return True


FIGURES: dict[str, Callable[[Any, Sequence[Group], Path], bool]] = {
    "share": share,
    "cycle": cycle,
    "tax": tax,
    "memory": memory,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if nothing could be drawn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="default: $OUT, or every device's")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figures (pip install 'fusedaccum[bench]')")
        return 1
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fusedaccum"})
    out = os.environ.get("OUT")
    devices = sorted((ROOT / "benchmarks" / "results").glob("*/"))
    n_drawn = 0
    for folder in args.folders or ([Path(out)] if out else devices):
        found = groups(folder)
        for name, draw in FIGURES.items():
            path = folder / "plots" / f"{name}.{'png' if args.png else 'svg'}"
            if draw(plt, found, path):
                n_drawn += 1
                print(f"{folder.name}/plots/{path.name}: {path.stat().st_size / 1024:.0f} KB")
            else:
                print(f"{folder.name}: no rows for {name}")
            plt.close("all")
    return 0 if n_drawn else 1


if __name__ == "__main__":
    sys.exit(main())
