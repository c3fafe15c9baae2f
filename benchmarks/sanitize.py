"""`python -m benchmarks.sanitize`: every kernel once, under compute-sanitizer where that is there.

memcheck sees an access outside a tensor. racecheck would see shared memory only, of which Triton's
compiler alone makes use. The operations are accumulate, norm, finalize and step, of tensors around
a chunk's end, aligned and not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import torch

from fusedaccum import functional
from fusedaccum.backends import reference
from fusedaccum.bench import gate
from fusedaccum.doctor import checks
from fusedaccum.doctor.plan import Plan

from . import cases
from .measure import ROOT
from .ours import Operations

TOOL = "memcheck"
FOUND_SOMETHING = 9


def once(device: torch.device, backend: str | None) -> None:
    """Run each operation, of a rule with states and of one with few, against float64.

    Raises:
        Wrong: if a mean gradient, a parameter or a norm is wrong, so that nothing ran on junk.
    """
    for dtype in (torch.bfloat16, torch.float32):
        like = torch.empty(0, dtype=dtype, device=device)
        for optimizer in ("adamw", "sgd"):
            gate.gate(Operations, Plan(optimizer, 2, backend=backend), like, cases.tiny())
        for offset in (0, 1):
            tensors = cases.random(cases.tiny(), dtype, device, seed=1, offset=offset)
            norm = float(functional.global_norm(tensors, backend=backend))
            checks.require_number("norm", norm, float(reference.global_norm(tensors)), 1e-5)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("accumulate, norm, finalize, step: each ran, and is right")


def find() -> str | None:
    """compute-sanitizer: on the PATH, in a CUDA toolkit, or in one of NVIDIA's wheels."""
    folders = [os.environ["PATH"], *glob("/usr/local/cuda*/bin")]
    folders += glob("/usr/local/cuda*/compute-sanitizer")
    wheels = Path(sysconfig.get_path("purelib")).rglob("compute-sanitizer")
    folders += [str(path.parent) for path in wheels]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if it found something."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("triton", "torch"), help="fusedaccum's")
    parser.add_argument("--once", action="store_true", help="without a tool")
    args = parser.parse_args(argv)
    # First without a tool, which also compiles the kernels: compilers are slow under one.
    once(torch.device(args.device), args.backend)
    if args.once:
        return 0
    tool = find()
    if tool is None or args.device == "cpu":
        why = "compute-sanitizer is not on this machine" if tool is None else "no kernel on a CPU"
        print(f"SKIPPED {TOOL}: {why}")
        return 0
    # Without torch's own allocator, so that a tensor's end is the end of an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", TOOL, "--error-exitcode", str(FOUND_SOMETHING)]
    command += [sys.executable, "-m", "benchmarks.sanitize", "--once"]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    print(f"{TOOL}: {'nothing found' if code == 0 else f'exit status {code}'}", flush=True)
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
