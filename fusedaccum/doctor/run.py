"""`python -m fusedaccum doctor`: is everything here as it should be?"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from .. import backends
from . import machine
from . import steps as check_steps
from . import sums as check_sums
from . import windows as check_windows
from .checks import Check, Runner, Wrong, threads

MAX_SHOWN = 10
# "CUDA error: an illegal memory access" and the like: the device serves nobody afterwards.
LOST = "CUDA error"


# Of a check: `device`, `name`, `error` (what is wrong, by how much and where, or None), `seconds`.
Outcome = dict[str, Any]


def checks_of(device: torch.device, backend: str | None, full: bool) -> list[Check]:
    """Every check of one device."""
    runner = Runner(backends.get(backend, device), device, torch.get_num_threads())
    return [
        *check_sums.all_checks(runner, full),
        *check_steps.all_checks(runner, full),
        *check_windows.all_checks(device, backend, full),
    ]


def run(chosen: Sequence[torch.device], backend: str | None, full: bool) -> list[Outcome]:
    """Run the checks of all devices; one that fails does not stop the others."""
    if any(device.type == "cpu" for device in chosen) and backend != "triton":
        check_steps.compile_ahead(full)
    outcomes: list[Outcome] = []
    for device in chosen:
        found, is_lost = checks_of(device, backend, full), False
        with threads(1):
            for check in found:
                began = time.perf_counter()
                error = "not run: the device failed before" if is_lost else error_of(check)
                is_lost |= error is not None and LOST in error
                outcome = {"device": str(device), "name": check.name, "error": error}
                outcomes.append(outcome | {"seconds": round(time.perf_counter() - began, 4)})
    return outcomes


def error_of(check: Check) -> str | None:
    """Run a check: what is wrong, or None. A kernel that does not compile is a finding too."""
    try:
        check.run()
    except Wrong as found:
        return str(found)
    except Exception as found:
        return f"{type(found).__name__}: {str(found).strip()}"
    return None


def doctor(device: str | None, backend: str | None, full: bool, as_json: bool) -> int:
    """Say what is here and check it.

    Returns:
        0 if all checks passed, else 1.

    Raises:
        ValueError: for a device or backend that is not there.
    """
    began = time.perf_counter()
    chosen = machine.choose(device)
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
        outcomes = run(chosen, backend, full)
    n_failed = sum(outcome["error"] is not None for outcome in outcomes)
    report |= {
        "checks": outcomes,
        "n_checks": len(outcomes),
        "n_failed": n_failed,
        "ok": not n_failed,
        "seconds": round(time.perf_counter() - began, 2),
    }
    print(json.dumps(report) if as_json else verdict(outcomes, report))
    return 1 if n_failed else 0


def introduction(report: dict[str, Any]) -> str:
    """What is here, for people."""
    lines = ["installed"]
    for name, value in report["installed"].items():
        lines.append(f"  {name.replace('_', ' '):<12}{value or 'none'}")
    lines += ["", "devices"]
    for device in report["devices"]:
        lines.append(f"  {device['device']:<12}{device['name']}, {device['size']}")
        for dtype, taken in device["backends"].items():
            lines.append(f"  {'':<12}{dtype}: {taken['path']} ({taken['why']})")
    lines += ["", "warnings", *(f"  - {text}" for text in report["warnings"] or ["none"])]
    return "\n".join([*lines, "", "checks against the reference in float64"])


def verdict(outcomes: Sequence[Outcome], report: dict[str, Any]) -> str:
    """What the checks found, for people."""
    lines = []
    for name, members in groupby(outcomes, key=itemgetter("device")):
        own = list(members)
        failed = [outcome for outcome in own if outcome["error"]]
        took = sum(outcome["seconds"] for outcome in own)
        result = f"{len(failed)} of {len(own)} failed" if failed else f"{len(own)} passed"
        lines.append(f"  {name:<12}{result} in {took:.1f} s")
        for outcome in failed[:MAX_SHOWN]:
            lines.append(f"    {outcome['name']}\n      {_shortened(outcome['error'])}")
        if len(failed) > MAX_SHOWN:
            lines.append(f"    and {len(failed) - MAX_SHOWN} more (--json has all)")
    if report["ok"]:
        return "\n".join([*lines, "", f"ok: {len(outcomes)} checks in {report['seconds']:.1f} s"])
    return "\n".join(lines) + (
        f"\n\nFAILED: {report['n_failed']} of {len(outcomes)} checks. Do not train with this "
        "backend; please report the output of `python -m fusedaccum doctor --json`"
    )


def _shortened(error: str) -> str:
    """The end of a long message, where compilers say what is wrong."""
    text = " ".join(error.split())
    return text if len(text) <= 400 else f"{text[:120]} ... {text[-270:]}"
