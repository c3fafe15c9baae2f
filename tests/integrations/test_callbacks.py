"""Callbacks that log `opt.metrics()`, and the programs of docs/frameworks.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from fusedaccum.integrations import callbacks
from fusedaccum.integrations.ours import find, metrics_of
from tests import frameworks as fw
from tests.frameworks import own_state as own_state
from tests.traps import no_host_reads

transformers = pytest.importorskip("transformers")
pytest.importorskip("lightning")
from accelerate import Accelerator  # noqa: E402

from fusedaccum.integrations.callbacks import LightningMetrics, TrainerMetrics  # noqa: E402
from tests import lightning_module as lm  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and the like


def clipping(optimizer: Any) -> FusedAccumOptimizer:
    return FusedAccumOptimizer(optimizer, max_grad_norm=0.1)


class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
    """A callback that reports, as wandb's does."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def trainer(wrap: Callable[[Any], Any] | None, out: Path, **changes: Any) -> Any:
    given = {name: changes.pop(name) for name in ("callbacks", "eval_dataset") if name in changes}
    settings = fw.trainer_settings(out) | {"max_steps": 4, "max_grad_norm": 0.0} | changes
    args = transformers.TrainingArguments(**settings)
    made = transformers.Trainer(fw.tiny_llama(), args, train_dataset=fw.sequences(), **given)
    if wrap is not None:
        made.optimizer = wrap(made.create_optimizer())
    return made


def rows(made: Any) -> list[dict[str, Any]]:
    return [row for row in made.state.log_history if "loss" in row]


def test_the_trainers_log_has_the_metrics(tmp_path: Path) -> None:
    reporter, norms = Reporter(), list[float]()
    made = trainer(
        clipping,
        tmp_path,
        callbacks=[reporter],
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=fw.sequences(4),
    )
    optimizer = made.optimizer
    optimizer.register_step_post_hook(lambda *_: norms.append(float(optimizer.grad_norm)))
    assert isinstance(TrainerMetrics.add_to(made), TrainerMetrics)
    made.train()
    logged = rows(made)
    assert [row["fusedaccum/updates"] for row in logged] == [1, 2, 3, 4]
    assert [row["fusedaccum/grad_norm"] for row in logged] == norms
    assert all(row["fusedaccum/clip_coefficient"] < 1 for row in logged)
    assert all(row["fusedaccum/skipped_steps"] == 0 for row in logged)
    assert logged[0]["grad_norm"] is not None  # the Trainer's own is still there
    # Those that report saw the same, and evaluations have none of it.
    reported = [log for log in reporter.logs if "loss" in log]
    assert [log["fusedaccum/grad_norm"] for log in reported] == norms
    others = [row for row in made.state.log_history if "loss" not in row]
    assert len(others) == 3 and not any("fusedaccum" in key for row in others for key in row)
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    kept = [row["fusedaccum/grad_norm"] for row in stored["log_history"] if "loss" in row]
    assert kept == norms


def test_a_callback_of_the_constructor_comes_behind_those_that_report(tmp_path: Path) -> None:
    reporter = Reporter()
    own = TrainerMetrics(prefix="ours.")
    made = trainer(clipping, tmp_path, callbacks=[reporter, own], max_steps=1)
    made.train()
    assert rows(made)[0]["ours.updates"] == 1
    assert not any("ours." in key for log in reporter.logs for key in log)


def test_a_resumed_trainer_goes_on(tmp_path: Path) -> None:
    for resumes in (False, True):
        made = trainer(clipping, tmp_path, save_strategy="steps", save_steps=2)
        TrainerMetrics.add_to(made)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumes else None)
        assert [row["fusedaccum/updates"] for row in rows(made)] == [1, 2, 3, 4]


