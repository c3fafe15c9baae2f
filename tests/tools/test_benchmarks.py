"""The benchmarks run, refuse what is wrong, and leave rows that say where they come from."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu, measure
from benchmarks import run as benchmarks_run
from benchmarks.forms import FORMS
from benchmarks.loops import LOOPS
from benchmarks.suites import Suite
from fusedaccum.bench import gate, timing
from fusedaccum.bench.shapes import count
from fusedaccum.doctor import machine
from fusedaccum.doctor.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# What every row must carry, so that a number can be traced to where it was measured.
FIELDS = {
    *("device", "driver", "n_cores", "n_threads", "torch", "triton", "python", "commit", "date"),
    *("operation", "variant", "shape", "dtype", "n", "n_elements", "bytes", "samples", "load"),
    *("p20_ms", "p50_ms", "p80_ms", "host_ms", "ratio", "copy_share", "grad_error"),
}


def run(*arguments: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PART"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=inherited | {"OUT": str(out), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def check_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)
    assert rows
    for row in rows:
        assert row.keys() >= FIELDS
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert str(path.parent) not in text and str(ROOT) not in text
    return rows


def test_gpu_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interpreted = {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = run("tests.dry_run", out=tmp_path, **interpreted)
    assert done.returncode == 0, done.stdout + done.stderr
    check_dry_run(tmp_path, capsys)


def check_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part left its files, and no row is missing."""
    names = {path.name for path in folder.iterdir()}
    assert len(names) <= 10 and "gpu.log" in names
    files = {path: check_rows(path) for path in folder.glob("*-quick.json")}
    assert len(files) == 7 and any(name.endswith("finetune.json") for name in names)
    assert {row["operation"] for rows in files.values() for row in rows} == {
        *("accumulate_first", "accumulate", "accumulate_last_norm", "norm", "step", "window"),
        *("linear_wgrad", "linear_layer", "train_window", "reduced_window"),
        *("host_micro_batch", "host_update"),
        *("variant_accumulate", "variant_accumulate_last_norm", "variant_step"),
    }
    (cycle,) = (path for path in files if "cycle" in path.name)
    assert {(row["group"], row["n"]) for row in files[cycle]} == {(1, 1), (2, 2)}
    windows = {row["variant"]: row for row in files[cycle]}
    assert windows.keys() >= {"copy", "copy_again", "native_fp32", "fused_hooks", "plain_bf16"}
    assert windows["fused_hooks"]["grad_error"] < 1e-6 < windows["plain_bf16"]["grad_error"]
    assert windows["copy"]["precision"] is None
    assert "split masters" in windows["fused_hooks"]["precision"]
    assert benchmarks_run.main(["--show", str(cycle)]) == 0
    assert "fused_hooks takes" in capsys.readouterr().out
    (rows,) = (files[p] for p in files if "linear" in p.name)
    check_reduction([row for row in rows if row["operation"] == "reduced_window"])
    linear = {row["variant"]: row for row in rows if row["operation"] == "linear_wgrad"}
    assert linear.keys() >= {"mm", "fused_functional", "per_tensor_add"}
    assert linear["mm"]["tokens"] == 64 and linear["fused_functional"]["grad_error"] < 4e-3
    layers = {row["variant"]: row for row in rows if row["operation"] == "linear_layer"}
    assert layers.keys() >= {"layer_plain", "layer_hook", "layer_fused"}
    assert layers["layer_fused"]["grad_error"] < 1e-6
    (rows,) = (files[p] for p in files if "host" in p.name)
    assert {row["variant"] for row in rows} == {"autograd", "fused_hooks"}
    assert [row["launches"] for row in rows] == [1, 1, None]
    (rows,) = (files[p] for p in files if "variants" in p.name)
    choices = [row for row in rows if row["precision"]]
    assert {row["variant"] for row in choices} == {"as_it_is", "as_it_is_again", "vector_8"}
    assert all(row["grad_error"] < 1e-6 and row["update_error"] < 1e-6 for row in choices)
    text = (folder / "gpu.log").read_text("utf-8")
    assert "accumulate, norm, finalize, step: each ran, and is right" in text
    assert "REFUSED" not in text and "SKIPPED flashoptim_24: " in text
    assert "SKIPPED addmm_out_dtype: torch has it on CUDA only" in text
    (training,) = (path for path in files if "end-to-end" in path.name)
    check_training(training, capsys)
    if importlib.util.find_spec("matplotlib"):
        check_figures(folder, training.name, files[training][0])


