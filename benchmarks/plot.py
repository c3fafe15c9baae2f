"""`python -m benchmarks.plot`: figures of the newest rows of each device, as SVG beside them.

    share.svg    how much of the copy's rate each operation reaches
    cycle.svg    time of a window against N
    tax.svg      what accumulating and updating add to a training loop, against the micro-batch size
    memory.svg   bytes per parameter, between two windows and at the peak of one
    host.svg     the time that Python takes for a micro-batch and for an update

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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusedaccum.bench.race import CEILINGS

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
OPERATIONS = {
    "accumulate_first": "first micro-batch",
    "accumulate": "later micro-batch",
    "accumulate_last_norm": "last one, with the norm",
    "norm": "norm alone",
    "step": "AdamW, {}",
}
LABELS = {
    "n": "N, micro-batches per window (dotted: sums in bf16)",
    "tokens": "tokens per micro-batch (dotted: sums in bf16)",
}
LOOK: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fusedaccum",
}
GREY = "#999999"
SIGNS = (("fused_hooks", 1), ("autograd", -1))
Group = list[Row]


def style(variant: str) -> dict[str, Any]:
    """How a variant is drawn: a dotted line for sums in bf16."""
    color, marker = STYLES.get(variant, OTHER)
    return {
        "label": variant,
        "color": color,
        "marker": marker,
        "linestyle": "-" if is_exact(variant) else ":",
        "zorder": 3 if variant.startswith("fused") else 2,
    }


# --- rows ---


def by(rows: Iterable[Row], column: str) -> dict[Any, list[Row]]:
    """Rows by the value of a column, in the order in which it first comes."""
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[column]].append(row)
    return found


def groups(folder: Path) -> list[Group]:
    """Every group of rows under a folder, oldest first; each row knows its file."""

    def age(path: Path) -> list[tuple[int, str]]:
        # 2026-11-22-cycle-eager-10.json after 2026-11-22-cycle-eager-9.json
        parts = re.split(r"(\d+)", path.stem)
        return [(int(part), "") if part.isdigit() else (0, part) for part in parts]

    found: list[Group] = []
    for path in sorted(folder.glob("*.json"), key=age):
        rows = json.loads(path.read_text("utf-8"))
        if isinstance(rows, list):
            found += by((row | {"file": path.name} for row in rows), "group").values()
    return found


def newest(found: Iterable[Group], *keys: str) -> dict[tuple[Any, ...], Group]:
    """The last group for each value of these columns."""
    return {tuple(group[0].get(key) for key in keys): group for group in found}


def conditions(rows: Sequence[Row]) -> str:
    """What the figure's numbers were measured under."""

    def several(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None))

    loads = [row["load"] for row in rows]
    parts = [several(key) for key in ("device", "driver", "torch", "model", "commit", "date")]
    parts.append(f"{several('n_threads')} threads, load {min(loads):.1f} to {max(loads):.1f}")
    parts.append(f"medians, bars from p20 to p80; rows: {several('file')}")
    return "; ".join(filter(None, parts))


# --- drawing ---


def finish(figure: Any, rows: Sequence[Row], path: Path) -> bool:
    """Name what the panels show, print the conditions beneath, and save; True."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    if found:
        known = sorted(found, key=lambda name: [*STYLES, name].index(name))
        figure.legend([found[name] for name in known], known, loc="outside center right")
    width = int(figure.get_size_inches()[0] * 19)
    text = textwrap.fill(conditions(rows), width, break_long_words=False, break_on_hyphens=False)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=6.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def panels(plt: Any, titles: Sequence[str], *, width: float, height: float) -> tuple[Any, Any]:
    """A figure with a panel per title, side by side; inches are of a panel."""
    size = (width * len(titles), height)
    figure, axes = plt.subplots(1, len(titles), figsize=size, squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title.replace("_", " "))
    return figure, axes[0]


def lines(
    plt: Any, wanted: Sequence[tuple[str, str, Group]], column: str, label: str, path: Path
) -> bool:
    """A figure of lines with bars from p20 to p80. False without panels.

    Args:
        wanted: of each panel its title, the column of its x axis, and its rows.
        column: of the y axis; it lacks the number of the quantile.
    """
    if not wanted:
        return False
    figure, axes = panels(plt, [title for title, _, _ in wanted], width=4.9, height=3.8)
    for axis, (_, x, shown) in zip(axes, wanted, strict=True):
        for variant, rows in by(sorted(shown, key=lambda row: row[x]), "variant").items():
            low, y, high = ([row[column.format(p)] for row in rows] for p in (20, 50, 80))
            bars = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((low, y), (y, high))]
            places = [row[x] for row in rows]
            axis.errorbar(places, y, yerr=bars, markersize=5, capsize=2, **style(variant))
        axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        axis.set_xscale("log", base=2)
        ticks = sorted(by(shown, x))
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel=LABELS[x], ylabel=label)
    return finish(figure, [row for _, _, rows in wanted for row in rows], path)


def compiles(group: Group) -> bool:
    """Whether a group was measured for torch.compile."""
    return any(row["variant"] == "compiled" for row in group)


def share(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Bytes that the operation needs, per time, as a share of the copy's rate."""
    single = [group for group in found if group[0]["operation"] in OPERATIONS]
    chosen, extra = (
        newest((g for g in single if compiles(g) is own), "shape", "operation", "dtype")
        for own in (False, True)
    )
    shapes = sorted({shape for shape, *_ in chosen})
    if not shapes:
        return False
    figure, axes = panels(plt, shapes, width=5.4, height=3.6)
    used: list[Row] = []
    for axis, shape in zip(axes, shapes, strict=True):
        keys = [key for op in OPERATIONS for key in sorted(chosen) if key[:2] == (shape, op)][::-1]
        for y, key in enumerate(keys):
            rows = [r for r in chosen[key] if r["variant"] not in CEILINGS]
            rows = [r for r in rows if is_exact(r["variant"])]
            rows += [r for r in extra.get(key, ()) if r["variant"] == "compiled"]
            needed = min(row["bytes"] for row in rows)
            used += rows
            for row in rows:
                # A row's own bytes would flatter a form that moves more than it has to.
                scale = 100 * row["copy_share"] * needed / row["bytes"]
                low, middle, high = (scale * row["p50_ms"] / row[f"p{p}_ms"] for p in (80, 50, 20))
                bars = [[middle - low], [high - middle]]
                look = style(row["variant"]) | {"linestyle": ""}
                axis.errorbar([middle], [y], xerr=bars, markersize=7, **look)
        axis.set_yticks(range(len(keys)), [OPERATIONS[op].format(dtype) for _, op, dtype in keys])
        axis.axvline(100, color=GREY, linewidth=0.8, zorder=0)
        axis.set(
            xlabel="% of an fp32 copy's rate, counting the bytes that are needed",
            xlim=(0, None),
            ylim=(-0.6, len(keys) - 0.4),
        )
        axis.grid(axis="y", color="#EEEEEE", zorder=0)
    return finish(figure, used, path)


