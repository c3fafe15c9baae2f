"""The tables of README and docs, made from the rows under benchmarks/results and from the code.

    python -m tests.readme_tables            say which tables are not as they would be made
    python -m tests.readme_tables --write    write them

A table stands between a comment with its name and `<!-- end -->`; TABLES says what makes it. A
number that comes from a row stands in such a table and nowhere else.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fusedaccum.rules.builtin import RULES
from tests import readme_optimizers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    ROOT / name
    for name in (
        "README.md", "docs/numbers.md", "docs/optimizers.md", "docs/memory.md",
        "docs/linear.md", "benchmarks/README.md",
    )
)  # fmt: skip
BEGIN = "<!-- {}: python -m tests.readme_tables --write -->\n"
END = "<!-- end -->"

Row = dict[str, Any]
# Of the machine whose rows the tables show.
CYCLE, LORA = "2026-11-22-cycle-eager-3", "2026-11-22-cycle-eager-2"
MICRO, COMPILED = "2026-11-22-micro-eager", "2026-11-22-all-compiled"
TRAINING, LONG = "2026-11-22-end-to-end", "2026-11-22-end-to-end-2"
LINEAR = "2026-11-29-linear"
HOST, HOST_BEFORE = "2026-11-30-host-2", "2026-11-30-before-host-2"
BESIDE = "2026-11-29-beside-1894093"
DEMO = "intel-r-xeon-r-processor/2026-11-29-demo.json"


# --- from rows to cells ---


@functools.cache
def rows(file: str) -> list[Row]:
    path = RESULTS / "intel-r-xeon-r-processor" / f"{file}.json"
    found: list[Row] = json.loads(path.read_text("utf-8"))
    return found


def pick(found: Iterable[Row], **which: Any) -> Row:
    """The one row that has these values.

    Raises:
        LookupError: there is none, or there are several.
    """
    fitting = [row for row in found if all(row[name] == value for name, value in which.items())]
    if len(fitting) != 1:
        raise LookupError(f"{len(fitting)} rows have {which}")
    return fitting[0]


def table(header: Sequence[str], lines: Iterable[Sequence[str]], named: int = 1) -> str:
    """Markdown; the first `named` columns are words, the others numbers."""
    cells = [header, ["---"] * named + ["--:"] * (len(header) - named), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def least_is_bold(values: Sequence[float | None], exact: Sequence[int], digits: int) -> list[str]:
    """Printed numbers; None is an empty cell. The least of those at the places `exact` is bold."""
    shown = ["" if value is None else f"{value:.{digits}f}" for value in values]
    competing = [i for i in exact if values[i] is not None]
    if len(competing) > 1:
        best = min(competing, key=lambda i: values[i] or 0.0)
        shown[best] = f"**{shown[best]}**"
    return shown


def scientific(value: float, digits: int) -> str:
    """As 4e-3."""
    return f"{value:.{digits}e}".replace("e-0", "e-")


# --- single operations ---

OPERATIONS = [
    ("first micro-batch", "accumulate_first", "bfloat16"),
    ("later micro-batch", "accumulate", "bfloat16"),
    ("last micro-batch, with the norm", "accumulate_last_norm", "bfloat16"),
    ("AdamW, bf16 with fp32-precise master", "step", "bfloat16"),
    ("AdamW, fp32", "step", "float32"),
    ("norm of fp32", "norm", "float32"),
]
NATIVE = ("blocked_add", "foreach_add", "native_fp32")


def _ratio(file: str, operation: str, dtype: str, *names: str) -> float | None:
    """Of the first of these variants that was measured, in units of the copy."""
    group = [r for r in rows(file) if r["operation"] == operation and r["dtype"] == dtype]
    for row in (row for name in names for row in group if row["variant"] == name):
        return float(row["ratio"])
    return None


def operations() -> str:
    lines = []
    for label, operation, dtype in OPERATIONS:
        of = functools.partial(_ratio, MICRO, operation, dtype)
        # Native forms have norm and step in common: each has one row.
        shared = {"step": "native_fp32", "norm": "get_total_norm"}.get(operation, "")
        ours = of("fused_backend", "fused_functional")
        eager = [ours, *(of(name, shared) for name in NATIVE), of("plain_bf16")]
        beside = [_ratio(COMPILED, operation, dtype, v) for v in ("compiled", "fused_backend")]
        lines.append([label, *least_is_bold(eager, range(4), 2), *least_is_bold(beside, (0, 1), 2)])
    columns = ["fused_backend", *NATIVE, "plain_bf16", "compiled", "fused_backend beside it"]
    return table(["operation", *columns], lines)


def operations_in_short() -> str:
    """Ours, the best native form, and `torch.compile`."""
    lines = []
    for label, operation, dtype in (OPERATIONS[i] for i in (1, 3, 4, 5)):
        of = functools.partial(_ratio, MICRO, operation, dtype)
        found = [of(name) for name in (*NATIVE, "get_total_norm")]
        best = min(value for value in found if value is not None)
        eager = [of("fused_backend", "fused_functional"), best]
        beside = [_ratio(COMPILED, operation, dtype, v) for v in ("compiled", "fused_backend")]
        label = label.replace("later micro-batch", "accumulate bf16 into fp32")
        lines.append([label, *least_is_bold(eager, (0, 1), 2), *least_is_bold(beside, (0, 1), 2)])
    columns = ["fusedaccum", "best native, eager", "`torch.compile`", "fusedaccum beside it"]
    return table(["", *columns], lines)


def errors() -> str:
    lines = [
        ("fusedaccum's norm of one such tensor", MICRO, "norm", "fused_functional"),
        ("torch's", MICRO, "norm", "get_total_norm"),
        ("fusedaccum's mean gradient, N = 8", CYCLE, "window", "fused_backend"),
        ("plain bf16's", CYCLE, "window", "plain_bf16"),
    ]
    shown = []
    for label, file, operation, variant in lines:
        row = pick(rows(file), operation=operation, variant=variant)
        shown.append([label, scientific(row["grad_error"], 0)])
    return table(["", "off by"], shown)


# --- windows ---

WINDOWS = [(CYCLE, "gpt2_small"), (LORA, "lora_500")]
WINDOW_COLUMNS = ["GPT-2: ms", "of `fused_hooks`", "LoRA: ms", "of `fused_hooks`"]
FORMS = [
    *("fused_backend", "fused_assigned", "fused_hooks", "blocked_add", "foreach_add"),
    *("per_tensor_add", "cast_add", "native_fp32", "plain_bf16"),
]
WORDS = {
    "fused_hooks": "fusedaccum, through autograd hooks",
    "fused_backend": "fusedaccum's operations alone",
    "blocked_add": "native: `copy_` and `add_` in cache-sized blocks, fused AdamW on fp32 masters",
    "foreach_add": "native: `torch._foreach_add_`",
    "native_fp32": "native: `grad_dtype=None`, fp32 `.grad`, fused AdamW on fp32 masters",
    "plain_bf16": "plain bf16 accumulation (wrong: see the last column)",
}


def _window(file: str, shape: str, variant: str) -> list[str]:
    """Milliseconds, and the ratio to those of the wrapper in the same group."""
    of = functools.partial(pick, rows(file), operation="window", shape=shape, n=8)
    ms = of(variant=variant)["p50_ms"]
    return [f"{ms:.0f}", f"{ms / of(variant='fused_hooks')['p50_ms']:.2f}"]


def windows() -> str:
    lines = [[f"`{name}`", *(c for w in WINDOWS for c in _window(*w, name))] for name in FORMS]
    for name in ("compiled", "fused_backend", "fused_hooks"):
        label = f"`{name}`" if name == "compiled" else f"`{name}` beside it"
        lines.append([label, *_window(COMPILED, "gpt2_small", name), "", ""])
    return table(["form", *WINDOW_COLUMNS], lines)


def windows_in_short() -> str:
    lines = []
    for name, words in WORDS.items():
        error = scientific(pick(rows(CYCLE), variant=name)["grad_error"], 0)
        lines.append([words, *(c for w in WINDOWS for c in _window(*w, name)), error])
    for name, label in (
        ("compiled", "native: `torch.compile`d, measured apart"),
        ("fused_hooks", "fusedaccum beside it, through hooks"),
    ):
        lines.append([label, *_window(COMPILED, "gpt2_small", name), "", "", ""])
    header = [column.replace("`fused_hooks`", "fusedaccum") for column in WINDOW_COLUMNS]
    return table(["", *header, "gradient off by"], lines)


# --- training ---

RUNS = [(TRAINING, 512, 1), (TRAINING, 512, 4), (TRAINING, 512, 8), (TRAINING, 1024, 8)]
RUNS += [(TRAINING, 2048, 8), (LONG, 2048, 8)]
TRAINED = {"fused_hooks": "fusedaccum", "native_fp32": "native fp32", "plain_bf16": "plain bf16"}


def training() -> str:
    """The accumulation tax in percent, and what is kept between two windows."""
    lines = []
    for file, tokens, n in RUNS:
        group = [row for row in rows(file) if row["tokens"] == tokens and row["n"] == n]
        found = [pick(group, variant=name) for name in (*TRAINED, "floor_again")]
        label = f"{tokens:,} tokens, N = {n}; {found[0]['samples']} samples"
        lines.append([label, *(f"{row['tax_p50']:.1f}" for row in found)])
    kept = [pick(group, variant=name)["rest_per_parameter"] for name in TRAINED]
    lines.append(["bytes per parameter at rest", *(f"{value:.1f}" for value in kept), ""])
    return table(["a micro-batch of", *TRAINED.values(), "the floor again (noise)"], lines)


def host_time() -> str:
    """Milliseconds of Python for a micro-batch, above autograd's own, and for an update."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows(HOST)):
        cells = [shape.replace("_", " ")]
        for kind, names in (("micro_batch", ("fused_hooks", "autograd")), ("update", NO_FLOOR)):
            for file in (HOST_BEFORE, HOST):
                found = [
                    pick(rows(file), operation=f"host_{kind}", shape=shape, variant=name)
                    for name in names
                ]
                ms = [row["p50_ms"] for row in found]
                cells.append(f"{ms[0] - sum(ms[1:]):.1f}")
        own = pick(rows(HOST), operation="host_micro_batch", shape=shape, variant="fused_hooks")
        lines.append([*cells[:1], f"{own['n_tensors']:,}", str(own["launches"]), *cells[1:]])
    header = ["", "tensors", "launches", "micro-batch: before", "now", "update: before", "now"]
    return table(header, lines)


