"""Many small programs, each in a process of its own, without importing torch for each.

One process imports torch and fusedaccum and uses neither. It forks for each program, which starts
from there with an environment of its own.

    python -m tests.forked       programs as JSON lines on stdin, what came of them on stdout
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 3600  # of a program that hangs; a busy machine is no fault


@dataclass(frozen=True)
class Result:
    """What came of a program: exit status (negative: the signal that ended it) and its output."""

    status: int
    output: str


class Forked:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, environment: dict[str, str], copies: int = 1) -> list[Result]:
        """Run `copies` of a program at the same time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([program, environment, copies]) + "\n")
        self._process.stdin.flush()
        return [Result(*pair) for pair in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.communicate()


@functools.cache
def shared() -> Forked:
    """The one of this process, started when it is first asked for."""
    made = Forked()
    atexit.register(made.close)
    return made


def _child(program: str, environment: dict[str, str], output: IO[Any]) -> None:
    """Never returns."""
    signal.alarm(SECONDS)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    status = 1
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    import torch

    import fusedaccum  # noqa: F401
    from fusedaccum.backends.compiled import openmp
    from fusedaccum.doctor import machine  # noqa: F401

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # which imports more
    torch.set_num_threads(1)
    openmp._is_forked = False  # also in what is forked: no team of threads was there before
    os.register_at_fork(after_in_child=lambda: setattr(openmp, "_is_forked", False))
    for line in sys.stdin:
        program, environment, copies = json.loads(line)
        outputs = [tempfile.TemporaryFile() for _ in range(copies)]  # noqa: SIM115
        children = []
        for output in outputs:
            child = os.fork()
            if child == 0:
                _child(program, environment, output)
            children.append(child)
        results = []
        for child, output in zip(children, outputs, strict=True):
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            results.append((status, output.read().decode("utf-8", "replace")))
            output.close()
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
