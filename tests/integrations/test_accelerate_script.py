"""A script in the manner of transformers' no_trainer examples: its loop, its resume, its restart.

Two epochs over a shuffled data set; accumulate(), a schedule with warm-up, an evaluation after each
epoch, save_state() every few micro-batches, and a resume that finds its place by the checkpoint's
name and skip_first_batches(). What "the same" means is in same_runs.py.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import frameworks as fw
from tests.frameworks import own_state as own_state

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate.utils import DataLoaderConfiguration, set_seed  # noqa: E402

from tests.same_runs import Run, are_equal, differences  # noqa: E402

N, EPOCHS, PER_EPOCH = 4, 2, 23
# Windows of 4, and one of 3 at the end of an epoch.
UPDATES = EPOCHS * 6
# The first micro-batch of the second epoch's third window.
MID_WINDOW = PER_EPOCH + 9


def main(argv: list[str]) -> Run:
    """The script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=list(fw.WRAPS), default="ours")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--checkpointing-steps", type=int, help="micro-batches")
    parser.add_argument("--resume-from-checkpoint", type=Path)
    parser.add_argument("--seed-of-weights", type=int, default=0)
    parser.add_argument("--dies-at", type=int, help="a micro-batch")
    parser.add_argument("--forget-to-skip", action="store_true", help="a mistake, as a control")
    args = parser.parse_args(argv)

    accelerator = accelerate.Accelerator(
        gradient_accumulation_steps=N,
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    set_seed(0)
    model = fw.tiny_llama(getattr(torch, args.dtype), args.seed_of_weights)
    dataset: Any = fw.sequences(2 * PER_EPOCH - 1)
    train = torch.utils.data.DataLoader(dataset, 2, shuffle=True, collate_fn=fw.collate)
    evaluation = torch.utils.data.DataLoader(dataset[:8], 4, collate_fn=fw.collate)

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = fw.WRAPS[args.optimizer](torch.optim.AdamW(groups, lr=args.learning_rate))
    schedule = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=3, num_training_steps=UPDATES
    )
    result = Run(model, optimizer)
    model, optimizer, train, evaluation, schedule = accelerator.prepare(
        model, optimizer, train, evaluation, schedule
    )

    done = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(str(args.resume_from_checkpoint))
        done = int(args.resume_from_checkpoint.name.removeprefix("step_"))
    first_epoch, skipped = divmod(done, len(train))
    for epoch in range(first_epoch, EPOCHS):
        model.train()
        train.set_epoch(epoch)
        batches = train
        if epoch == first_epoch and skipped and not args.forget_to_skip:
            batches = accelerator.skip_first_batches(train, skipped)
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    result.norms.append(float(norm))
                    result.rates.append(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            result.losses.append(float(loss.detach()))
            done += 1
            if args.checkpointing_steps and done % args.checkpointing_steps == 0:
                accelerator.save_state(str(args.output_dir / f"step_{done}"))
            if done == args.dies_at:
                os._exit(9)  # as a machine that is switched off
        model.eval()
        with torch.no_grad():
            result.losses += [float(model(**batch).loss) for batch in evaluation]
    accelerator.end_training()
    return result


def script(*argv: str) -> Run:
    """Run here, with settings of its own."""
    fw.reset()
    return main(list(argv))


@functools.cache
def run(*argv: str) -> Run:
    """A whole run, kept for the tests that compare with it."""
    result = script(*argv)
    assert len(result.norms) == UPDATES and len(result.losses) == EPOCHS * (PER_EPOCH + 2)
    return result


def test_the_run_is_the_plain_optimizers() -> None:
    """Losses of each micro-batch, evaluations, norms, parameters; partial windows and clipping."""
    mine, plain, off = (run("--optimizer", how) for how in ("ours", "plain", "nudged"))
    assert differences(mine, plain, off) == []
    assert plain.losses[-1] < 0.95 * plain.losses[PER_EPOCH]  # the evaluations: it learned
    assert max(plain.norms) > 0.5  # clipping did something
    # Per update and not per micro-batch.
    assert mine.rates == pytest.approx(
        [1e-2 * min(i / 3, (UPDATES - i) / (UPDATES - 3)) for i in range(UPDATES)]
    )
    assert len(differences(run("--optimizer", "faster"), plain, off)) == 4


# One process imports the frameworks and forks for each run, which dies; its status is printed.
FORKS = """
import os, sys
from tests.integrations.test_accelerate_script import main
for dtype in ("float32", "bfloat16"):
    if os.fork() == 0:
        main(["--dtype", dtype, "--output-dir", f"{sys.argv[1]}/{dtype}", *sys.argv[2:]])
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What processes leave that save at MID_WINDOW and die a few micro-batches later."""
    directory = tmp_path_factory.mktemp("killed")
    saving = ["--checkpointing-steps", str(MID_WINDOW), "--dies-at", str(MID_WINDOW + 3)]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(directory), *saving],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["9", "9"], done.stderr
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_in_mid_window_and_resumed(dtype: str, killed: Path) -> None:
    """In mid-epoch too, from a process that died: the rest of the run is the same to the bit."""
    kind = ("--dtype", dtype)
    whole = run("--optimizer", "ours", *kind)
    (file,) = (killed / dtype).iterdir()
    resume = ("--resume-from-checkpoint", str(file), "--seed-of-weights", "9", *kind)
    resumed = script(*resume)
    assert are_equal(resumed.model, whole.model)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert resumed.norms == whole.norms[-len(resumed.norms) :]
    assert resumed.rates == whole.rates[-len(resumed.rates) :]
    assert len(resumed.losses) == EPOCHS * PER_EPOCH - MID_WINDOW + 2

    assert not are_equal(script(*resume, "--forget-to-skip").model, whole.model)


@pytest.mark.parametrize("stop", [MID_WINDOW - 1, MID_WINDOW], ids=["between", "mid-window"])
def test_the_plain_optimizer_loses_the_open_window(stop: int, tmp_path: Path) -> None:
    """The control of the test above: the same script, unwrapped."""
    plain = ("--optimizer", "plain")
    script(*plain, "--output-dir", str(tmp_path), "--checkpointing-steps", str(stop))
    resumed = script(*plain, "--resume-from-checkpoint", str(tmp_path / f"step_{stop}"))
    assert are_equal(resumed.model, run(*plain).model) is (stop != MID_WINDOW)
