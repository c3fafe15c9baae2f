"""`python -m fusedaccum doctor`: sound machines pass, every kind of fault is found and named."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fusedaccum import __main__ as cli
from fusedaccum.backends import Add, Finalize, Keep, Step, SumOfSquares
from fusedaccum.backends.aten import TorchBackend
from fusedaccum.backends.compiled import compiler, source
from fusedaccum.doctor import checks
from fusedaccum.doctor import run as doctor
from fusedaccum.doctor import steps as check_steps
from fusedaccum.doctor.plan import OPTIMIZERS
from fusedaccum.rules.builtin import RULES
from fusedaccum.window.weights import Window
from tests.cases import WithoutCompiler, forget_compiled
from tests.commands import exit_status, run_command

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALL_CHECKS = doctor.checks_of


@pytest.fixture(autouse=True)
def compiled_again() -> Iterator[None]:
    forget_compiled()
    yield
    forget_compiled()


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the doctor run only the checks whose names match."""

    def choose(pattern: str) -> None:
        def some(*args: Any) -> list[checks.Check]:
            found = [check for check in ALL_CHECKS(*args) if re.search(pattern, check.name)]
            assert found
            return found

        monkeypatch.setattr(doctor, "checks_of", some)
        monkeypatch.setattr(check_steps, "compile_ahead", lambda full: None)

    return choose


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and what --json prints, which is one JSON object and nothing else."""
    status = cli.main(["doctor", "--json", "--device", "cpu", *arguments])
    return status, json.loads(capsys.readouterr().out)


def failures(found: dict[str, Any]) -> list[str]:
    return [check["name"] for check in found["checks"] if check["error"]]


# --- a sound machine ---


def test_a_sound_machine_in_a_process_of_its_own() -> None:
    done = run_command("doctor", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"ok: \d{3} checks in [\d.]+ s", last)
    for word in ("installed", "devices", "warnings", "torch ", "c compiler", "bfloat16"):
        assert word in done.stdout


def test_what_is_checked_covers_every_rule_and_layout() -> None:
    names = {check.name for check in ALL_CHECKS(CPU, None, False)}
    more = {check.name for check in ALL_CHECKS(CPU, None, True)}
    assert names < more
    for rule in RULES:
        for layout in ("fp32", "bf16", *(f"bf16{kind}" for kind in check_steps.KINDS.values())):
            assert f"step {rule}, {layout}" in names
        assert any(re.fullmatch(rf"step {rule}, .*, unaligned", name) for name in names)
        assert f"step {rule}, fp16 with fp32 master, unaligned" in more
    for optimizer in OPTIMIZERS:
        assert f"window of 4, {optimizer}, bf16, clipped" in names
    for dtype in ("fp32", "bf16", "fp16"):
        assert f"window of 4, adamw, {dtype}, clipped" in names
        for variant in ("first", "later", "first, with norm", "later, with norm"):
            assert {f"accumulate {dtype}, {variant}{end}" for end in ("", ", unaligned")} <= names


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_the_other_backends_pass(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: Callable[[str], None],
) -> None:
    """ATen blocks, and the GPU's kernels in the interpreter. Their operations pass, one by one, in
    tests/backends/test_kernels.py."""
    if backend == "triton" and not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(checks, "SIZES", (0, 1, 1025, 8193))
    only("accumulate bf16, later|step adam, bf16 with split|window.*(sgd|weights|NaN)")
    if backend == "aten":
        WithoutCompiler(monkeypatch)
    status, found = report(capsys, *([] if backend == "aten" else ["--backend", "triton"]))
    assert failures(found) == [] and status == 0 and found["n_checks"] >= 10


@pytest.mark.gpu
def test_a_gpu_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--device", "cuda"]) == 0
    found = json.loads(capsys.readouterr().out)
    (gpu,) = [device for device in found["devices"] if device["device"] == "cuda:0"]
    assert {backend["backend"] for backend in gpu["backends"].values()} == {"triton"}
    assert {check["device"] for check in found["checks"]} == {"cuda:0"}


def test_inputs_are_new_each_time() -> None:
    checks.normal(5, 1).zero_()
    assert checks.normal(5, 1).any() and torch.equal(checks.normal(5, 1), checks.normal(5, 1))


def test_an_error_says_where_in_a_matrix() -> None:
    got = torch.zeros(3, 31, dtype=torch.float64)
    got[2, 30] = 1.0
    with pytest.raises(checks.Wrong, match="of 93 elements, element 92: 1 where 0 is right"):
        checks.require_close("matrix", got, torch.zeros_like(got), torch.full_like(got, 1e-9))


# --- faults ---


def after(method: str, spoil: Callable[..., None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault: `spoil(request)` runs after the CPU backend's `method`."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(TorchBackend, method)

        def broken(self: Any, request: Any) -> None:
            original(self, request)
            spoil(request)

        monkeypatch.setattr(TorchBackend, method, broken)

    return install


def last_of_sum(request: Add) -> None:
    acc, _ = request.pairs[-1]
    acc[-1] *= 1 + 1e-6


def nan_in_a_state(request: Step) -> None:
    request.tensors[-1].states[0][40_000] = math.nan


def beyond_the_end(request: Step) -> None:
    param = request.tensors[3].param
    param.as_strided((1,), (1,), param.storage_offset() + param.numel()).zero_()


def wrong_remainder(request: Step) -> None:
    master = request.tensors[5].master
    if request.keep is Keep.SPLIT and master is not None:
        master[7] += 300


def wrong_count(request: Finalize) -> None:
    request.scalars.steps.add_(1)


def never_skips(request: Finalize) -> None:
    request.scalars.skip.zero_()


def wrong_sums(request: SumOfSquares) -> None:
    request.sums[request.cells[-1] + 1] *= 1.0002


def text_of_rules(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in what the C compiler is given for a rule."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        original = source.step_source

        def broken(*args: Any) -> str:
            return original(*args).replace(old, new)

        monkeypatch.setattr(source, "step_source", broken)

    return install


def unscaled_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Window.correction
    monkeypatch.setattr(Window, "correction", lambda self: original(self) * 1.0001)


FAULTS = {
    "a sum off by 1e-6": (after("accumulate", last_of_sum), "accumulate", "element 40008"),
    "NaN in a state": (after("step", nan_in_a_state), "step adam,", "nan where"),
    "a write beyond the end": (after("step", beyond_the_end), "step lion", "beside a parameter"),
    "a wrong remainder": (after("step", wrong_remainder), "step sgd,.*split", "element 7"),
    "a wrong step count": (after("finalize", wrong_count), "finalize", "step counts"),
    "a NaN that is not skipped": (after("finalize", never_skips), "NaN|skipped", "skipped"),
    "a wrong norm": (after("sum_of_squares", wrong_sums), "norm", "sum of squares of chunk 1"),
    "a square root off by 1e-5": (
        text_of_rules("sqrtf(", "1.00001f * sqrtf("), "step adam, fp32", "element"
    ),
    "a forgotten decay": (text_of_rules("(param * decay_)", "param"), "step adam,", "element"),
    "truncation to bf16": (text_of_rules("+ 0x7FFFu", ""), "step lion, bf16$", "parameter"),
    "rounding that is not random": (
        text_of_rules("mix_bits(key + i *", "mix_bits(key + 0 *"), "stochastic", "parameter"
    ),
    "a mean off by 1e-4": (unscaled_windows, "window of", "is right"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: Callable[[str], None],
) -> None:
    install, pattern, message = FAULTS[fault]
    if compiler.find() is None and install.__qualname__.startswith("text_of_rules"):
        pytest.skip("no C compiler: there is no text to spoil")
    only(pattern)
    assert report(capsys)[0] == 0, "sound before"
    install(monkeypatch)
    forget_compiled()
    status, found = report(capsys)
    assert status == 1 and found["ok"] is False and found["n_failed"] == len(failures(found)) > 0
    errors = [check["error"] for check in found["checks"] if check["error"]]
    assert any(message in error for error in errors), errors
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert f"FAILED: {found['n_failed']} of {found['n_checks']} checks" in text
    assert failures(found)[0] in text and message in " ".join(text.split())


def test_a_wrong_constant_in_the_scalars_of_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: Callable[[str], None],
) -> None:
    kernels = pytest.importorskip("fusedaccum.kernels.rules")
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(checks, "SIZES", (0, 1, 1025))
    only("step (nadam|adam), fp32$")
    assert report(capsys, "--backend", "triton")[0] == 0
    monkeypatch.setattr(kernels, "LOG_0_96", kernels.tl.constexpr(-0.0408))
    status, found = report(capsys, "--backend", "triton")
    assert status == 1 and failures(found) == ["step nadam, fp32"]


def test_an_exception_is_a_finding_and_the_rest_is_checked(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: Callable[[str], None],
) -> None:
    def raises(*_: Any) -> None:
        raise RuntimeError("the kernel does not compile\n" + 300 * "because ")

    only("norm fp32|finalize")
    after("sum_of_squares", raises)(monkeypatch)
    status, found = report(capsys)
    assert status == 1 and failures(found) == ["norm fp32", "norm fp32, unaligned"]
    cli.main(["doctor", "--device", "cpu"])
    assert "RuntimeError: the kernel does not compile because" in capsys.readouterr().out


def test_a_lost_device_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: Callable[[str], None],
) -> None:
    calls = []

    def raises(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    only("norm fp32|norm bf16")
    after("sum_of_squares", raises)(monkeypatch)
    _, found = report(capsys)
    assert len(calls) == 1 and found["n_failed"] == found["n_checks"] > 1


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--device", "gpu"], "--device got 'gpu'; there is here: cpu"),
        (["doctor", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["docter"], "invalid choice: 'docter'"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*arguments) == 2
    assert message in capsys.readouterr().err


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out
