"""What CI and a release rely on: the versions that are promised are those that are tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_promised_version_is_tested() -> None:
    project, workflow = read("pyproject.toml"), read(".github/workflows/ci.yml")
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    (pythons,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r'"(.*?)"', pythons) == promised
    assert f'requires-python = ">={promised[0]}"' in project
    (oldest,) = re.findall(r'"torch>=(.*?)"', project)
    assert f'torch: ["=={oldest}.*", ">={oldest}"]' in workflow
    assert "run: .ci/run\n" in workflow


def test_the_version_stands_in_one_place() -> None:
    (version,) = re.findall(r'^version = "(.*)"', read("pyproject.toml"), re.M)
    assert f"## [{version}]" in read("CHANGELOG.md")
    assert "version:" not in read("CITATION.cff").replace("cff-version:", "")
    assert "importlib" in read("fusedaccum/__init__.py")


def test_hooks_before_a_commit_are_those_of_make_check() -> None:
    (typed,) = re.findall(r"^TYPED := (.*)$", read("Makefile"), re.M)
    hooks = read(".pre-commit-config.yaml")
    for command in ("ruff check", "ruff format --check", f"mypy {typed}"):
        assert f"entry: .venv/bin/python -m {command}\n" in hooks
        assert f"$(PY) -m {command.replace(typed, '$(TYPED)')}" in read("Makefile")


def test_issues_ask_for_what_the_doctor_says() -> None:
    for form in ("bug", "speed", "wish"):
        assert "python -m fusedaccum doctor --json" in read(f".github/ISSUE_TEMPLATE/{form}.yml")
