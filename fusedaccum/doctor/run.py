"""`python -m fusedaccum doctor`: is everything here as it should be?"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from .. import backends
from . import machine, output
from . import rules as check_rules
from . import steps as check_steps
from . import sums as check_sums
from . import windows as check_windows
from .checks import Check, Runner, Wrong, threads

MAX_SHOWN = 10
# "CUDA error: an illegal memory access" and the like: the device serves nobody afterwards.
LOST = "CUDA error"


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    Attributes:
        device: where it ran.
        name: its name.
        error: what is wrong, by how much and where; None if nothing is.
        seconds: what it took, with what it had to compile.
    """

    device: str
    name: str
    error: str | None
    seconds: float


def devices(wanted: str | None) -> list[torch.device]:
    """What to check: CPU and GPUs, or the one that was asked for."""
    if wanted is None:
        return [device for device in machine.available() if device.type in ("cpu", "cuda")]
    return machine.choose(wanted)


def checks_of(device: torch.device, backend: str | None, full: bool) -> list[Check]:
    """Every check of one device."""
    runner = Runner(backends.get(backend, device), device, torch.get_num_threads())
    return [
        *check_sums.all_checks(runner, full),
        *check_rules.all_checks(),
        *check_steps.all_checks(runner, full),
        *check_windows.all_checks(device, backend, full),
    ]


def run(
    chosen: Sequence[torch.device], backend: str | None, full: bool, quiet: bool
) -> list[Outcome]:
    """Run the checks of all devices; one that fails does not stop the others."""
    if any(device.type == "cpu" for device in chosen) and backend != "triton":
        check_steps.compile_ahead(full)
    work = [(device, check) for device in chosen for check in checks_of(device, backend, full)]
    outcomes = []
    lost: set[torch.device] = set()
    with output.Progress(len(work), "check", quiet) as progress, threads(1):
        for device, check in work:
            progress.describe(f"{device} {check.name}")
            began, error = time.perf_counter(), None
            if device in lost:
                error = "not run: the device failed before"
            else:
                try:
                    check.run()
                except Wrong as found:
                    error = str(found)
                except Exception as found:  # a kernel that does not compile is a finding too
                    error = f"{type(found).__name__}: {str(found).strip()}"
                    if LOST in error:
                        lost.add(device)
            seconds = round(time.perf_counter() - began, 4)
            outcomes.append(Outcome(str(device), check.name, error, seconds))
            progress.advance()
    return outcomes


def doctor(device: str | None, backend: str | None, full: bool, as_json: bool) -> int:
    """Say what is here and check it.

    Returns:
        0 if all checks passed, else 1.

    Raises:
        ValueError: for a device or backend that is not there.
    """
    began = time.perf_counter()
    chosen = devices(device)
    for each in chosen:
        backends.why(backend, each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # they are all in the report
        report: dict[str, Any] = {
            "installed": machine.installed(),
            "devices": [machine.describe(each) for each in machine.available()],
            "warnings": machine.warnings(),
        }
        if not as_json:
            print(introduction(report), flush=True)
        outcomes = run(chosen, backend, full, quiet=as_json)
    failed = [outcome for outcome in outcomes if outcome.error]
    seconds = round(time.perf_counter() - began, 2)
    if as_json:
        report |= {
            "checks": [asdict(outcome) for outcome in outcomes],
            "n_checks": len(outcomes),
            "n_failed": len(failed),
            "ok": not failed,
            "seconds": seconds,
        }
        print(json.dumps(report))
    else:
        print(verdict(outcomes, seconds))
    return 1 if failed else 0


def introduction(report: dict[str, Any]) -> str:
    """What is here, for people."""
    facts = report["installed"]
    platforms = (("CUDA", facts["cuda"]), ("HIP", facts["hip"]))
    built = " ".join(f"{name} {version}" for name, version in platforms if version)
    rows = [
        ("fusedaccum", facts["fusedaccum"]),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']} (built for {built or 'CPU'})"),
        ("triton", facts["triton"] or "not installed"),
        ("numpy", facts["numpy"] or "not installed"),
        ("GPU driver", facts["gpu_driver"] or "none found"),
        ("C compiler", facts["c_compiler"] or "none found"),
        ("OpenMP", facts["openmp"] or "none found"),
    ]
    lines = ["installed", *(f"  {name:<12}{value}" for name, value in rows), "", "devices"]
    for device in report["devices"]:
        lines.append(f"  {device['device']:<12}{_device_text(device)}")
        entries = sorted(
            device["backends"].items(), key=lambda item: (item[1]["path"], item[1]["why"])
        )
        for taken, members in groupby(entries, key=lambda item: item[1]):
            dtypes = ", ".join(name for name, _ in members)
            lines.append(f"  {'':<12}{dtypes}: {taken['path']} ({taken['why']})")
    lines += ["", "warnings"]
    lines += [f"  - {text}" for text in report["warnings"]] or ["  none"]
    return "\n".join([*lines, ""])


def _device_text(device: dict[str, Any]) -> str:
    parts = [device["name"]]
    if "capability" in device:
        parts.append(f"capability {device['capability']}")
    if "threads" in device:
        parts.append(f"{device['threads']} threads on {device['usable_cores']:g} cores")
    if "memory_gib" in device:
        free = " free" if device["device"] == "cpu" else ""
        parts.append(f"{device['memory_gib']} GiB{free}")
    return ", ".join(parts)


def verdict(outcomes: Sequence[Outcome], seconds: float) -> str:
    """What the checks found, for people."""
    lines = ["checks against the reference in float64"]
    for name, members in groupby(outcomes, key=lambda outcome: outcome.device):
        own = list(members)
        failed = [outcome for outcome in own if outcome.error]
        took = sum(outcome.seconds for outcome in own)
        result = f"{len(failed)} of {len(own)} failed" if failed else f"{len(own)} passed"
        lines.append(f"  {name:<12}{result} in {took:.1f} s")
        for outcome in failed[:MAX_SHOWN]:
            lines.append(f"    {outcome.name}\n      {_shortened(outcome.error or '')}")
        if len(failed) > MAX_SHOWN:
            lines.append(f"    and {len(failed) - MAX_SHOWN} more (--json has all)")
    n_failed = sum(outcome.error is not None for outcome in outcomes)
    lines.append("")
    if n_failed:
        lines.append(
            f"FAILED: {n_failed} of {len(outcomes)} checks. Do not train with this backend; please "
            "report the output of `python -m fusedaccum doctor --json`"
        )
    else:
        lines.append(f"ok: {len(outcomes)} checks in {seconds:.1f} s")
    return "\n".join(lines)


def _shortened(error: str) -> str:
    """The end of a long message, where compilers say what is wrong."""
    text = " ".join(error.split())
    return text if len(text) <= 400 else f"{text[:120]} ... {text[-270:]}"
