"""The examples run as a reader runs them: each alone, in a process and a directory of its own."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SEVERAL = """
import os, runpy, sys
os.chdir({cwd!r})
for arguments in {runs!r}:
    sys.argv = [{path!r}, *arguments]
    print(end="\\f", flush=True)
    runpy.run_path({path!r}, run_name="__main__")
"""


def run(name: str, directory: Path, *runs: str, **more: str) -> list[str]:
    """The output of runs with these options, one after the other in one process, which begins with
    torch and `fusedaccum` imported."""
    # Kernels in the interpreter are for the tests of kernels: an example takes the machine's own.
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    arguments = [["--quick", *options.split()] for options in runs]
    program = SEVERAL.format(cwd=str(directory), path=str(EXAMPLES / f"{name}.py"), runs=arguments)
    (done,) = forked.shared().run(program, environment)
    assert done.status == 0, done.output
    return done.output.split("\f")[1:]


def needs(*modules: str) -> None:
    """Found without an import: transformers alone takes seconds."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


WRONG = [
    *((name, "--updates 0") for name in ("accelerate_loop", "custom_rule", "ddp", "finetune")),
    *((name, "--n -2") for name in ("fsdp2", "lightning_module", "token_weights", "trainer")),
    *(("finetune", "--lr nan"), ("resume", "--dim 0"), ("lora", "--rank 0"), ("lora", "--dim 48")),
    *((name, "--device mars") for name in ("finetune", "lora", "resume", "token_weights")),
]
NEEDS = {
    "accelerate_loop": ["accelerate", "transformers"],
    "lightning_module": ["lightning"],
    "lora": ["transformers", "peft"],
    "trainer": ["transformers", "accelerate"],
}


@pytest.mark.parametrize(("name", "options"), WRONG, ids=[" ".join(pair) for pair in WRONG])
def test_a_wrong_option_is_a_sentence(name: str, options: str, tmp_path: Path) -> None:
    needs(*NEEDS.get(name, []))
    program = SEVERAL.format(
        cwd=str(tmp_path), path=str(EXAMPLES / f"{name}.py"), runs=[options.split()]
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    (done,) = forked.shared().run(program, environment | {"PYTHONPATH": str(ROOT)})
    assert f"{name}.py: error: {options.split()[0]}" in done.output
    assert done.output.endswith("SystemExit: 2\n"), done.output  # which the runner prints


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


def five_updates(name: str, directory: Path) -> str:
    """What an example on a framework of Hugging Face prints."""
    needs("transformers", "accelerate")
    (out,) = run(name, directory, "", CUDA_VISIBLE_DEVICES="")
    assert "FusedAccumOptimizer(AdamW)" in out
    assert "owned by the loop" in out and "bfloat16 with split master" in out
    assert "5 updates of 4 micro-batches, 0 skipped" in out
    return out


def test_trainer(tmp_path: Path) -> None:
    out = five_updates("trainer", tmp_path)
    before, after = re.findall(r"loss ([\d.]+) -> ([\d.]+) nats per byte", out)[0]
    # An untrained model of 256 bytes has a loss of log(256) = 5.5; five updates lower it a little.
    assert 5.4 < float(before) < 5.8 and float(after) < float(before) - 0.1


def test_accelerate_loop(tmp_path: Path) -> None:
    out = five_updates("accelerate_loop", tmp_path)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) nats per byte", out)]
    assert len(losses) == 5
    assert 5.4 < losses[0] < 5.8 and losses[-1] < losses[0] - 0.1


def test_custom_rule_without_triton() -> None:
    path = str(EXAMPLES / "custom_rule.py")
    program = f"import runpy, sys; sys.modules['triton'] = None; runpy.run_path({path!r})"
    (done,) = forked.shared().run(program, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.status == 1 and "This example needs Triton" in done.output


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
