"""`python -m benchmarks.gpu`: everything that needs a GPU, in one command or in four.

Takes the machine as it is: its own torch, Triton and pytest; nothing of ours installed, no network.
Each part is a process of its own with a time limit, so that a failure costs one part: the tests
marked `gpu`, compute-sanitizer, the doctor, single operations, whole windows, training end to end,
GEMMs that accumulate (and windows of two processes, on two GPUs), other choices for the kernels,
torch.compile, the demo, and figures. PART=tests,micro runs some of them, and PART=check, rows,
train or choices a group, whose limits add up to less than 9 minutes; what the machine lacks is
skipped and said. Tables are printed and rows saved as they come. Writes at most 10 files to $OUT,
the figures in one archive; without it results go to benchmarks/results/<device>/ and the log to
out/. Exits 1 if a part failed and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from .measure import ROOT, new_path, results_folder

LOG = "gpu.log"
NO_TESTS = 5  # pytest's exit status where it found none


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        arguments: its command, after `python`.
        limit_s: its time limit, on a GPU; a dry run has none.
        in_folder: whether it runs in a folder for its files.
        passes: exit statuses that are no failure.
        needs: a module without which it is skipped.
    """

    arguments: Sequence[str]
    limit_s: int
    in_folder: bool = False
    passes: tuple[int, ...] = (0,)
    needs: str = "torch"


def parts(dry_run: bool, results: Path) -> dict[str, Part]:
    """All parts, in their order."""
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    demo = [str(ROOT / "examples" / "finetune.py"), "--out", "."]
    if dry_run:
        own = ["--device", "cpu", "--backend", "triton"]
        # Kernels are interpreted, and the gate runs as many micro-batches.
        quick, n, train = [*own, "--quick", "--rounds", "1"], "2", ["--tokens", "16,32"]
        # Collecting all tests imports every framework; dry, those of one file are enough.
        tests += ["tests/backends/test_gpu.py"]
        demo += ["--device", "cpu", "--quick"]
    else:
        own = quick = ["--device", "cuda"]
        n, train = "8", ["--budget", "4"]
        # There are hundreds of kernel variants to compile.
        tests += ["tests", *(["-n", "4"] if find_spec("xdist") else [])]
        demo += ["--device", "cuda", "--updates", "12"]
    run = ["-m", "benchmarks.run", *quick, "--n", n]
    micro = [*run, "--forms", "eager", "--only", "micro", "--budget", "2"]
    cycle = [*run, "--forms", "eager", "--only", "cycle", "--budget", "3"]
    cycle += ["--n", "1,2" if dry_run else "1,4,8,16"]
    doctor = ["-m", "fusedaccum", "doctor", *(["--help"] if dry_run else [])]
    return {
        "tests": Part(tests, 240, passes=(0, NO_TESTS) if dry_run else (0,)),
        "sanitize": Part(["-m", "benchmarks.sanitize", *own], 180),
        "doctor": Part(doctor, 90),
        "micro": Part(micro, 140),
        "cycle": Part(cycle, 180),
        "linear": Part([*run, "--only", "linear", "reduction", "--budget", "0.5"], 60),
        "host": Part([*run, "--only", "host"], 60),
        # Of each choice some ten kernels have to be compiled.
        "variants": Part([*run, "--only", "variants", "--budget", "1"], 300),
        "end_to_end": Part(["-m", "benchmarks.end_to_end", *quick, *train], 200),
        # Late: what it costs is unknown before Inductor has seen hundreds of tensors in one call.
        "compiled": Part([*run, "--forms", "compiled", "--budget", "2"], 200),
        "demo": Part(demo, 80, in_folder=True),
        "plots": Part(["-m", "benchmarks.plot", str(results)], 30, needs="matplotlib"),
    }


# Each fits a call of ten minutes, all limits reached.
GROUPS = {
    "check": ("tests", "sanitize", "doctor"),
    "rows": ("micro", "cycle", "linear", "host", "plots"),
    "train": ("end_to_end", "compiled", "demo", "plots"),
    "choices": ("variants",),
}


def choose(text: str, allowed: Iterable[str]) -> tuple[list[str], list[str]]:
    """The parts that PART names, groups too, and what names none."""
    names = [name.strip() for name in text.split(",")]
    wanted = [part for name in names for part in GROUPS.get(name, (name,))]
    return wanted, [part for part in wanted if part not in allowed]


def start(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `python ARGUMENTS` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_part(part: Part, folder: Path, log: Path, dry_run: bool) -> tuple[str, str]:
    """Run a part. Returns what became of it, and what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if dry_run:
        # One thread: it is about the code, and tiny tensors gain nothing from more.
        environment |= {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1"}
        environment |= {"OMP_NUM_THREADS": "1"}
    else:
        environment["TRITON_INTERPRET"] = "0"  # the tests would choose the interpreter
    with log.open("ab") as stream:
        stream.write(f"\n$ python {' '.join(part.arguments[:4])} ...\n".encode())
        stream.flush()
        begins = stream.tell()
        process = start(part.arguments, folder if part.in_folder else ROOT, environment, stream)
        try:
            code = process.wait(timeout=None if dry_run else part.limit_s)
            outcome = "passed" if code in part.passes else f"FAILED with exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: not done after {part.limit_s} s"
        finally:
            # Also what it started: compilers, workers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_bytes()[begins:].decode(errors="replace")
    return outcome, text


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="the same paths, tiny, on the CPU")
    dry_run = parser.parse_args(argv).dry_run
    if not dry_run and not torch.cuda.is_available():
        print("no CUDA device here (torch.cuda.is_available() is False): nothing was run")
        return 2
    results = results_folder(torch.device("cpu" if dry_run else "cuda"))
    chosen = parts(dry_run, results)
    wanted, unknown = choose(os.environ.get("PART", ",".join(chosen)), chosen)
    if unknown:
        print(f"PART={','.join(unknown)} is unknown; allowed: {', '.join((*GROUPS, *chosen))}")
        return 2
    logs = Path(os.environ.get("OUT") or ROOT / "out")
    logs.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.perf_counter(), {}
    for name in wanted:
        part = chosen[name]
        print(f"--- {name}", flush=True)
        if find_spec(part.needs) is None:
            outcomes[name] = f"skipped: no module {part.needs}"
            continue
        part_began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome, text = run_part(part, Path(folder), logs / LOG, dry_run)
            for file in sorted(Path(folder).iterdir()):
                place = results / "plots" if file.suffix == ".png" else results
                place.mkdir(exist_ok=True)
                shutil.move(file, new_path(place, file.name))
        print(text[-3000:].rstrip(), flush=True)
        outcomes[name] = f"{outcome} ({time.perf_counter() - part_began:.0f} s)"
    if "OUT" in os.environ:
        pack(results / "plots")
    print(f"--- summary ({time.perf_counter() - began:.0f} s)")
    for name, outcome in outcomes.items():
        print(f"{name:<10} {outcome}")
    return 0 if not any(outcome.startswith("FAILED") for outcome in outcomes.values()) else 1


def pack(folder: Path) -> None:
    """Make one file of a folder: what comes back from a GPU machine may be few files."""
    if folder.is_dir():
        with tarfile.open(new_path(folder.parent, f"{folder.name}.tar.gz"), "w:gz") as archive:
            archive.add(folder, folder.name)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
