"""What test_frameworks.py runs by torchrun: each framework's own loop, on its own strategy.

    torchrun --nproc-per-node 2 -m tests.distributed.framework_cases FOLDER CASE...

A case trains in fp32 with the plain optimizer, with that one nudged by what rounding may do
(tests/same_runs.py), and with the wrapper; on DDP also with another rate, which must be seen.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from fusedaccum import FusedAccumOptimizer
from tests import frameworks as fw
from tests import lightning_module as lm
from tests.distributed.ddp_cases import Report, is_same_everywhere, whole
from tests.processes import message

N = 4
UPDATES = 8
RATE = 1e-2
STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "fsdp2": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
}


class Sharded(lm.Module):
    """The module on FSDP2, as Lightning has it: in configure_model()."""

    def configure_model(self) -> None:
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def compared(train: Callable[[fw.Wrap], fw.Run], engine: str) -> Report:
    """How the wrapper's run differs from the plain one; on DDP, how one with another rate does."""
    names = ("plain", "nudged", "ours", *(["faster"] if engine == "ddp" else []))
    runs = {name: train(fw.WRAPS[name]) for name in names}
    plain, nudged = runs["plain"], runs["nudged"]
    fell = torch.tensor(sum(plain.losses[:4]) - sum(plain.losses[-4:]))
    dist.all_reduce(fell)
    return {
        "differences": fw.differences(runs["ours"], plain, nudged),
        "control": len(fw.differences(runs["faster"], plain, nudged)) if "faster" in runs else 3,
        "same": is_same_everywhere([whole(p) for p in runs["ours"].model.parameters()]),
        "learnt": float(fell) > 0,
    }


def trainer(engine: str) -> Report:
    """transformers' Trainer, which makes DDP, or shards, after the optimizer."""

    def train(wrap: fw.Wrap) -> fw.Run:
        model = fw.tiny_llama()
        with tempfile.TemporaryDirectory() as out:
            changes = {"learning_rate": RATE, "max_steps": UPDATES, "ddp_backend": "gloo"}
            settings = transformers.TrainingArguments(**fw.trainer_settings(out) | changes)
            made = transformers.Trainer(model, settings, train_dataset=fw.sequences())
            made.optimizer = wrap(made.create_optimizer())
            if engine == "fsdp2":
                shard(made.accelerator)
                made.is_fsdp_enabled = True
            assert settings.world_size == dist.get_world_size()
            return fw.finished(made)

    return compared(train, engine)


def shard(accelerator: Accelerator) -> None:
    """Have Accelerate use FSDP2, which it chooses on accelerators only."""
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )


def accelerator_of(engine: str, when: str = "each") -> Accelerator:
    """It reduces at the end of a "window", or in "each" micro-batch."""
    counts = GradientAccumulationPlugin(num_steps=N, sync_each_batch=when == "each")
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=counts)
    if engine == "fsdp2":
        shard(accelerator)
    return accelerator


def accelerate(engine: str, when: str) -> Report:
    """A loop with accumulate(); the last window of an epoch is short."""

    def train(wrap: fw.Wrap) -> fw.Run:
        torch.manual_seed(0)
        accelerator = accelerator_of(engine, when)
        model = fw.tiny_llama()
        inner = torch.optim.AdamW(model.parameters(), lr=RATE)
        nudged = fw.WRAPS["nudged"]
        opt = nudged(inner) if wrap is nudged else wrap(inner)
        loader = DataLoader(fw.sequences(60), fw.MICRO_BATCH, collate_fn=fw.collate)  # type: ignore[arg-type]
        net, prepared, loader = accelerator.prepare(model, opt, loader)
        run = fw.Run(model, opt)
        for _ in range(2):
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
        assert len(run.norms) == 8  # an epoch is 15 micro-batches: three windows and a short one
        fw.reset()
        return run

    return compared(train, engine)


def arrives(dtype: str) -> Report:
    """A model of bf16 that Accelerate shards after the optimizer was made: gradients arrive in fp32
    from the first backward on."""
    accelerator = accelerator_of("fsdp2")
    model = fw.tiny_llama(getattr(torch, dtype))
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=RATE))
    loader = DataLoader(fw.sequences(8), fw.MICRO_BATCH, collate_fn=fw.collate)  # type: ignore[arg-type]
    net, prepared, loader = accelerator.prepare(model, opt, loader)
    accelerator.backward(net(**next(iter(loader))).loss)
    dtypes = {str(p.grad.dtype) for p in net.parameters()}
    prepared.step()
    is_step = {int(entry["step"]) for entry in opt.state_dict()["state"].values()}
    fw.reset()
    return {"gradients": dtypes, "steps": is_step, "repr": repr(opt)}


def resumed(dtype: str) -> Report:
    """save_state() and load_state() on FSDP2, between windows: how far the resumed run ends."""
    folder = f"{os.environ['FOLDER']}/{dtype}"

    def run(seed: int, begins: int, ends: int) -> fw.Run:
        accelerator = accelerator_of("fsdp2")
        model = fw.tiny_llama(getattr(torch, dtype), seed)
        opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=RATE))
        net, prepared = accelerator.prepare(model, opt)
        if begins:
            accelerator.load_state(folder)
        data = fw.sequences(64)[dist.get_rank() :: 2]
        for i in range(begins, ends):
            with accelerator.accumulate(net):
                accelerator.backward(net(**fw.collate([data[i]])).loss)
                prepared.step()
                prepared.zero_grad()
        if not begins:
            accelerator.save_state(folder)
        fw.reset()
        return fw.Run(model, opt)

    run(0, 0, 2 * N)
    ended, other = run(1, 2 * N, 5 * N), run(0, 0, 5 * N)
    return {"off": fw.distance(ended.model, other.model)}


def part(_: str) -> Report:
    """Accelerate writes the states of rank 0, but all processes share them out."""
    accelerator = accelerator_of("ddp")
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), shard_states=True)
    net, prepared = accelerator.prepare(model, opt)
    accelerator.backward(net(**fw.collate(fw.sequences(2))).loss)
    prepared.step()
    error = message(lambda: accelerator.save_state(os.environ["FOLDER"]))
    fw.reset()
    return {"error": error}


def lightning(strategy: str) -> Report:
    """Automatic optimization on the DDP or ModelParallel (FSDP2) strategy."""

    def train(wrap: fw.Wrap) -> fw.Run:
        kind = Sharded if strategy == "fsdp2" else lm.Module
        module = kind(lambda params: wrap(torch.optim.AdamW(params, lr=RATE)))
        fitted = Trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            gradient_clip_algorithm="norm",
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=STRATEGIES[strategy](process_group_backend="gloo"),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fitted.fit(module, lm.loader())
        return fw.Run(module, fitted.optimizers[0], module.losses, module.norms)

    return compared(train, strategy)


def main(folder: str, cases: list[str]) -> None:
    importlib.import_module("tests.frozen")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["FOLDER"] = folder
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for case in cases:
        name, _, how = case.partition(":")
        name, _, when = name.partition("-")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                results[case] = globals()[name](*[how, when][: 2 if when else 1])
        except Exception:
            results[case] = traceback.format_exc()
        torch.save(results, f"{folder}/results-{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ, "to be started by torchrun"
    main(sys.argv[1], sys.argv[2:])
