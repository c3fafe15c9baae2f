"""One training run by each framework, with the same arguments, for the laws that they share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests import frameworks as fw

RATE, CLIP = 1e-2, 0.5
SAVED = 3  # updates before the checkpoint of a run that makes one
UNUSED = tempfile.TemporaryDirectory()  # the Trainer makes its folder, saved to or not


def _nothing() -> None: ...


@dataclass
class Plan:
    """What every framework is asked for.

    Attributes:
        model: a causal language model.
        wrap: gets the optimizer (AdamW) that the framework would use.
        n: micro-batches per window, which the framework counts.
        clip: largest gradient norm; None does not clip.
        before, after: called before each update, when the gradient is clipped, and after it.
        folder: of a checkpoint, which is written after `SAVED` updates.
        resumes: read it instead, and go on.
    """

    model: Any
    wrap: fw.Wrap
    n: int = 4
    updates: int = fw.UPDATES
    rate: float = RATE
    clip: float | None = CLIP
    autocast: bool = False
    data: list[fw.Batch] = field(default_factory=fw.sequences)
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing
    folder: Path | None = None
    resumes: bool = False

    def loader(self) -> DataLoader[Any]:
        """Micro-batches in a fixed order."""
        dataset: Any = self.data
        return DataLoader(dataset, fw.MICRO_BATCH, collate_fn=fw.collate)

    def adamw(self, model: Any = None) -> torch.optim.Optimizer:
        params = (model or self.model).parameters()
        return self.wrap(torch.optim.AdamW(params, lr=self.rate, weight_decay=0.1))

    def schedule(self, optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda update: 1 - update / self.updates)


# --- transformers ---


def by_trainer(plan: Plan) -> fw.Run:
    class Watch(fw.transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            plan.before()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            plan.after()

    settings = fw.trainer_settings(plan.folder or UNUSED.name) | {
        "gradient_accumulation_steps": plan.n,
        "learning_rate": plan.rate,
        "max_steps": plan.updates,
        "max_grad_norm": plan.clip or 0.0,
        "bf16": plan.autocast,
        "train_sampling_strategy": "sequential",
    }
    if plan.folder is not None:  # with evaluations in between
        settings |= {"save_strategy": "steps", "save_steps": SAVED}
        settings |= {"eval_strategy": "steps", "eval_steps": 2}
        settings |= {"train_sampling_strategy": "random"}
    made = fw.transformers.Trainer(
        plan.model,
        fw.transformers.TrainingArguments(**settings),
        train_dataset=plan.data,
        eval_dataset=plan.data[:8],
        callbacks=[Watch],
    )
    made.optimizer = plan.wrap(made.create_optimizer())
    how = {"resume_from_checkpoint": f"{plan.folder}/checkpoint-{SAVED}"} if plan.resumes else {}
    run = fw.finished(made, **how)
    assert made.state.global_step == plan.updates
    return run


# --- Accelerate ---


class Loop:
    """The loop of Accelerate's documentation."""

    def __init__(self, plan: Plan) -> None:
        import accelerate

        self.plan = plan
        self.accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=plan.n,
            cpu=True,
            mixed_precision="bf16" if plan.autocast else "no",
        )
        optimizer = plan.adamw()
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            plan.model, optimizer, plan.loader(), plan.schedule(optimizer)
        )
        self.result = fw.Run(self.model, optimizer)
        self.micro_batches = 0
        self.pending: list[torch.Tensor] = []

    def load(self, folder: Path, micro_batches: int) -> Loop:
        self.accelerator.load_state(str(folder))
        self.micro_batches = micro_batches
        return self

    def micro_batches_of(self, updates: int) -> int:
        """A window ends with the epoch: 39 micro-batches are 9 windows of 4 and one of 3."""
        epochs, rest = divmod(updates, -(-len(self.loader) // self.plan.n))
        return epochs * len(self.loader) + rest * self.plan.n

    def run(self, stop: int) -> Loop:
        """Go on to `stop` micro-batches, counted over all epochs."""
        while self.micro_batches < stop:
            skip = self.micro_batches % len(self.loader)
            for batch in self.accelerator.skip_first_batches(self.loader, skip):
                self.micro_batch(batch)
                if self.micro_batches == stop:
                    break
        return self

    def micro_batch(self, batch: fw.Batch) -> None:
        accelerator, result = self.accelerator, self.result
        with accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self.pending.append(loss.detach())
            accelerator.backward(loss)
            updates = accelerator.sync_gradients
            if updates:
                limit = float("inf") if self.plan.clip is None else self.plan.clip
                norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
                result.norms.append(float(norm))
                result.losses.append(float(torch.stack(self.pending).mean()))
                result.rates.append(self.schedule.get_last_lr()[0])
                self.pending.clear()
                self.plan.before()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            assert not accelerator.optimizer_step_was_skipped
            if updates:
                self.plan.after()
        self.micro_batches += 1


def by_accelerate(plan: Plan) -> fw.Run:
    loop = Loop(plan)
    saved, stop = loop.micro_batches_of(SAVED), loop.micro_batches_of(plan.updates)
    if plan.folder is not None and plan.resumes:
        loop.load(plan.folder, saved)
    elif plan.folder is not None:
        loop.run(saved).accelerator.save_state(str(plan.folder))
    return loop.run(stop).result


# --- Lightning ---


def precision(plan: Plan) -> str:
    if next(plan.model.parameters()).dtype == torch.bfloat16:
        return "bf16-true"
    return "bf16-mixed" if plan.autocast else "32-true"


def by_lightning(plan: Plan) -> fw.Run:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.lightning_module import Resumable, trainer

    run = fw.Run(plan.model, None)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.pending, self.done = plan.model, [], 0

        def training_step(self, batch: fw.Batch, batch_idx: int) -> Any:
            loss = self.model(**batch).loss
            self.pending.append(loss.detach())
            return loss

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            run.norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))
            )
            run.losses.append(float(torch.stack(self.pending).mean()))
            run.rates.append(optimizer.param_groups[0]["lr"])
            self.pending.clear()
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            plan.before()

        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step > self.done:
                self.done = self.global_step
                plan.after()

        def configure_optimizers(self) -> Any:
            run.optimizer = plan.adamw(self.model)
            schedule = {"scheduler": plan.schedule(run.optimizer), "interval": "step"}
            return {"optimizer": run.optimizer, "lr_scheduler": schedule}

    saving = ModelCheckpoint(dirpath=plan.folder, every_n_train_steps=SAVED, save_top_k=-1)
    made = trainer(
        max_epochs=-1,
        max_steps=plan.updates,
        accumulate_grad_batches=plan.n,
        gradient_clip_val=plan.clip,
        precision=precision(plan),
        callbacks=[saving] if plan.folder is not None and not plan.resumes else [],
    )
    start = f"{plan.folder}/epoch=0-step={SAVED}.ckpt" if plan.resumes else None
    made.fit(Module(), Resumable([*plan.loader()]), ckpt_path=start)
    assert made.global_step == plan.updates
    return run


