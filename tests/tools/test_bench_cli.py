"""`python -m fusedaccum bench`: it runs, says what it measured, and refuses what is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ours import Operations
from fusedaccum import __main__ as cli
from fusedaccum.bench import forms, gate, shapes
from fusedaccum.bench import run as bench
from fusedaccum.doctor import machine
from fusedaccum.doctor.checks import Wrong
from fusedaccum.doctor.forms import Form, Wrapper
from fusedaccum.doctor.plan import OPTIMIZERS, Plan
from tests.commands import exit_status, run_command

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY = ["bench", "--shapes", "64x33,7*3,1", "--device", "cpu", "--seconds", "60"]
SMALL = ((3, 31), (1,), (17,), (8193,))


def check_report(report: dict[str, Any], exact: set[str]) -> dict[str, Any]:
    """The rows by their names."""
    assert report["measured"]["n_tensors"] == 5
    assert report["refused"] == report["skipped"] == {}
    rows = {row["variant"]: row for row in report["rows"]}
    assert rows.keys() >= exact | {"copy", "copy_again"}
    for name, row in rows.items():
        assert row["operation"] == "window" and row["n_elements"] == 64 * 33 + 7 * 3 + 1
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["samples"] >= 3
        ratio = row["p50_ms"] / rows["copy"]["p50_ms"]
        assert row["ratio"] == pytest.approx(ratio, rel=1e-2, abs=1e-3)
        if name in exact:
            assert row["grad_error"] < 1e-6
    best, speedup = report["speedup"]["fused_hooks"]
    own = {name: rows[name]["p50_ms"] for name in exact - {"fused_hooks"}}
    assert own[best] == min(own.values())
    assert speedup == pytest.approx(own[best] / rows["fused_hooks"]["p50_ms"], rel=0.01, abs=1e-3)
    return rows


def test_bench_in_a_process_of_its_own() -> None:
    done = run_command(*TINY, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    rows = check_report(report, {"fused_hooks", "native_fp32", "foreach_add", "blocked_add"})
    assert rows["plain_bf16"]["grad_error"] > 1e-4
    kept = report["bytes_kept"]
    assert (kept["fused_hooks"], kept["native_fp32"], kept["plain_bf16"]) == (16, 18, 8)
    moved = {name: round(row["bytes"] / row["n_elements"]) for name, row in rows.items()}
    assert moved["fused_hooks"] == 6 + 7 * 10 + 28
    assert moved["foreach_add"] == 14 + 7 * 10 + 4 + 8 + 34
    assert moved["plain_bf16"] == 4 + 7 * 6 + 2 + 4 + 14


def test_other_options_and_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "radam", "--dtype", "fp16", "--accumulation-steps", "3"]
    assert cli.main([*TINY, *options]) == 0
    text = capsys.readouterr().out
    assert "radam on 5 tensors; fusedaccum by " in text
    assert "\nwindow, given shapes (2,134 float16 elements), N=3, " in text
    assert "plain" not in text
    lines = text.strip().splitlines()
    assert lines[-3].startswith("noise: ") and "fused_hooks 18, native_fp32 " in lines[-2]
    assert re.fullmatch(
        r"one window: fused_hooks \S+ ms, \w+ \S+ ms: (\d+\.\d\d x|inconclusive, .*)", lines[-1]
    )


def test_fp32_without_a_master(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "sgd", "--dtype", "fp32", "--accumulation-steps", "1", "--json"]
    assert cli.main([*TINY, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    check_report(report, {"fused_hooks", "native_fp32", "foreach_add", "blocked_add"})
    assert report["bytes_kept"]["fused_hooks"] == report["bytes_kept"]["native_fp32"] == 12


@pytest.mark.gpu
def test_bench_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--json"]
    arguments[arguments.index("cpu")] = "cuda"
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    rows = check_report(report, {"fused_hooks", "native_fp32", "foreach_add"})
    assert all(row["host_ms"] > 0 for row in rows.values())


# --- the gate ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_lets_pass(optimizer: str, dtype: str) -> None:
    plan, like = Plan(optimizer, 3), torch.empty(0, dtype=DTYPES[dtype])
    for kind in (Operations, *forms.kinds(like)):
        found = gate.gate(kind, plan, like, SMALL)
        if kind.is_exact:
            assert found.grad_error < 1e-6 and found.update_error < 1e-3
        else:
            assert found.grad_error > 1e-4


class CountedTwice(Wrapper):
    """Counts every gradient twice in whole windows; AdamW alone would hide it."""

    def micro_batch(self, grads: Sequence[Tensor], index: int) -> None:
        super().micro_batch([grad * 2 for grad in grads], index)


class FirstForgotten(Operations):
    """A single operation that stores where it should add."""

    def add(self, grads: Sequence[Tensor], index: int) -> None:
        super().add(grads, 0)


class ShortOfOne(forms.Foreach):
    """Misses the last element of every tensor."""

    def accumulate(self, grads: Sequence[Tensor]) -> None:
        for acc, grad in zip(self.accs, grads, strict=True):
            acc.view(-1)[:-1].add_(grad.view(-1)[:-1], alpha=1 / self.plan.n)


class Rounded(forms.Foreach):
    """Sums right, and then steps parameters that are only bf16."""

    def step(self) -> None:
        super().step()
        for param, master in zip(self.params, self.masters, strict=True):
            master.data.copy_(param)


class Skipped(forms.Foreach):
    """Is fast because it does not step."""

    def step(self) -> None:
        pass


class NotClipped(forms.Foreach):
    """Steps without clipping, which SGD shows."""

    def clip(self, max_norm: float) -> None:
        pass


@pytest.mark.parametrize(
    "kind", [CountedTwice, FirstForgotten, ShortOfOne, Rounded, Skipped, NotClipped]
)
def test_the_gate_refuses(kind: type[Form]) -> None:
    plan = Plan("sgd" if kind is NotClipped else "adamw", 4)
    with pytest.raises(Wrong):
        gate.gate(kind, plan, torch.empty(0, dtype=torch.bfloat16), SMALL)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gate_refuses_any_optimizer_that_does_not_step(optimizer: str) -> None:
    with pytest.raises(Wrong, match="precise parameter of"):
        gate.gate(Skipped, Plan(optimizer, 3), torch.empty(0, dtype=torch.bfloat16), SMALL)


def test_a_wrong_form_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Wrapper.micro_batch
    monkeypatch.setattr(
        Wrapper,
        "micro_batch",
        lambda self, grads, index: original(self, [1.001 * g.float() for g in grads], index),
    )
    assert cli.main([*TINY, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["refused"].keys() == {"fused_hooks"}
    assert "mean gradient off by" in report["refused"]["fused_hooks"]
    assert "fused_hooks" not in {row["variant"] for row in report["rows"]}
    assert report["speedup"] == {}
    assert cli.main(TINY) == 1
    assert "not timed: fused_hooks: Wrong: " in capsys.readouterr().out


def test_a_form_that_cannot_run_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(self: Any, grads: Any) -> None:
        raise RuntimeError("not implemented here")

    monkeypatch.setattr(forms.Foreach, "accumulate", raises)
    assert cli.main([*TINY, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["refused"] == {"foreach_add": "RuntimeError: not implemented here"}
    assert report["speedup"]


def test_nan_is_noticed_after_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "is_finite", lambda form: not isinstance(form, forms.Blocks))
    assert cli.main([*TINY, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "NaN or Inf" in report["refused"]["blocked_add"]
    form = Wrapper([torch.zeros(5)], Plan())
    assert gate.is_finite(form)
    form.params[0].data[3] = math.nan
    monkeypatch.undo()
    assert not gate.is_finite(form)


@pytest.mark.parametrize(
    ("again", "ours", "verdict"),
    [
        (10.2, 200.0, "0.75 x"),
        (10.2, 100.0, "1.50 x"),
        (10.2, 149.0, "inconclusive, for the difference (1.01 x) is no larger than the noise"),
        (10.2, 151.0, "inconclusive, for the difference (0.99 x) is no larger than the noise"),
        (12.0, 130.0, "inconclusive, for the difference (1.15 x) is no larger than the noise"),
        (12.0, 100.0, "1.50 x"),
        (5.7, 30.0, "inconclusive, for the machine is too busy to tell"),
    ],
)
def test_losses_are_said_as_plainly_and_noise_is_no_result(
    again: float, ours: float, verdict: str
) -> None:
    ms = {"copy": 10.0, "copy_again": again, "fused_hooks": ours, "native_fp32": 150.0}
    rows = [
        {"variant": name, "p50_ms": ms, "grad_error": None if "copy" in name else 0.0}
        for name, ms in ms.items()
    ]
    speedup = bench.speedups(rows, lambda name: True)
    report = {"rows": rows, "refused": {}, "skipped": {}, "bytes_kept": {}, "speedup": speedup}
    assert bench.conclusions(report)[-1] == (
        f"one window: fused_hooks {ours:.4g} ms, native_fp32 150 ms: {verdict}"
    )


# --- shapes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096x4096", [(4096, 4096)]),
        ("7, 2x3*2 ,5*1", [(7,), (2, 3), (2, 3), (5,)]),
        ("2x3x4", [(2, 3, 4)]),
    ],
)
def test_shapes_are_parsed(text: str, expected: shapes.Shapes) -> None:
    assert shapes.parse(text) == expected


def test_default_shapes() -> None:
    name, found = shapes.default("cuda")
    assert (name, len(found), shapes.count(found)) == ("GPT-2", 148, 124_439_808)
    assert shapes.count(shapes.default("cpu")[1]) * 8 > 200 << 20  # beyond most caches


@pytest.mark.parametrize("as_file", [True, False])
def test_shapes_of_a_config(as_file: bool, tmp_path: Path, monkeypatch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=33, n_positions=8)
    config.save_pretrained(tmp_path)
    found = shapes.of_model(str(tmp_path / "config.json" if as_file else tmp_path))
    # The head is the token embedding: counted once.
    assert found == shapes.gpt(16, 33, 8, 2)


def test_shapes_of_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.save_pretrained(tmp_path)
    assert shapes.count(shapes.of_model(str(tmp_path))) > 1000


def test_a_config_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match=r"which transformers cannot use: .*no-such-model"):
        shapes.of_model(str(tmp_path))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"--model needs transformers .*or use --shapes"):
        shapes.of_model(str(tmp_path))


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4x,3"], "--shapes got '4x'"),
        (["--shapes", "0x3"], "--shapes got '0x3'"),
        (["--model", "/no/such/folder"], "--model got '/no/such/folder', which does not exist"),
        (["--model", "x", "--shapes", "3"], "not allowed with argument"),
        (["--shapes", "3", "--device", "tpu"], "--device got 'tpu'; there is here: cpu"),
        (["--accumulation-steps", "0"], "got 0; 1 or more"),
        (["--seconds", "-1"], "got -1; above 0"),
        (["--seconds", "nan"], "got nan; above 0"),
        (["--optimizer", "adamv"], "invalid choice: 'adamv'"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("bench", *arguments) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 1 << 30)
    assert cli.main(["bench", "--shapes", "1000x1000*1000", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "needs 14.9 GiB beside the others, of 1.0 GiB free" in message
    assert "nothing fits on cpu; use smaller --shapes. fused_hooks, " in message
    assert "{" not in message


def test_a_busy_machine_is_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert cli.main(TINY) == 0
    assert "set OMP_WAIT_POLICY=PASSIVE" in capsys.readouterr().err


def test_a_backend_that_cannot_be_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured. Without Triton neither a GPU nor its interpreter would help."""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert exit_status("bench", "--device", "cpu", "--backend", "triton", "--shapes", "4") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "triton is not installed" in printed.err
    assert "Install triton, or use backend=None" in printed.err
    assert "TRITON_INTERPRET" not in printed.err