def cycle(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Time of a window against N, for shapes that have more than one N in a file."""
    windows = [g for g in found if g[0]["operation"] == "window" and not compiles(g)]
    chosen: dict[str, list[Row]] = {}
    by_file = newest(windows, "shape", "file", "n")
    for shape, file, _ in by_file:
        members = [g for key, g in by_file.items() if key[:2] == (shape, file)]
        if len(members) > 1:
            chosen[shape] = [row for g in members for row in g if row["variant"] not in CEILINGS]
    wanted = [(shape, "n", rows) for shape, rows in sorted(chosen.items())]
    return lines(plt, wanted, "p{}_ms", "ms per window, clipped AdamW", path)


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
    rows = [row for group in training(found) for row in group if row["variant"] != "floor"]
    wanted = []
    for x, fixed, heading in (
        ("tokens", "n", "N = {:,}"),
        ("n", "tokens", "micro-batches of {:,} tokens"),
    ):
        sweeps = by(rows, fixed).items()
        value, longest = max(sweeps, key=lambda sweep: len(by(sweep[1], x)), default=(0, []))
        if len(by(longest, x)) > 1:
            wanted.append((heading.format(value), x, longest))
    return lines(plt, wanted, "tax_p{}", "% above forward and backward alone", path)


def memory(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Bytes per parameter, where micro-batches are smallest."""
    own = training(found)
    if not own:
        return False
    group = max(own, key=lambda g: (-g[0]["tokens"], g[0]["n"]))
    rows = [row for row in group if row["variant"] != "floor_again"][::-1]
    head = rows[0]
    name = f"{head['shape']}, micro-batches of {head['tokens']:,} tokens, N = {head['n']}"
    figure, (axis,) = panels(plt, [name], width=6.4, height=2.7)
    for column, alpha in (("peak_per_parameter", 0.3), ("rest_per_parameter", 1.0)):
        names = [row["variant"].replace("floor", "forward, backward") for row in rows]
        colors = [style(row["variant"])["color"] for row in rows]
        bars = axis.barh(names, [row[column] for row in rows], color=colors, alpha=alpha)
        axis.bar_label(bars, fmt=" {:.1f}", fontsize=8)
    axis.set_xlabel("bytes per parameter: between windows, and (pale) at the peak, activations too")
    return finish(figure, rows, path)


def host(plt: Any, found: Sequence[Group], path: Path) -> bool:
    """Python's own time, of each shape."""
    kinds = {"host_micro_batch": "micro-batch, above autograd's own", "host_update": "update"}
    chosen = newest([g for g in found if g[0]["operation"] in kinds], "operation", "shape")
    if not chosen:
        return False
    figure, axes = panels(plt, [*kinds.values()], width=4.2, height=2.6)
    for axis, kind in zip(axes, kinds, strict=True):
        shown = {shape: by(g, "variant") for (own, shape), g in chosen.items() if own == kind}
        ms = {
            shape: sum(s * row["p50_ms"] for name, s in SIGNS for row in rows.get(name, ()))
            for shape, rows in shown.items()
        }
        bars = axis.barh([*ms], [*ms.values()], color=style("fused_hooks")["color"])
        axis.bar_label(bars, fmt=" {:.1f}", fontsize=8)
        axis.set_xlabel("ms of the host, without the kernels")
    return finish(figure, [row for g in chosen.values() for row in g], path)


FIGURES = {"share": share, "cycle": cycle, "tax": tax, "memory": memory, "host": host}


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

    plt.rcParams.update(LOOK)
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