def test_a_trainer_without_a_wrapper(tmp_path: Path) -> None:
    made = trainer(None, tmp_path)
    TrainerMetrics.add_to(made)
    with pytest.raises(ValueError, match=r"the Trainer has AcceleratedOptimizer\(AdamW\)\. Wrap"):
        made.train()
    with pytest.raises(TypeError, match=r"add_to\(\) takes a transformers.Trainer .* got int"):
        TrainerMetrics.add_to(3)
    with pytest.raises(TypeError, match=r"prefix must be a str, .* got 3 of type int"):
        TrainerMetrics(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_lightning_logs_the_metrics(kind: str) -> None:
    seen: list[int] = []

    class Seen(lm.lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            logged = trainer.callback_metrics
            seen.append(int(logged["fusedaccum/updates"]) if logged else 0)

    make = lm.wrapped(lm.adamw, max_grad_norm=0.3)
    module = lm.Module(make) if kind == "automatic" else lm.Manual(make)
    options = {"accumulate_grad_batches": 4} if kind == "automatic" else {}
    made = lm.trainer(
        max_steps=6, callbacks=[LightningMetrics(), Seen()], log_every_n_steps=1, **options
    )
    made.fit(module, lm.loader())
    opt = made.optimizers[0]
    assert isinstance(opt, FusedAccumOptimizer)
    for logged in (made.callback_metrics, made.logged_metrics):
        assert float(logged["fusedaccum/updates"]) == 6
        assert float(logged["fusedaccum/grad_norm"]) == float(opt.grad_norm)  # type: ignore[arg-type]
        assert float(logged["fusedaccum/clip_coefficient"]) < 1
        assert float(logged["fusedaccum/skipped_steps"]) == 0
    # An epoch's last window is short: 18 micro-batches are five of them.
    assert lm.MICRO_BATCHES == 18
    assert seen == [*((i + 1) // 4 for i in range(17)), 5, 5, 5, 5, 6]


class Two(lm.lightning.LightningModule):
    """Two optimizers, one of them wrapped."""

    def __init__(self, wraps: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = torch.nn.Linear(7, 3), torch.nn.Linear(7, 3)
        self.wraps = wraps

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for net, opt in zip((self.a, self.b), self.optimizers(), strict=True):
            opt.zero_grad()
            self.manual_backward(torch.nn.functional.mse_loss(net(x), y))
            opt.step()
        if self.wraps:  # through the object that Lightning puts before the optimizer
            assert self.optimizers()[1].metrics()["updates"] == batch_idx + 1

    def configure_optimizers(self) -> Any:
        first, second = lm.sgd(self.a.parameters()), lm.sgd(self.b.parameters())
        return [first, FusedAccumOptimizer(second) if self.wraps else second]


def test_lightning_with_several_optimizers_and_with_none_of_ours() -> None:
    made = lm.trainer(max_steps=4, callbacks=[LightningMetrics()])
    made.fit(Two(), lm.loader())
    names = set(made.callback_metrics)
    assert names == {f"fusedaccum/1/{name}" for name in ("updates", "skipped_steps", "grad_norm")}
    made = lm.trainer(max_steps=4, callbacks=[LightningMetrics()])
    with pytest.raises(ValueError, match=r"Lightning has SGD, SGD\. Return FusedAccumOptimizer"):
        made.fit(Two(wraps=False), lm.loader())


def test_it_is_found_inside_accelerates_optimizer() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=0.1))
    prepared = Accelerator(cpu=True).prepare(opt)
    assert prepared is not opt and find([prepared], "", "") == {"": opt}
    assert find([None, prepared, torch.optim.SGD([param])], "", "") == {"1/": opt}
    assert metrics_of({"": opt}, "x/") == {}  # before the first update
    with pytest.raises(ValueError, match=r"the loop has none at all\. Wrap, or leave the callback"):
        find([], "the loop", "Wrap")


def test_nothing_waits_until_lightning_writes() -> None:
    """What the callback hands over is made without a host read."""
    param = torch.nn.Parameter(torch.ones(2))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=0.1), 1, max_grad_norm=1.0)
    (3 * param.sum()).backward()
    opt.step()
    handed: dict[str, torch.Tensor] = {}

    class Module:
        def log_dict(self, values: dict[str, torch.Tensor], **_: Any) -> None:
            handed.update(values)

    class Trainer:
        optimizers = [opt]  # noqa: RUF012

    callback = LightningMetrics()
    callback.on_train_start(Trainer(), Module())

    with no_host_reads():
        callback.on_train_batch_end(Trainer(), Module(), None, None, 0)
    assert float(handed["fusedaccum/updates"]) == 1.0
    assert all(value.is_floating_point() and value.dim() == 0 for value in handed.values())


def test_the_module_imports_no_framework() -> None:
    code = (
        "import sys; from fusedaccum.integrations import callbacks; dir(callbacks); "
        "print([m for m in ('transformers', 'lightning', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("name", "package"), [("TrainerMetrics", "transformers"), ("LightningMetrics", "lightning")]
)
def test_without_the_framework(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    place = f"fusedaccum.integrations.{package.replace('transformers', 'trainer')}_metrics"
    monkeypatch.delitem(sys.modules, place, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=rf"{name} needs {package} .*: pip install {package}\."):
        getattr(callbacks, name)
    with pytest.raises(AttributeError, match="has no attribute 'Metrics'"):
        _ = callbacks.Metrics
    assert {"TrainerMetrics", "LightningMetrics"} <= set(dir(callbacks))


# How what they print ends.
PROGRAMS = {
    "Trainer": r"\n2 [\d.]+ [\d.]+\n4 [\d.]+ [\d.]+$",
    "Lightning": r"\ntensor\([\d.]+\)$",
    "Accelerate": "^$",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_of_the_page_run(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    programs = dict(re.findall(r"```python\n# (\w+)\n(.*?)```", text, re.S))
    assert programs.keys() == PROGRAMS.keys()
    monkeypatch.chdir(tmp_path)
    fw.reset()
    exec(compile(programs[name], "frameworks.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.search(PROGRAMS[name], "\n".join(lines)), lines
