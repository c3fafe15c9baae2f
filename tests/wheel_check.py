"""Is the fusedaccum that this interpreter imports a complete, working installed wheel?

A script, not a test: `python wheel_check.py SITE_PACKAGES`, run from outside the repository by an
interpreter that sees the installation in SITE_PACKAGES. `make wheel-test` and
tests/tools/test_packaging.py use it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import torch

import fusedaccum


def check_files(site: Path) -> None:
    found = Path(fusedaccum.__file__).resolve().parent
    assert found == site / "fusedaccum", f"imported from {found}, not from {site}"
    assert (found / "py.typed").is_file(), "py.typed is missing"
    assert not (found / "kernels").is_symlink(), "kernels was installed as a symlink"

    (distribution,) = importlib.metadata.distributions(name="fusedaccum", path=[str(site)])
    # All but the console script, which lies outside: ../../../bin/fusedaccum, say.
    files = [Path(file) for file in distribution.files or ()]
    tops = {file.parts[0] for file in files if file.parts[0] != ".." or file.stem != "fusedaccum"}
    assert tops == {"fusedaccum", f"fusedaccum-{distribution.version}.dist-info"}, tops

    # Another project's "kernels" may be installed here; ours must not be it.
    spec = importlib.util.find_spec("kernels")
    places = list(spec.submodule_search_locations or ()) if spec else []
    assert not any((Path(place) / "accumulate.py").exists() for place in places), places


def check_kernels() -> int:
    """Triton compiles a kernel from its source text, so the source must be found."""
    accumulate = importlib.import_module("fusedaccum.kernels.accumulate")
    kernels = [value for value in vars(accumulate).values() if hasattr(value, "fn")]
    for kernel in kernels:
        assert "def " in inspect.getsource(kernel.fn)
    assert kernels, "fusedaccum.kernels.accumulate holds no @triton.jit function"
    return len(kernels)


def check_use() -> None:
    """Two micro-batches of SGD, against torch by hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(device)
    batches = [torch.randn(4, 5, device=device) for _ in range(2)]

    expected = []
    for param in model.parameters():
        grads = [torch.autograd.grad(model(x).square().mean(), param)[0] for x in batches]
        expected.append(param.detach() - 0.1 * (grads[0] + grads[1]) / 2)

    optimizer = fusedaccum.FusedAccumOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), gradient_accumulation_steps=2
    )
    for x in batches:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for param, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), wanted)


def check_doctor() -> int:
    """The installed commands need nothing of the repository; every operation is right."""
    command = [sys.executable, "-m", "fusedaccum", "doctor", "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["n_checks"] > 100, found
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fusedaccum")
    assert callable(script.load())
    return int(found["n_checks"])


def main() -> None:
    check_files(Path(sys.argv[1]).resolve())
    n_kernels = check_kernels() if importlib.util.find_spec("triton") else "no"
    check_use()
    n_checks = check_doctor()
    print(
        f"the wheel works: {n_kernels} kernels in accumulate, {n_checks} checks by its doctor, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
