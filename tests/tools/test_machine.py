"""What `doctor` says about a machine: the warnings worth a word; tables and the progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedaccum.backends.compiled import compiler, openmp, store
from fusedaccum.doctor import machine, output
from tests.cases import forget_compiled

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled_again() -> Iterator[None]:
    forget_compiled()
    yield
    forget_compiled()


def warned(*words: str) -> bool:
    """Whether exactly one warning has all of these words."""
    return sum(all(word in text for word in words) for text in machine.warnings()) == 1


def test_warnings_of_a_sound_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(machine, "usable_cores", lambda: float(torch.get_num_threads()))
    monkeypatch.setattr(machine, "driver", lambda: None)
    if compiler.find() and openmp.runtime() and not torch.cuda.is_available():
        assert machine.warnings() == []


def test_cpu_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, value in (("TRITON_INTERPRET", "1"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(variable, value)
    assert warned("TRITON_INTERPRET is set", "unset it")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2.0)
    assert warned("4 threads", "2 cores", "Set OMP_NUM_THREADS=2")
    monkeypatch.setattr(machine, "usable_cores", lambda: 64.0)
    assert warned("4 threads of 64 cores", "OMP_NUM_THREADS=1")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert warned("torch 2.9.1+cu128 is older than 2.11")
    monkeypatch.setattr(machine, "version_of", lambda package: "3.5.0")
    assert warned("triton 3.5.0 is older than 3.6")
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(store, "folder", lambda: blocked / "cache")
    assert warned(str(blocked), "cannot be written", "XDG_CACHE_HOME")
    monkeypatch.setattr(openmp, "runtime", lambda: None)
    assert warned("OpenMP", "one thread of 4")
    monkeypatch.setattr(store, "folder", lambda: None)
    assert warned("no home directory", "XDG_CACHE_HOME")
    monkeypatch.setenv("FUSEDACCUM_CC", "0")
    forget_compiled()
    assert warned("FUSEDACCUM_CC=0", "8.5 times to step")


def test_no_compiler_is_worth_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDACCUM_CC", "no-such-compiler")
    forget_compiled()
    assert warned("no C compiler", "Install a C compiler")
    assert machine.backend_of(CPU, torch.bfloat16)["path"] == "ATen blocks"


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((6, 1), ("compute capability 6.1", "Triton does not serve", 'backend="torch"')),
        ((7, 5), ("compute capability 7.5", "emulates bf16", "prefer fp16")),
        ((9, 0), ()),
    ],
)
def test_gpu_warnings(
    capability: tuple[int, int],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """On a machine that says it has a GPU; Triton is not asked to run anything."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device: "a GPU",
        "get_device_capability": lambda device: capability,
        "is_bf16_supported": lambda including_emulation: capability >= (8, 0),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    kind = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: kind)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert machine._gpu_warnings() == [] if not words else warned("cuda:0 (a GPU", *words)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert warned("cannot be written", "TRITON_CACHE_DIR")
    assert machine.choose(None) == [CPU, torch.device("cuda", 0)]
    assert machine.choose("cuda") == machine.choose("cuda:0") == [torch.device("cuda", 0)]


@pytest.mark.parametrize(("build", "words"), [(None, "CPU build"), ("13.0", "newer than")])
def test_a_gpu_that_torch_does_not_use(
    build: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(machine, "driver", lambda: "535.1")
    assert warned("GPU driver (535.1)", words)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"form": "fusedaccum", "ms": 1.5}, {"form": "x", "ms": 12.25}]
    columns = {"form": output.column("form"), "ms": output.column("ms", "g")}
    output.print_rows("title", rows, columns)
    plain = capsys.readouterr().out
    assert plain == "\ntitle\n  form           ms\n  fusedaccum    1.5\n  x           12.25\n"