NO_FLOOR = ("fused_hooks",)


def beside() -> str:
    """Milliseconds of an earlier version and of this one, and their ratio, pair by pair."""
    lines = []
    for now in (row for row in rows(BESIDE) if row["ratio_p20"]):
        of = functools.partial(pick, rows(BESIDE), group=now["group"])
        before = of(
            variant="copy_again" if now["variant"] == "copy" else f"{now['variant']}_before"
        )
        what = f"{now['operation'].removeprefix('beside_')}, {now['shape']}, {now['dtype']}"
        times = [f"{row['p50_ms']:.2f}" for row in (before, now)]
        spread = f"{now['ratio_p20']:.2f} to {now['ratio_p80']:.2f}"
        lines.append([what, f"`{now['variant']}`", *times, f"{now['ratio']:.2f}", spread])
    columns = ["before: ms", "now: ms", "now / before", "p20 to p80"]
    return table(["operation", "form", *columns], lines, named=2)


def linear() -> str:
    """Milliseconds of a layer's forward and backward, on a CPU."""
    lines = []
    layers = [row for row in rows(LINEAR) if row["operation"] == "linear_layer"]
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in layers):
        of = functools.partial(pick, layers, shape=shape, tokens=tokens)
        ms = [of(variant=f"layer_{name}")["p50_ms"] for name in ("plain", "hook", "fused")]
        shown = least_is_bold(ms, range(3), 1)
        label = shape.removeprefix("linear_").replace("x", " x ")
        lines.append([label, f"{tokens:,}", *shown, f"{ms[1] / ms[2]:.2f}"])
    columns = ["stock torch", "through hooks", "fused", "hooks / fused"]
    return table(["layer", "tokens", *columns], lines)


