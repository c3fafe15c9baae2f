"""What CI and a release rely on: the versions that are promised are those that are tested."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


ADDRESS = "https://github.com/somebody/fusedaccum"


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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with what the README links to."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "benchmarks", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def write_address(address: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        runpy.run_path(str(ROOT / "docs" / "address.py"))["main"](address, str(folder))


def test_code_of_a_page_keeps_what_looks_like_a_link(copy: Path) -> None:
    code = "`rows[0](index)`\n\n```python\ncalls[name](row)\n```\n"
    with (copy / "README.md").open("a") as page:
        page.write(code)
    write_address(ADDRESS, copy)
    assert (copy / "README.md").read_text().endswith(code)


@pytest.mark.parametrize("ending", ["", "/", ".git"])
def test_a_release_links_to_its_repository(copy: Path, ending: str) -> None:
    write_address(ADDRESS + ending, copy)
    (version,) = re.findall(r'^version = "(.*)"', read("pyproject.toml"), re.M)
    project = (copy / "pyproject.toml").read_text()
    assert project.startswith(read("pyproject.toml") + "\n[project.urls]\n")
    urls = dict(re.findall(r'^(\w+) = "(https:.*)"$', project, re.M))
    assert {"Homepage", "Documentation", "Issues", "Changelog"} <= urls.keys()
    assert urls["Homepage"] == ADDRESS
    page = (copy / "README.md").read_text()
    # As many links and pictures as before, each to a file that is there.
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", page)
    assert len(links) == len(re.findall(r"\]\(", read("README.md")))
    tree = f"{ADDRESS}/{{}}/v{version}/"
    places = [*urls.values(), *(target for _, target in links)]
    for target in places:
        assert target.startswith("https://")
        if target.startswith(tree.format("blob")):
            assert (ROOT / target.removeprefix(tree.format("blob")).partition("#")[0]).is_file()
    pictures = [target for picture, target in links if picture]
    assert pictures and all(target.startswith(tree.format("raw")) for target in pictures)
    # Nothing but the addresses changed.
    kinds = (f"{ADDRESS}/{kind}/v{version}/" for kind in ("blob", "raw"))
    for prefix in kinds:
        page = page.replace(prefix, "")
    assert page == read("README.md")


def test_an_address_that_is_none_or_a_link_to_nothing_stops_a_release(copy: Path) -> None:
    for wrong in ("github.com/somebody/fusedaccum", "https://github.com", ""):
        with pytest.raises(SystemExit, match="is no address such as https://"):
            write_address(wrong, copy)
    with (copy / "README.md").open("a") as page:
        page.write("[gone](docs/gone.md)\n")
    with pytest.raises(SystemExit, match=r"docs/gone\.md, and there is no such file"):
        write_address(ADDRESS, copy)
    assert (copy / "pyproject.toml").read_text() == read("pyproject.toml")


def test_the_workflow_gives_the_address() -> None:
    assert 'ADDRESS="$GITHUB_SERVER_URL/$GITHUB_REPOSITORY"' in read(
        ".github/workflows/release.yml"
    )
    assert "docs/address.py '$(ADDRESS)'" in read("Makefile")
