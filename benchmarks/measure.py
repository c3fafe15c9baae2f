"""Rows: what each says about where and how it was measured, and the files that keep them."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusedaccum.doctor import machine

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def _git(arguments: str) -> str:
    """What git says of this checkout; nothing where there is no git."""
    status, text = subprocess.getstatusoutput(f"git -C '{ROOT}' {arguments}")
    return "" if status else text.strip()


def commit() -> str:
    """The commit of this checkout; without git, or with changes, a hash of the sources as well."""
    folders = ("fusedaccum", "kernels", "benchmarks")
    head = _git("rev-parse --short=12 HEAD")
    if head and not _git(f"status --porcelain -- {' '.join(folders)}"):
        return head
    sources = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            sources.update(path.read_bytes())
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


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def environment(device: torch.device) -> Row:
    """What every row of a run says about where it was measured."""
    return {
        "device": machine.name_of(device),
        "driver": machine.driver() if device.type == "cuda" else None,
        "n_cores": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "fusedaccum_cc": os.environ.get("FUSEDACCUM_CC"),  # "0": no compiled loops on the CPU
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": today(),
    }


def results_folder(device: torch.device) -> Path:
    """Where results of this machine go: $OUT, else a folder named after the device."""
    slug = re.sub(r"[^a-z0-9.]+", "-", machine.name_of(device).lower()).strip("-")
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / slug)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_path(folder: Path, name: str) -> Path:
    """A path that is not taken, starting with today: results are added, never overwritten."""
    path, number = folder / f"{today()}-{name}", 1
    stem, suffix = path.stem, path.suffix
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path


def save(rows: Sequence[Row], path: Path) -> None:
    """One JSON list, one row per line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
