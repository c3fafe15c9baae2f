"""Training processes killed with SIGKILL, resumed from their last checkpoint, compared to the bit.

    python -m tests.kills                   36 kills, four of each kind of optimizer
    python -m tests.kills adafactor         of kinds with that in their name
    python -m tests.kills --json            a line for each kind

A run is killed at a point that a seed chooses, by counting micro-batches and lines and not by time:
in a backward, in a step(), while a checkpoint is written, or after it was. Checkpoints are written
at some micro-batches, between backward() and step() too, and each process that resumes writes at
once again what it has loaded. Each kind is a control as well: with a number of each checkpoint
changed, the end must differ. This process imports torch once and forks; it runs no operation of
torch itself, so that a child misses no thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedaccum import FusedAccumOptimizer
from tests.runs import differences
from tests.traps import OPTIMIZERS, PACKAGE, AtLine

N = 4  # micro-batches per window
STOP = 6 * N
KILLS = 4
WEIGHTS = (3.0, 5.0, 2.0, 7.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained. `make` makes the optimizer, `options` are the wrapper's."""

    name: str
    make: Callable[[Any], torch.optim.Optimizer]
    dtype: torch.dtype
    steps: int | None = N
    weighted: bool = False
    scaled: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
TRAININGS = [
    Training("adamw-bf16-split", _adamw, bf16, options={"max_grad_norm": 1.0}),
    Training("adamw-bf16-weighted", _adamw, bf16, weighted=True),
    Training("adamw-bf16-loop", _adamw, bf16, steps=None),
    Training(
        "adamw-bf16-stochastic",
        _adamw,
        bf16,
        options={"master_weights": "none", "stochastic_rounding": True, "seed": 3},
    ),
    Training("adamw-fp16-scaler", _adamw, fp16, scaled=True),
    Training("sgd-momentum-fp32", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), fp32),
    Training("nadam-fp32", lambda p: torch.optim.NAdam(p, lr=0.01), fp32),
    Training("adafactor-bf16", lambda p: torch.optim.Adafactor(p, lr=0.01), bf16),
    Training("muon-bf16", lambda p: torch.optim.Muon(p, lr=0.01), bf16),
]