# --- Lightning Fabric ---


def by_fabric(plan: Plan) -> fw.Run:
    """The loop of Fabric's documentation, in which the optimizer is made before `setup()`."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision(plan))  # type: ignore[arg-type]
    optimizer = plan.adamw()
    schedule = plan.schedule(optimizer)
    model, given = fabric.setup(plan.model, optimizer)
    loader = fabric.setup_dataloaders(plan.loader())
    run, pending = fw.Run(plan.model, optimizer), list[torch.Tensor]()
    state = {"model": model, "optimizer": given, "schedule": schedule, "done": 0, "updates": 0}
    file = f"{plan.folder}/fabric.ckpt"
    if plan.resumes:
        fabric.load(file, state)
    while state["updates"] < plan.updates:
        for i, batch in enumerate(loader):
            if i < state["done"] % len(loader):
                continue  # of the run that saved
            is_last = (i + 1) % plan.n == 0 or i + 1 == len(loader)
            with fabric.no_backward_sync(model, enabled=not is_last):
                loss = model(**batch).loss
                fabric.backward(loss / plan.n)
            pending.append(loss.detach())
            state["done"] += 1
            if not is_last:
                continue
            limit = float("inf") if plan.clip is None else plan.clip
            norm = fabric.clip_gradients(model, given, max_norm=limit, error_if_nonfinite=False)
            run.norms.append(float(norm))
            run.losses.append(float(torch.stack(pending).mean()))
            run.rates.append(schedule.get_last_lr()[0])
            pending.clear()
            plan.before()
            given.step()
            schedule.step()
            given.zero_grad()
            plan.after()
            state["updates"] += 1
            if plan.folder is not None and not plan.resumes and state["updates"] == SAVED:
                fabric.save(file, state)
            if state["updates"] == plan.updates:
                break
    return run


FRAMEWORKS = {
    "trainer": by_trainer,
    "accelerate": by_accelerate,
    "lightning": by_lightning,
    "fabric": by_fabric,
}
OF_LIGHTNING = ("lightning", "fabric")


def train(framework: str, plan: Plan) -> fw.Run:
    """The run, with settings of its own."""
    fw.reset()
    try:
        return FRAMEWORKS[framework](plan)
    finally:
        fw.reset()


def spoil(folder: Path) -> None:
    """Halve the first moments in a checkpoint, whosever it is."""
    of_hugging_face = (f"checkpoint-{SAVED}/optimizer.pt", "optimizer.bin")
    names = (*of_hugging_face, f"epoch=0-step={SAVED}.ckpt", "fabric.ckpt")
    (path,) = (folder / name for name in names if (folder / name).exists())
    found = torch.load(path, weights_only=False)
    state = found["optimizer_states"][0] if "optimizer_states" in found else found
    state = state.get("optimizer", state)
    for entry in state["state"].values():
        entry["exp_avg"] *= 0.5
    torch.save(found, path)
