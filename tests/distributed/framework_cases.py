"""What test_frameworks.py runs by torchrun: each framework's own loop, on its own strategy.

    torchrun --nproc-per-node 2 -m tests.distributed.framework_cases FOLDER CASE...

A case trains three times in fp32: with the plain optimizer, with that one nudged by what rounding
may do (tests/same_runs.py), and with the wrapper.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests import frameworks as fw
from tests import lightning_module as lm
from tests.distributed.ddp_cases import Report, is_same_everywhere

N = 4
UPDATES = 12
RATE = 1e-2


def compared(train: Callable[[fw.Wrap], fw.Run]) -> Report:
    """How the wrapper's run differs from the plain one; how one with another rate does."""
    runs = {name: train(fw.WRAPS[name]) for name in ("plain", "nudged", "ours", "faster")}
    plain, nudged = runs["plain"], runs["nudged"]
    fell = torch.tensor(sum(plain.losses[:4]) - sum(plain.losses[-4:]))
    dist.all_reduce(fell)
    return {
        "differences": fw.differences(runs["ours"], plain, nudged),
        "control": len(fw.differences(runs["faster"], plain, nudged)),
        "same": is_same_everywhere(list(runs["ours"].model.parameters())),
        "learnt": float(fell) > 0,
    }


def trainer(_: str) -> Report:
    """transformers' Trainer, which makes DDP after the optimizer."""

    def train(wrap: fw.Wrap) -> fw.Run:
        model = fw.tiny_llama()
        with tempfile.TemporaryDirectory() as out:
            changes = {"learning_rate": RATE, "max_steps": UPDATES, "ddp_backend": "gloo"}
            settings = transformers.TrainingArguments(**fw.trainer_settings(out) | changes)
            made = transformers.Trainer(model, settings, train_dataset=fw.sequences())
            made.optimizer = wrap(made.create_optimizer())
            assert settings.world_size == dist.get_world_size()
            return fw.finished(made)

    return compared(train)


def accelerate(how: str) -> Report:
    """A loop with accumulate(); the last window of an epoch is short."""

    def train(wrap: fw.Wrap) -> fw.Run:
        torch.manual_seed(0)
        plugin = GradientAccumulationPlugin(num_steps=N, sync_each_batch=how == "each")
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        model = fw.tiny_llama()
        inner = torch.optim.AdamW(model.parameters(), lr=RATE)
        nudged = fw.WRAPS["nudged"]
        opt = nudged(inner) if wrap is nudged else wrap(inner)
        loader = DataLoader(fw.sequences(60), fw.MICRO_BATCH, collate_fn=fw.collate)  # type: ignore[arg-type]
        net, prepared, loader = accelerator.prepare(model, opt, loader)
        run = fw.Run(model, opt)
        for _ in range(3):
            for batch in loader:
                with accelerator.accumulate(net):
                    loss = net(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(net.parameters(), 1.0)
                        run.norms.append(float(norm))
                        run.losses.append(float(loss))
                    prepared.step()
                    prepared.zero_grad()
        assert len(run.norms) == 12  # an epoch is 15 micro-batches: three windows and a short one
        fw.reset()
        return run

    return compared(train)


def lightning(_: str) -> Report:
    """Automatic optimization on the DDP strategy."""

    def train(wrap: fw.Wrap) -> fw.Run:
        module = lm.Module(lambda params: wrap(torch.optim.AdamW(params, lr=RATE)))
        fitted = Trainer(
            max_epochs=3,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=DDPStrategy(process_group_backend="gloo"),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fitted.fit(module, lm.loader())
        return fw.Run(module, fitted.optimizers[0], module.losses, module.norms)

    return compared(train)


def main(folder: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for case in cases:
        name, _, how = case.partition(":")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                results[case] = globals()[name](how)
        except Exception:
            results[case] = traceback.format_exc()
        torch.save(results, f"{folder}/results-{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ, "to be started by torchrun"
    main(sys.argv[1], sys.argv[2:])
