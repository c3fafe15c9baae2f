"""The end-to-end benchmark: its loops train the same model, its gate refuses one that does not, and
figures are drawn from the newest rows. That it runs is in test_benchmarks.py."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import decoder, end_to_end, memory, plot
from benchmarks.loops import LOOPS, Loop
from fusedaccum.bench.forms import Native, Plain
from fusedaccum.doctor.checks import Wrong
from fusedaccum.doctor.forms import Form, Wrapper
from fusedaccum.doctor.plan import Plan
from tests.threads import one_thread

CPU = torch.device("cpu")
SIZES = decoder.SIZES["llama_tiny"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return decoder.build(SIZES, CPU)


def errors(kind: type[Form], model: nn.Module) -> dict[str, float]:
    return end_to_end.gate(kind, model, SIZES.vocabulary, Plan(n=4))


@pytest.mark.parametrize("kind", [Native, Wrapper])
def test_exact_loops_pass(kind: type[Form], model: nn.Module) -> None:
    found = errors(kind, model)
    assert found["grad_error"] < 1e-6 and found["update_error"] < 1e-3
    assert found["noise"] == 0.0  # or the bound would not be the gate's


def test_plain_bf16_passes_with_its_error(model: nn.Module) -> None:
    assert errors(Plain, model)["grad_error"] > 1e-4


class NotDivided(Native):
    """Sums instead of averaging; AdamW without clipping would hide it."""

    loss_is_divided = False


class OneMore(Wrapper):
    """Adds gradients that are of no micro-batch."""

    def begin(self, index: int) -> None:
        super().begin(index)
        if index == 2:
            self.deliver([1e-3 * p.detach() for p in self.params])


class NotCopied(Native):
    """Steps masters that the model never sees."""

    def update(self) -> None:
        before = [p.detach().clone() for p in self.params]
        super().update()
        with torch.no_grad():
            torch._foreach_copy_(self.params, before)


class Rounded(Plain):
    """Says that it is exact, and sums in bf16."""

    is_exact = True


@pytest.mark.parametrize("kind", [NotDivided, OneMore, NotCopied, Rounded])
def test_the_gate_refuses(kind: type[Form], model: nn.Module) -> None:
    with pytest.raises(Wrong):
        errors(kind, model)


@pytest.mark.parametrize("name", LOOPS)
def test_bytes_at_rest(name: str, model: nn.Module) -> None:
    """Per parameter: bf16 weights, then AdamW's two states, masters and accumulators."""
    expected = {"floor": 2, "plain_bf16": 2 + 4, "native_fp32": 2 + 4 + 4 + 8, "fused_hooks": 16}
    n = sum(p.numel() for p in model.parameters())
    ids = end_to_end.batches(2, 32, SIZES.vocabulary, CPU)
    plan = Plan(n=2)
    _, rest, peak = memory.footprint(
        CPU, lambda: Loop(LOOPS[name], model, plan), lambda loop: loop.window(ids)
    )
    # Buffers, step counts and partial sums; each part of a flat buffer is rounded up to 16.
    assert expected[name] <= rest / n < expected[name] + 0.25
    assert peak > rest + 2 * n * (name != "floor")


def test_live_bytes_are_those_of_new_tensors() -> None:
    old = torch.ones(1000)
    with memory.LiveBytes() as counted:
        view = old[:10]
        old.add_(1)
        assert (counted.live, counted.peak) == (0, 0)
        new = old + view.sum()
        assert counted.live == new.nbytes
        del new
        assert counted.live == 0 and counted.peak >= 4000
        kept = torch.zeros(5, dtype=torch.bfloat16)
    assert counted.live == kept.nbytes


def test_a_tax_is_of_two_times_of_one_round() -> None:
    samples = end_to_end.paired([11.0, 22.0, 36.0], [10.0, 20.0, 30.0])
    assert samples.times == pytest.approx([10.0, 10.0, 20.0])
    assert samples.quantile(0.5) == pytest.approx(10.0)


def test_the_grid_is_a_cross() -> None:
    assert end_to_end.grid([512, 2048], [1, 8, 16]) == [(512, 8), (2048, 8), (512, 1), (512, 16)]
    assert end_to_end.grid([64], [1, 4]) == [(64, 4), (64, 1)]


def test_a_loop_that_does_not_fit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Loop.micro_batch

    def micro_batch(self: Loop, ids: Tensor, index: int) -> Tensor:
        if ids.numel() == 64 and self.form is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return original(self, ids, index)

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(Loop, "micro_batch", micro_batch)
    for name in ("native_fp32", "fused_hooks"):
        monkeypatch.delitem(LOOPS, name)
    arguments = ["--device", "cpu", "--quick", "--tokens", "16,64"]
    assert end_to_end.main(arguments) == 0
    assert "SKIPPED plain_bf16, 64 tokens: OutOfMemoryError: CUDA out of memory.\n" in (
        capsys.readouterr().out
    )


def test_the_newest_rows_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"group": 1, "operation": "window", "shape": "tiny", "n": 8, "variant": "copy"}
    for name in ("2026-01-01-cycle-9", "2026-01-01-cycle-10", "2025-12-31-cycle"):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]), "utf-8")
    found = plot.newest(plot.groups(tmp_path), "shape", "n")
    assert found["tiny", 8][0]["file"] == "2026-01-01-cycle-10.json"
    assert plot.main([str(tmp_path / "empty")]) == 1
    if importlib.util.find_spec("matplotlib"):
        assert "no rows for cycle" in capsys.readouterr().out