class Process:
    """One life of a training run, in a child process.

    Args:
        path: of the checkpoint, which it resumes from if there is one.
        sabotage: change a state in every checkpoint, which must be seen in the end.
    """

    def __init__(self, training: Training, path: Path, sabotage: bool) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.training, self.path, self.sabotage = training, path, sabotage
        # Matrices only: Muon takes nothing else.
        layers = [nn.Linear(a, b, bias=False) for a, b in ((7, 33), (33, 41), (41, 5))]
        gelu = nn.GELU()
        self.model = nn.Sequential(layers[0], gelu, layers[1], gelu, layers[2]).to(training.dtype)
        self.scaler: Any = None
        if training.scaled:  # starts with overflows, and grows into the next
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=6)
        self.opt = FusedAccumOptimizer(
            training.make(self.model.parameters()),
            training.steps,
            grad_scaler=self.scaler,
            **training.options,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, STOP // N)
        self.i, self.is_open = 0, False  # the next micro-batch, and whether its backward() has run
        if path.exists():
            self._resume()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "at": (self.i, self.is_open),
        }

    def _resume(self) -> None:
        saved = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["opt"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
            self.scaler.scale(torch.zeros(()))  # without which it refuses a step()
        self.i, self.is_open = saved["at"]
        lost = list(differences(saved, torch.load(io.BytesIO(self._bytes()), weights_only=True)))
        if lost:
            self.path.with_suffix(".lost").write_text("\n".join(lost))
        self.save(None)

    def _bytes(self) -> bytes:
        state = self.state()
        if self.sabotage:
            for entry in state["opt"]["state"].values():
                for name in ("master_param", "exp_avg", "momentum_buffer"):
                    if name in entry:
                        entry[name] = entry[name] * (1 + 2**-7)
                        break
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def save(self, kill: Kill | None) -> None:
        """All of it or nothing."""
        written, new = self._bytes(), self.path.with_suffix(".new")
        if kill is not None and kill.place == "save":
            new.write_bytes(written[: int(len(written) * kill.share)])
            die()
        new.write_bytes(written)
        os.replace(new, self.path)

    # --- the loop ---

    def backward(self) -> None:
        generator = torch.Generator().manual_seed(self.i)
        x = torch.randn(8, 7, generator=generator).to(self.training.dtype)
        loss = (self.model(x) - x[:, :5]).float().square().mean()
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        if self.training.weighted:
            with self.opt.micro_batch(weight=WEIGHTS[self.i % len(WEIGHTS)]):
                loss.backward()
        else:
            loss.backward()

    def step(self) -> None:
        if self.training.steps is None and (self.i + 1) % N:
            return
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
            self.scaler.update()
        self.opt.zero_grad()
        if self.opt.window_closed:
            self.scheduler.step()

    def run(self, kill: Kill | None) -> None:
        """Train to the end, or to a kill."""
        while self.i < STOP:
            due = kill if kill is not None and kill.i == self.i else None
            if not self.is_open:
                self._do(self.backward, due)
                self.is_open = True
                if self.i % 3 != 1:
                    self.save(due)
            self._do(self.step, due)
            self.i, self.is_open = self.i + 1, False
            if self.i % 3:
                self.save(due)
            if due is not None:
                die()
        torch.save(self.state(), self.path.with_suffix(".end"))

    @staticmethod
    def _do(operation: Callable[[], None], kill: Kill | None) -> None:
        if kill is None or kill.place != operation.__name__:
            operation()
            return
        with DieAtLine(kill.line).armed(None):
            operation()
        die()


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where a process is killed: in micro-batch `i`, at a line of `place` or after its last."""

    i: int
    place: str
    line: int
    share: float  # of a checkpoint that is written


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtLine(AtLine):
    def __init__(self, k: int) -> None:
        super().__init__(k, KeyboardInterrupt, (PACKAGE, OPTIMIZERS))

    def spring(self, error: BaseException, where: str) -> None:
        die()


def kills(training: Training, n: int) -> list[Kill]:
    """`n` of them, in the order of the run, the same for the same seed."""
    draw = random.Random(training.name)
    places = ["backward", "step", "save", "step"]
    draw.shuffle(places)
    return [
        Kill(i, places[k % len(places)], draw.randrange(400), draw.random())
        for k, i in enumerate(sorted(draw.sample(range(2, STOP), n)))
    ]


def live(training: Training, path: Path, kill: Kill | None, sabotage: bool) -> bool:
    """One process, from the checkpoint at `path`: whether it was killed.

    Raises:
        ChildProcessError: if it ended otherwise.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Process(training, path, sabotage).run(kill)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status != 0:
        raise ChildProcessError(f"{training.name}: a training process failed, {kill}")
    return killed


def survive(training: Training, n: int, directory: Path) -> dict[str, Any]:
    """Train undisturbed, through `n` kills, and through one with sabotage: what differs."""
    undisturbed = directory / f"{training.name}.pt"
    if live(training, undisturbed, None, False):
        raise ChildProcessError(f"{training.name}: the undisturbed run was killed")
    end = torch.load(undisturbed.with_suffix(".end"), weights_only=True)
    return {
        "name": training.name,
        "kills": n,
        "skipped": end["opt"]["fusedaccum"]["skipped_steps"],
        **_disturbed(training, kills(training, n), directory / f"{training.name}-killed.pt", end),
        "control": _disturbed(
            training,
            [Kill(STOP // 2, "step", 0, 0.0)],
            directory / f"{training.name}-control.pt",
            end,
            sabotage=True,
        ),
    }


def _disturbed(
    training: Training, points: list[Kill], path: Path, end: dict[str, Any], sabotage: bool = False
) -> dict[str, Any]:
    for kill in points:
        if not live(training, path, kill, sabotage):
            raise ChildProcessError(f"{training.name}: not killed, {kill}")
    if live(training, path, None, sabotage):
        raise ChildProcessError(f"{training.name}: the last process was killed")
    ours, lost = torch.load(path.with_suffix(".end"), weights_only=True), path.with_suffix(".lost")
    weights = [(value, ours["model"][name]) for name, value in end["model"].items()]
    return {
        "weights": sum(a.numel() for a, _ in weights),
        "differing_weights": sum(int((a != b).sum()) for a, b in weights),
        "differences": list(differences(end, ours)),
        "lost_by_loading": lost.read_text().splitlines() if lost.exists() else [],
    }


def report(end: dict[str, Any]) -> None:
    print(
        f"{end['name']}: {end['kills']} kills, {end['differing_weights']} of {end['weights']} "
        f"weights differ, {len(end['differences'])} differences in all, "
        f"{len(end['lost_by_loading'])} numbers lost by loading; "
        f"control: {end['control']['differing_weights']} weights differ"
    )
    for what in ("differences", "lost_by_loading"):
        for line in end[what][:5]:
            print(f"    {what}: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="kinds with this in their name")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each kind")
    parser.add_argument("--json", action="store_true", help="a line for each kind")
    args = parser.parse_args(argv)
    # A child would import it for the first optimizer that it makes, and take seconds.
    importlib.import_module("torch._dynamo")
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for training in TRAININGS:
            if args.name not in training.name:
                continue
            end = survive(training, args.kills, Path(directory))
            found.append(end)
            if args.json:
                print(json.dumps(end))
            else:
                report(end)
    bad = [
        end["name"]
        for end in found
        if end["differences"] or end["lost_by_loading"] or not end["control"]["differences"]
    ]
    if not args.json:
        total = sum(end["kills"] for end in found)
        print(f"{total} kills, {len(found)} kinds, {len(bad)} not the same to the bit")
    return 1 if bad or not found else 0


if __name__ == "__main__":
    raise SystemExit(main())
