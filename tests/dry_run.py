"""`python -m benchmarks.gpu --dry-run` whose processes are forked from one.

That one imports what all of them need, which takes longer than most of what they do, and spares
Triton's interpreter most of its work. The part `doctor` is started as on a GPU machine.

    OUT=FOLDER python -m tests.dry_run
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch.multiprocessing import start_processes

from benchmarks import gpu, host, linear, reduction  # noqa: F401
from tests import interpreter

STARTED = "doctor"
start = gpu.start


class Forked(multiprocessing.get_context("fork").Process):  # type: ignore[name-defined,misc]
    """With what `gpu.run_part` asks of a process."""

    def wait(self, timeout: float | None = None) -> Any:
        self.join(timeout)
        return self.exitcode


def fork(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], output: IO[bytes]
) -> Any:
    """Instead of `gpu.start`."""
    if STARTED in arguments:
        return start(arguments, folder, environment, output)
    process = Forked(target=work, args=(arguments, folder, environment, output))
    process.start()
    return process


def work(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], output: IO[bytes]
) -> None:
    """What `python ARGUMENTS` does."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.chdir(folder)
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.modules.pop(sys.argv[0], None)  # or runpy warns
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(sys.argv[0], run_name="__main__")


def fork_group(*task: Any) -> None:
    """Instead of `spawn`, which pickles what it gives to the processes."""
    start_processes(*pickle.loads(pickle.dumps(task)), start_method="fork")


if __name__ == "__main__":
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # which imports more
    importlib.import_module("tests.frozen")
    interpreter.install()
    gpu.start = fork
    reduction.spawn = fork_group
    sys.exit(gpu.main(["--dry-run"]))
