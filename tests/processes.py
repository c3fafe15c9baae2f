"""Processes of one gloo group, started once for a list of cases."""

from __future__ import annotations

import datetime
import importlib
import os
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import forked

ROOT = Path(__file__).resolve().parents[1]


def _work(rank: int, world: int, module: str, cases: Sequence[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Not the environment of whoever calls `run`: the server has that of its first caller.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), FOLDER=folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group-{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(hours=1),  # a busy machine is no fault
    )
    results: dict[str, Any] = {}
    for case in cases:
        name, _, argument = case.partition(":")
        raised = False
        try:
            results[case] = getattr(importlib.import_module(module), name)(
                *([argument] if argument else [])
            )
        except Exception:
            results[case], raised = traceback.format_exc(), True
        torch.save(results, f"{folder}/results-{world}-{rank}")
        if raised:
            os._exit(1)  # others may wait for this process, and raise when it is gone
    dist.destroy_process_group()


def run(module: str, cases: Sequence[str], world: int, folder: Path) -> list[dict[str, Any]]:
    """Run functions of a module in each process of a group.

    Args:
        module: where they are.
        cases: "name" or "name:argument" of each; every process runs all, in this order.
        world: how many processes.
        folder: for what they exchange; FOLDER in the environment of each.

    Returns:
        For each process, what each case returned; the traceback where it raised, which is the end
        of that process. One that died has the results from before, if there are any.
    """
    # A server imports torch and the module once, and forks for each process.
    preload = [__name__, module, "tests.frozen"]
    mp.get_context("forkserver").set_forkserver_preload(preload)
    arguments = world, module, cases, str(folder)
    processes = mp.start_processes(
        _work, arguments, nprocs=world, join=False, start_method="forkserver"
    ).processes
    for process in processes:
        process.join()
    paths = [folder / f"results-{world}-{rank}" for rank in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() else {} for path in paths]


def message(call: Callable[[], Any]) -> str | None:
    """What `call` raises, as "Type: text"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


TORCHRUN = """
import os
from torch.distributed.run import main
os.chdir({cwd!r})
main({options!r})
"""


def torchrun(n: int, *program: str, cwd: Path = ROOT) -> str:
    """What `n` processes print, which torchrun starts; an AssertionError if one fails."""
    options = ["--nproc-per-node", str(n), "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", "localhost:0", *program]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # torchrun itself needs no process that imports torch anew; those that it starts are.
    (done,) = forked.shared().run(TORCHRUN.format(cwd=str(cwd), options=options), environment)
    assert done.status == 0, done.output[-5000:]
    return done.output


def agreeing(results: list[dict[str, Any]]) -> Callable[[str], Any]:
    """What a case returned, which must be the same in all processes."""

    def of(case: str) -> Any:
        for result in results:
            raised = [found for found in result.values() if isinstance(found, str)]
            assert isinstance(result.get(case), dict), "\n".join(raised)
        first = results[0][case]
        assert all(result[case] == first for result in results)
        return first

    return of


class Groups:
    """Groups of several sizes that run cases of one module, each when it is first asked for.

    Args:
        module, folder: see `run`.
        cases: by the number of processes.
        first: the size of a group whose cases the others need, if there is one.
    """

    def __init__(
        self,
        module: str,
        cases: Mapping[int, Sequence[str]],
        folder: Path,
        first: int | None = None,
    ) -> None:
        self._module, self._cases, self._folder, self._first = module, cases, folder, first
        self._ran: dict[int, Callable[[str], Any]] = {}

    def __call__(self, world: int, case: str) -> Any:
        """What a case returned in a group of `world` processes; see `agreeing`."""
        for size in (self._first, world):
            if size is not None and size not in self._ran:
                results = run(self._module, self._cases[size], size, self._folder)
                self._ran[size] = agreeing(results)
        return self._ran[world](case)
