"""The wheel, built as a release is and used from elsewhere; and the list of packages in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a build reads; nothing else is copied, so leftovers in the working tree cannot help it.
SOURCES = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "fusedaccum", "kernels"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def package_directories() -> set[str]:
    """Dotted names of all directories under fusedaccum/ (through the symlink) that hold Python."""
    return {
        ".".join(Path(directory).relative_to(ROOT).parts)
        for directory, _, files in os.walk(ROOT / "fusedaccum", followlinks=True)
        if any(file.endswith(".py") for file in files)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, tree)
    # Without a target named, `build` makes the sdist and then the wheel from that sdist.
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_package_list_is_complete() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(config["tool"]["setuptools"]["packages"]) == package_directories()


def test_kernels_is_a_symlink_without_init() -> None:
    assert os.readlink(ROOT / "fusedaccum" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would install as top-level kernels"


def test_wheel_holds_every_source(wheel: Path) -> None:
    suffixes = {".py", ".c", ".h", ".typed"}
    wanted = {
        (Path(directory) / file).relative_to(ROOT).as_posix()
        for directory, _, files in os.walk(ROOT / "fusedaccum", followlinks=True)
        for file in files
        if Path(file).suffix in suffixes or file == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", site, wheel, cwd=tmp_path)
    script = shutil.copy(ROOT / "tests" / "wheel_check.py", tmp_path)
    output = run(sys.executable, script, site, cwd=tmp_path, PYTHONPATH=str(site))
    assert "the wheel works" in output