def check_reduction(rows: list[dict[str, Any]]) -> None:
    """4 bytes of each parameter are sent, and stock DDP's 2 of bf16; buckets are counted."""
    for dtype, stock, size in (("bfloat16", "plain_bf16", 2), ("float32", "native_fp32", 4)):
        group = {row["variant"]: row for row in rows if row["dtype"] == dtype}
        assert group.keys() >= {"copy", "copy_again", "fused_hooks", stock}
        ours, theirs, n = group["fused_hooks"], group[stock], group["copy"]["n_elements"]
        # Ours also sends some numbers and pads each tensor to 16 elements.
        assert 4 * n <= ours["bytes"] < 4 * n + 600 and theirs["bytes"] == size * n
        assert (ours["launched"], theirs["launched"]) == (2, 1)
        assert ours["world"] == 2 and ours["comm"] == "gloo" and ours["grad_error"] < 1e-6
        assert (theirs["grad_error"] < 1e-6) == (dtype == "float32")


def check_training(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = check_rows(path)
    assert [row["variant"] for row in rows[:5]].count("floor_again") == 1
    assert {row["variant"] for row in rows} == {*LOOPS, "floor_again"}
    for row in rows:
        assert row["tax_p20"] <= row["tax_p50"] <= row["tax_p80"]
        assert row["tokens_per_s"] == pytest.approx(
            1e3 * row["n"] * row["tokens"] / row["p50_ms"], abs=0.06
        )
        assert row["model"] == "benchmarks.decoder.Decoder" and row["loss"] > 0
        assert (row["grad_error"] is None) == row["variant"].startswith("floor")
    assert benchmarks_run.main(["--show", str(path)]) == 0
    assert "tax p20" in capsys.readouterr().out


def check_figures(folder: Path, file: str, row: dict[str, Any]) -> None:
    """All are in the archive; those of training say what was measured where."""
    (archive,) = folder.glob("*-plots.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    figures = {path.stem: path for path in (folder / "plots").glob("*.svg")}
    assert figures.keys() >= {"share", "cycle", "tax", "memory", "host"}
    for name in ("tax", "memory"):
        assert figures[name].stat().st_size < 100_000
        text = " ".join(ElementTree.parse(figures[name]).getroot().itertext())
        for word in ("fused_hooks", "native_fp32", row["commit"], row["date"], file):
            assert word in text


def test_each_group_of_gpu_parts_fits_in_nine_minutes(tmp_path: Path) -> None:
    parts = gpu.parts(False, tmp_path)
    assert {part for group in gpu.GROUPS.values() for part in group} == parts.keys()
    for group in gpu.GROUPS:
        wanted, unknown = gpu.choose(group, parts)
        assert sum(parts[part].limit_s for part in wanted) < 9 * 60 and not unknown
    assert gpu.choose("rows, demo", parts) == ([*gpu.GROUPS["rows"], "demo"], [])
    assert gpu.choose("row", parts)[1] == ["row"]


def test_gpu_refuses_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2 and "no CUDA device" in capsys.readouterr().out
    monkeypatch.setenv("PART", "micros")
    assert gpu.main(["--dry-run"]) == 2 and "micros" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fused_assigned", "per_tensor_add", "cast_add", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_gate_lets_pass(
    name: str, dtype: torch.dtype, max_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms that `bench` does not have; what it refuses is in test_bench_cli.py."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    like = torch.empty(0, dtype=dtype)
    assert gate.gate(FORMS[name], Plan(max_norm=max_norm), like, cases.tiny()).grad_error < 1e-6


def test_variants_that_raise_are_left_out() -> None:
    refused = {}

    def broken() -> None:
        raise ValueError("no")

    samples = timing.interleave(
        {"sound": lambda: None, "broken": broken},
        timing.Clock(),
        rounds=4,
        budget_s=60,
        refuse=lambda name, error: refused.update({name: str(error)}),
    )
    assert refused == {"broken": "no"}
    assert samples.keys() == {"sound"} and len(samples["sound"].times) == 4


class Told(timing.Clock):
    """A call takes as many milliseconds as it returns."""

    def time(self, run: Any, lead: float) -> tuple[float, float]:
        return run(), run()


def test_the_time_limit_is_kept_by_fewer_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick() -> float:
        nonlocal now  # asked before the first round, and from the fourth on
        now += 0.5
        return now

    monkeypatch.setattr(timing.time, "perf_counter", tick)
    given_up: dict[str, str] = {}
    samples = timing.interleave(
        {"ours": lambda: 100.0, "slow": lambda: 900.0, "small": lambda: 1.0, "best": lambda: 300.0},
        Told(),
        rounds=50,
        budget_s=2.0,
        refuse=lambda name, error: given_up.update({name: str(error)}),
        spare=["slow", "small"],
    )
    assert given_up == {"slow": "3 rounds of all take 3.9 s"}
    counts = {name: len(timed.times) for name, timed in samples.items()}
    assert counts == {"ours": 7, "small": 7, "best": 7}


def test_the_cuda_clock_asks_for_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of its calls, on a machine without a GPU: nothing waits inside the timed region."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    class Properties:
        L2_cache_size = 64

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: calls.append(f"sleep {n}"), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    clock = timing.CudaClock(CPU)
    assert clock.buffer.nbytes == 4 * Properties.L2_cache_size
    calls.clear()
    elapsed, host = clock.time(lambda: calls.append("run"), 3.0)
    # A sleep of 4,000,000 cycles took 2 ms, so 3 ms are 6,000,000.
    assert calls == ["sleep 6000000", "record", "run", "record", "synchronize"]
    assert elapsed == 2.0 and 0 <= host < 1000


@pytest.mark.parametrize(
    ("name", "n_tensors", "n_elements"),
    [
        ("gpt2_small", 148, 124_439_808),
        ("llama_1b", 201, 1_100_048_384),
        ("lora_500", 500, 32_768_000),
        ("flat_64mi", 1, 64 * 2**20),
    ],
)
def test_shapes(name: str, n_tensors: int, n_elements: int) -> None:
    shapes = cases.SHAPES[name]()
    assert (len(shapes), count(shapes)) == (n_tensors, n_elements)


def test_misaligned_tensors_are() -> None:
    for tensor in cases.random(cases.odd(), torch.bfloat16, CPU, seed=0, offset=1):
        assert tensor.data_ptr() % 16 and tensor.is_contiguous()
    assert all(g.data_ptr() % 16 for g in cases.gradients("unaligned", torch.bfloat16, CPU))


def test_what_does_not_fit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    suite = Suite(CPU, Plan(n=2), rounds=3, budget_s=1, gate_shapes=cases.tiny(), name="x")
    names = ["fused_backend", "native_fp32", "foreach_add", "plain_bf16"]
    # 14 bytes per element for parameters, gradients and ceilings, 16 and 18 for the first two
    # forms; the third shares theirs.
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 1000 * 49 / 0.9)
    assert [*suite.build(names, [(1000,)], torch.bfloat16)] == names[:3]
    assert list(suite.skipped) == ["plain_bf16, 1,000 elements"]
    assert not suite.refused


def test_pytest_benchmark_runs_the_operations(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = run(
        *("pytest", "benchmarks", "--benchmark-disable", "-q", "-k", "tiny and not window"),
        *("-p", "no:cacheprovider"),
        out=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout


def test_results_are_added(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        paths.append(measure.new_path(tmp_path, "micro.json"))
        measure.save([{"p50_ms": 1.0}], paths[-1])
    assert len(set(paths)) == 3
    assert all(json.loads(path.read_text()) == [{"p50_ms": 1.0}] for path in paths)
