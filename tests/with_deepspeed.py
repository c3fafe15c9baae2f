"""The wrapper beside the installed DeepSpeed: `make deepspeed`, in an environment of its own.

DeepSpeed is not among the packages that `make test` installs, because Accelerate, Lightning and the
Trainer take other paths where it is there. `tests/window/test_deepspeed.py` imitates what it does.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusedaccum import FusedAccumOptimizer
from tests import processes
from tests.engine_cases import N, Net, Report, batch, expected, sgd, values
from tests.processes import message
from tests.tolerances import U

CASES = [
    f"engine:{stage}-{owner}" for stage in "0123" for owner in ("none", "n", "inner", "detached")
]
TRAINER = [f"trainer:{stage}" for stage in "012"]


def config(stage: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": N,
        "zero_optimization": {"stage": int(stage)},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }


def installed() -> Any:
    import deepspeed
    import deepspeed.ops

    # Else it compiles a library for shared memory at its first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine(case: str) -> Report:
    """ "1-none": the stage, and who counts."""
    deepspeed = installed()
    stage, owner = case.split("-")
    model = Net()
    opt: Any = FusedAccumOptimizer(sgd(model), N if owner == "n" else None)
    kept = opt
    if owner == "inner":
        opt = opt.optimizer
    elif owner == "detached":
        opt = opt.detach()
    report: Report = {}

    def run() -> None:
        engine = deepspeed.initialize(model=model, optimizer=opt, config=config(stage))[0]
        report["initialized"] = True
        for window in range(2):
            for i in range(N):
                engine.backward(engine(batch(dist.get_rank(), window, i)))
                engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            report["off"] = max(
                float((a.double() - b).abs().max())
                for a, b in zip(values(model), expected(range(2)), strict=True)
            )

    report["message"] = message(run)
    del kept
    return report


def trainer(stage: str) -> Report:
    """transformers' Trainer that gets both a wrapped optimizer and a DeepSpeed config."""
    import transformers

    from tests import frameworks as fw

    installed()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # asked for, not used
    settings = fw.trainer_settings(tempfile.mkdtemp()) | {"max_steps": 2, "max_grad_norm": 0.0}
    arguments = transformers.TrainingArguments(**settings, deepspeed=config(stage))
    model = fw.tiny_llama()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    made = transformers.Trainer(
        model, arguments, train_dataset=fw.sequences(), optimizers=(opt, None)
    )
    return {"message": message(made.train)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case returned in two processes, which agree."""
    folder = tmp_path_factory.mktemp("group")
    first, second = processes.run("tests.with_deepspeed", CASES + TRAINER, 2, folder)
    assert first == second
    return first


@pytest.mark.parametrize("case", CASES)
def test_the_engine(results: dict[str, Any], case: str) -> None:
    stage, owner = case.split(":")[1].split("-")
    result = results[case]
    assert isinstance(result, dict), result
    if owner == "detached" or (stage, owner) == ("0", "none"):
        # Both divide in an order of their own; the weights are at most 100.
        assert result["message"] is None and result["off"] < 100 * 16 * U
    else:
        assert result["message"].startswith("RuntimeError: ") and "detach()" in result["message"]
        assert ("initialized" in result) == (owner == "inner")


@pytest.mark.parametrize("case", TRAINER)
def test_the_trainer(results: dict[str, Any], case: str) -> None:
    assert isinstance(results[case], dict), results[case]
    text = results[case]["message"]
    assert text.startswith("RuntimeError: DeepSpeed's engine has parameters of this optimizer")
    assert "the Trainer gets both" in text and "detach()" in text
