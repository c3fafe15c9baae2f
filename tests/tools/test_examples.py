"""The examples run as a reader runs them: each alone, in a process and a directory of its own."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


SEVERAL = """
import runpy, sys
name, *runs = sys.argv[1:]
for options in runs:
    sys.argv = [name, *options.split()]
    print(end="\\f", flush=True)
    runpy.run_path(name, run_name="__main__")
"""


def run(name: str, directory: Path, *runs: str) -> list[str]:
    """The output of runs with these options, one after the other in one process; `fusedaccum` is
    found as it is here, installed or not."""
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("OUT", None)
    # Kernels in the interpreter are for the tests of kernels: an example takes the machine's own.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(EXAMPLES / f"{name}.py")]
        + [f"--quick {options}" for options in runs],
        cwd=directory,
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split("\f")[1:]


def needs(*modules: str) -> None:
    """Found without an import: transformers alone takes seconds."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


def test_lora(tmp_path: Path) -> None:
    needs("transformers", "peft")
    out, other = run("lora", tmp_path, "", "--adapters bfloat16")
    assert "bfloat16 with split master" in out and "28 float32" in out
    (before, after), (again,) = (
        re.findall(r"(\d\.\d+) before, (\d\.\d+) after", out)[0],
        re.findall(r"loaded again: (\d\.\d+)", out),
    )
    assert before != after == again
    assert "28 bfloat16 with split master" in other


def test_lightning_module(tmp_path: Path) -> None:
    needs("lightning")
    out, other = run("lightning_module", tmp_path, "", "--n 5 --precision 32-true")
    assert "12 micro-batches per epoch: 3 windows of 4\n" in out
    assert "after    3 updates: validation loss 5." in out
    assert "9 bfloat16 with split master" in out and "owned by the loop" in out
    assert "2 windows of 5, and one of 2" in other and "after    3 updates" in other
    assert not [*tmp_path.iterdir()]


def test_token_weights(tmp_path: Path) -> None:
    (out,) = run("token_weights", tmp_path, "")
    errors = {
        line.split("  ")[0]: float(line.split()[-2]) for line in out.splitlines() if "e-" in line
    }
    assert errors["mean of means"] > 1e-3
    assert errors["micro_batch(weight=n_tokens)"] < 1e-6
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "out" / "token_weights.png").read_bytes().startswith(b"\x89PNG")


def test_resume(tmp_path: Path) -> None:
    (out,) = run("resume", tmp_path, "")
    killed = re.findall(r"killed in micro-batch \d+, (\d) of 8 in the window", out)
    assert len(killed) == 2 and all(0 < int(count) < 8 for count in killed)
    resumed = re.findall(r"with (\d) of 8 micro-batches in it", out)
    assert len(resumed) == 2 and all(0 < int(count) < 8 for count in resumed)
    assert out.endswith("the same to the bit: bf16 weights, and the fp32 masters behind them\n"), (
        out
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_can_be_copied_alone(name: str) -> None:
    """It imports the library and packages, and nothing that lies beside it."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    beside = {path.stem for path in EXAMPLES.glob("*.py")} | {"examples", "benchmarks", "tests"}
    assert not imported & beside
    assert "fusedaccum" in imported
