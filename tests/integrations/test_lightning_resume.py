"""Lightning's checkpoints: a run that is interrupted and resumed is the undisturbed one, to the
bit, also in mid-window and with bf16 weights, whose fp32 masters are in the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

import lightning

from tests.lightning_module import Counted, Module, N, Resumable, adamw, trainer, wrapped
from tests.same_runs import are_equal

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and the like


class Killed(Exception):
    """Ends a run without any of the goodbyes."""


class SaveAt(lightning.Callback):
    """Saves after so many micro-batches, wherever in a window that is, and ends the run there."""

    def __init__(self, path: Path, micro_batches: int) -> None:
        self.path, self.micro_batches = path, micro_batches

    def on_train_batch_end(self, trainer: Any, module: Module, *args: Any) -> None:
        if len(module.losses) == self.micro_batches:
            trainer.save_checkpoint(self.path)
            raise Killed


def run(
    module: Module, precision: str = "32-true", path: Path | None = None, *, at: int = 0
) -> Module:
    """Two epochs; or from the start to a checkpoint `at`, or from that checkpoint to the end."""
    options: dict[str, Any] = {"max_epochs": 2, "precision": precision}
    if module.automatic_optimization:
        options["accumulate_grad_batches"] = N
    if at:
        assert path is not None
        with pytest.raises(Killed):
            trainer(callbacks=[SaveAt(path, at)], **options).fit(module, Resumable())
    else:
        trainer(**options).fit(module, Resumable(), ckpt_path=path)
    return module


def automatic() -> Module:
    return Module(wrapped(adamw, max_grad_norm=0.3), "scheduler dict")


def counted() -> Module:
    """Manual optimization, the wrapper counts the window."""
    return Counted(wrapped(adamw, gradient_accumulation_steps=N, max_grad_norm=0.3))


def plain() -> Module:
    return Module(adamw, "scheduler dict")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("make", "at"),
    # 18 micro-batches an epoch, windows of four: inside one, between two, in an epoch's last one,
    # at the end of the epoch, inside one of the second.
    [(counted, at) for at in (6, 8, 17, 18, 21)] + [(automatic, at) for at in (8, 18)],
    ids=lambda value: f"after-{value}" if isinstance(value, int) else value.__name__,
)
def test_resumed_run_is_the_undisturbed_one(
    tmp_path: Path, make: Callable[[], Module], at: int, precision: str
) -> None:
    path = tmp_path / "a.ckpt"
    undisturbed = run(make(), precision)
    before = run(make(), precision, path, at=at)
    after = run(make(), precision, path)
    assert len(undisturbed.losses) == 2 * len(Resumable())
    assert before.losses + after.losses == undisturbed.losses
    assert before.rates + after.rates == undisturbed.rates
    assert are_equal(after, undisturbed)


@pytest.mark.parametrize("make", [automatic, plain])
def test_automatic_optimization_discards_an_open_window_on_resume(
    tmp_path: Path, make: Callable[[], Module]
) -> None:
    """Lightning zeroes the module before it runs, so there the window's first half is lost,
    whatever the optimizer. ModelCheckpoint saves at updates, where no window is open."""
    path = tmp_path / "a.ckpt"
    undisturbed = run(make())
    for at, is_same in ((8, True), (6, False)):
        run(make(), path=path, at=at)
        assert are_equal(run(make(), path=path), undisturbed) is is_same


def without(path: Path, key: str) -> None:
    """Remove something of ours from a checkpoint."""
    checkpoint = torch.load(path, weights_only=False)
    (state,) = checkpoint["optimizer_states"]
    if key == "accumulators":
        assert len(state["fusedaccum"][key]) == 4
        state["fusedaccum"][key] = {}
    else:
        assert all(entry.pop(key).dtype == torch.float32 for entry in state["state"].values())
    torch.save(checkpoint, path)


@pytest.mark.parametrize("key", ["accumulators", "master_param"])
def test_what_is_in_the_checkpoint_is_needed(tmp_path: Path, key: str) -> None:
    """The control."""
    path = tmp_path / "a.ckpt"
    run(counted(), "bf16-true", path, at=6)
    without(path, key)
    assert not are_equal(run(counted(), "bf16-true", path), run(counted(), "bf16-true"))


def test_a_checkpoint_moves_to_the_plain_optimizer_and_back(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    undisturbed = run(plain())
    ours = Module(wrapped(adamw), "scheduler dict")
    for first, second in ((ours, plain()), (plain(), Module(wrapped(adamw), "scheduler dict"))):
        run(first, path=path, at=8)
        resumed = run(second, path=path)
        expected = undisturbed.losses[8:]
        torch.testing.assert_close(resumed.losses, expected, rtol=1e-5, atol=1e-6)
