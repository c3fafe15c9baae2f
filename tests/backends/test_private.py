"""A torch that lacks a private name: an error that says so, or a slower way to the same numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedaccum
from fusedaccum.window import backwards

# Trains a fused Linear where the torch names of the command line are gone before the import.
PROGRAM = """
import sys, torch
import torch._dynamo  # which needs some of the names as it is imported
for name in sys.argv[1:]:
    path, _, last = name.rpartition(".")
    place = torch
    for part in filter(None, path.split(".")):
        place = getattr(place, part)
    delattr(place, last)
try:
    import fusedaccum
except ImportError as error:
    sys.exit(str(error))
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
opt = fusedaccum.FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
report = opt.fuse_linear_wgrad(model, min_numel=0)
for x in torch.randn(4, 3, 8):
    model(x).square().mean().backward()
    opt.step()
    opt.zero_grad()
print(*report.fused, *report.skipped.values(), model.weight.double().sum().item(), sep="|")
"""
PRODUCT = "_C._will_engine_execute_node"


def run_without(*names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_every_step_needs_is_named_by_the_import() -> None:
    done = run_without("_C._current_graph_task_id")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    needed = "fusedaccum needs torch._C._current_graph_task_id, which is private to torch"
    assert needed in done.stderr and torch.__version__ in done.stderr


def test_what_some_need_is_done_without() -> None:
    """Layers are not fused, with the reason; torch's compiler is told in its public way."""
    usual, other = run_without(), run_without("_disable_dynamo", PRODUCT)
    assert usual.returncode == other.returncode == 0, usual.stderr + other.stderr
    _, usual_sum = usual.stdout.strip().split("|")
    reason, sum_ = other.stdout.strip().rsplit("|", 1)
    assert reason == f"torch {torch.__version__} has no torch.{PRODUCT}"
    assert float(sum_) == pytest.approx(float(usual_sum), rel=1e-6)


def test_compiled_autograd_is_refused_by_its_setting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the flag of a running one is gone."""
    from torch._dynamo import compiled_autograd

    monkeypatch.delattr(compiled_autograd, "in_compiled_autograd_region")
    with torch.no_grad():
        backwards.refuse_kind()
        with (
            torch._dynamo.config.patch(compiled_autograd=True),
            pytest.raises(RuntimeError, match="compiled autograd makes one graph"),
        ):
            backwards.refuse_kind()


def test_a_grad_scaler_without_what_is_asked_of_it_is_refused() -> None:
    """Nobody would call the method that is put in its place, and gradients come out wrong."""

    class Renamed(torch.amp.GradScaler):
        @property
        def _unscale_grads_(self) -> None:
            raise AttributeError

    param = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match="Renamed has no _unscale_grads_ in torch"):
        fusedaccum.FusedAccumOptimizer(
            torch.optim.SGD([param]), 2, grad_scaler=Renamed("cpu", enabled=True)
        )


def test_every_private_name_of_an_engine_is_asked_for_first() -> None:
    """Each is a string somewhere, in what `check` gets."""
    package = Path(fusedaccum.__file__).parent
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    nodes = {path: list(ast.walk(ast.parse(text))) for path, text in texts.items()}
    own, used, asked = set(), set(), set()
    for path, found in nodes.items():
        is_of_engines = path.parent.name == "distributed" or path.name in ("watch.py", "fsdp2.py")
        for node in found:
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                asked.add(node.value.rpartition(".")[2])
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    own.add(node.attr)
                elif is_of_engines:
                    used.add(node.attr)
    unasked = {name for name in used - own - asked if not name.startswith("__")}
    assert unasked <= {"_version", "_replace"}  # of every tensor, and of Python
