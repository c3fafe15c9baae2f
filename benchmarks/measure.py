"""Rows: what each says about where and how it was measured, and the files that keep them."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusedaccum.bench.run import BUSY
from fusedaccum.doctor import machine

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def commit() -> str:
    """The commit of this checkout; without git, or with changes, a hash of the sources as well."""
    paths = ("fusedaccum", "kernels", "benchmarks")
    sources = hashlib.sha256()
    for folder in paths:
        for path in sorted((ROOT / folder).rglob("*.py")):
            sources.update(path.read_bytes())
    git = ("git", "-C", str(ROOT))
    head = machine.first_line(*git, "rev-parse", "--short=12", "HEAD")
    if head and not machine.first_line(*git, "status", "--porcelain", "--", *paths):
        return head
    return f"{head}+sources.{sources.hexdigest()[:12]}".lstrip("+")


def numbers(text: str) -> list[int]:
    """The numbers of "1,4,8"."""
    return [int(number) for number in text.split(",")]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every command that measures takes."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=numbers, help="micro-batches per window, as 8 or 1,4,8,16")
    parser.add_argument("--rounds", type=int, help="samples of each variant")
    parser.add_argument("--budget", type=float, help="seconds for each group of variants")
    parser.add_argument("--backend", choices=("triton", "torch"), help="fusedaccum's")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    return parser


def warn_if_busy(device: torch.device) -> None:
    """Say so where other processes would decide what is measured."""
    if device.type == "cpu" and machine.is_busy() and "OMP_WAIT_POLICY" not in os.environ:
        print(BUSY)


class Rows:
    """The rows of one run, and what it could not measure.

    Attributes:
        rows: so far; `save` writes them.
        refused: variants that are wrong or raised, and why.
        skipped: what this machine lacks.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.environment = environment(device)
        self.path = new_path(results_folder(device), f"{name}.json")
        self.rows: list[Row] = []
        self.refused: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.groups = 0

    def refuse(self, name: str, error: Exception) -> None:
        """No number for this variant, and why; a lack of memory is no fault of its own."""
        kept = self.skipped if isinstance(error, torch.OutOfMemoryError) else self.refused
        kept[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def add(self, times: Row, **columns: Any) -> None:
        """A row of the group `self.groups`, with the columns of its times."""
        self.rows.append(
            self.environment
            | {"group": self.groups}
            | columns
            | times
            | {"load": round(os.getloadavg()[0], 2)}
        )

    def save(self) -> None:
        """Write all rows that there are."""
        save(self.rows, self.path)

    def close(self) -> int:
        """Say what was refused, skipped and kept; the exit status."""
        for name, why in self.refused.items():
            print(f"REFUSED {name}: {why}")
        for name, why in self.skipped.items():
            print(f"SKIPPED {name}: {why}")
        print(f"{len(self.rows)} rows: {self.path.name}")
        return 1 if self.refused else 0


def environment(device: torch.device) -> Row:
    """What every row of a run says about where it was measured."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else machine.cpu_name(),
        "driver": machine.driver() if on_cuda else None,
        "n_cores": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "fusedaccum_cc": os.environ.get("FUSEDACCUM_CC"),  # "0": no compiled loops on the CPU
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def results_folder(device: torch.device) -> Path:
    """Where results of this machine go: $OUT, else a folder named after the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / slug)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_path(folder: Path, name: str) -> Path:
    """A path that is not taken, starting with today: results are added, never overwritten."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path, number = folder / f"{today}-{name}", 1
    stem, suffix = path.stem, path.suffix
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path


def save(rows: Sequence[Row], path: Path) -> None:
    """One JSON list, one row per line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