def demo() -> str:
    row = json.loads((RESULTS / DEMO).read_text("utf-8"))
    lines = []
    for name in TRAINED.values():
        result = row["results"][name]
        fell, kept = row["loss_before"] - result["loss"], f"{result['bytes_per_parameter']:.0f}"
        lines.append([name, f"{fell:.4f}", scientific(result["gradient_error"], 1), kept])
    columns = ["validation loss fell by", "mean gradient of N = 64 off by",
               "bytes per parameter at rest"]  # fmt: skip
    return table(["", *columns], lines)


# --- memory ---

# Optimizers by the name of their rule, whose states are counted.
STATES = {
    "sgd": "SGD",
    "sgd_momentum": "SGD with momentum, Lion, Adagrad, RMSprop, ASGD",
    "adam": "AdamW, Adam, NAdam, RAdam, Adamax, Adadelta, Rprop, RMSprop with momentum or centered",
    "adam_amsgrad": "AdamW and Adam with `amsgrad`, RMSprop with both",
}
# How a parameter is kept: its own bytes, and the master's.
KEPT = {
    "bf16, split master": (2, 2),
    "bf16, no master": (2, 0),
    "fp16, fp32 master": (2, 4),
    "fp32": (4, 0),
}


def at_rest(n_states: int, kept: str) -> int:
    """Bytes of a parameter between two updates: its own, master, accumulator and states."""
    return sum(KEPT[kept]) + 4 + 4 * n_states


def memory() -> str:
    lines = []
    for name, words in STATES.items():
        n_states = len(RULES[name].states)
        lines.append([words, str(n_states), *(str(at_rest(n_states, kept)) for kept in KEPT)])
    return table(["", "states", *KEPT], lines)


# --- the pages ---

TABLES: dict[str, Callable[[], str]] = {
    "optimizers": readme_optimizers.table,
    "windows in short": windows_in_short,
    "operations in short": operations_in_short,
    "training": training,
    "demo": demo,
    "host": host_time,
    "linear": linear,
    "beside": beside,
    "memory": memory,
    "operations": operations,
    "errors": errors,
    "windows": windows,
}


def names(text: str) -> list[str]:
    """Of the tables in a page, in order."""
    return re.findall(BEGIN.format("(.*)").rstrip("\n"), text)


def remade(text: str, wanted: Iterable[str]) -> str:
    """A page's text with these of its tables made anew."""
    for name in wanted:
        before, rest = text.split(BEGIN.format(name))
        _, after = rest.split(END, 1)
        text = f"{before}{BEGIN.format(name)}{TABLES[name]()}{END}{after}"
    return text


def main(argv: list[str]) -> int:
    stale = 0
    for path in PAGES:
        text = path.read_text("utf-8")
        new = remade(text, names(text))
        if argv == ["--write"]:
            path.write_text(new, "utf-8")
        elif new != text:
            stale = 1
            print(f"{path.relative_to(ROOT)} is stale: python -m tests.readme_tables --write")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
