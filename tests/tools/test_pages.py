"""The pages of docs/: what the site's menu names, links that lead somewhere on GitHub and on the
site, and code that runs. The site itself is built by `make docs`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fusedaccum
from benchmarks.memory import LiveBytes
from fusedaccum.integrations import callbacks
from fusedaccum.integrations.linear import FusesLinear
from fusedaccum.integrations.measured import Measured
from tests import gallery, readme_tables

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
# Pages whose blocks of Python run one after the other, in one set of names.
RUN = ["index.md", "concepts.md", "speed.md"]


def load_hooks() -> ModuleType:
    """docs/site_hooks.py, which mkdocs loads by its path too."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
ORIGINS = [f"docs/{path.name}" for path in DOCS] + [
    path for path in HOOKS.TAKEN_IN if (ROOT / path).is_file()
]


def slugs(text: str) -> set[str]:
    """What GitHub and the site call the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M
    ):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def leads_somewhere(link: str, source: str, text: str) -> bool:
    """Whether a link of a page is an address, or leads to a file and a heading that exist."""
    path, fragment = HOOKS.target(source, link), link.partition("#")[2]
    if "://" in link:
        return True
    if path is not None and not (ROOT / path).exists():
        return False
    return not fragment or fragment in slugs(HOOKS.as_page(path) if path else text)


def broken(source: str, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    return [link for link in HOOKS.links(text) if not leads_somewhere(link, source, text)]


# --- menu and links ---


def test_the_menu_names_every_page_once() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:")[1].split("\ntheme:")[0]
    named = re.findall(r"(\S+\.md)$", menu, re.M)
    assert sorted(named) == sorted({HOOKS.place(path) for path in ORIGINS})


@pytest.mark.parametrize("source", ORIGINS)
def test_links_lead_somewhere(source: str) -> None:
    assert broken(source, HOOKS.as_page(source)) == []


def test_a_broken_link_is_found() -> None:
    text = "# A b\n[x](gone.md) [y](loops.md#gone) [z](#a-b) ![](http://x.y/z) `[c](code.md)`\n"
    assert broken("docs/page.md", text) == ["gone.md", "loops.md#gone"]


def test_links_are_turned_to_where_the_site_has_them() -> None:
    text = "[k](../kernels/README.md#no-autotune) [l](loops.md) `[c](../code.md)` [g](../gone.md)"
    assert HOOKS.moved(text, "docs/x.md") == text.replace("../kernels/README.md", "kernels.md")
    assert HOOKS.moved("[d](../docs/linear.md)", "kernels/README.md") == "[d](linear.md)"
    assert HOOKS.moved("[k](../kernels/README.md)", "examples/ddp.py") == "[k](../kernels.md)"
    plot = "results/m/plots/share.svg"
    real = plot.replace("/m/", "/intel-r-xeon-r-processor/")
    assert HOOKS.moved(f"![s]({real})", "benchmarks/README.md") == f"![s](benchmarks/{real})"
    assert HOOKS.moved(f"![s]({plot})", "benchmarks/README.md") == f"![s]({plot})"


# --- reference ---


def test_the_reference_names_everything_public() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    shown = HOOKS.REFERENCE.sub("", text)  # as on GitHub
    # What a GradScaler and Join ask for is left out.
    others = {"found_inf", "found_inf_per_device", "grad_scale"}
    others |= {"join_hook", "join_device", "join_process_group"}
    own = {*vars(fusedaccum.FusedAccumOptimizer), *vars(FusesLinear), *vars(Measured)} - others
    own = {name for name in own if not name.startswith("_")}
    assert {"step", "flush", "fuse_linear_wgrad", "shard_states"} <= own
    own |= {*callbacks.__all__}
    for name in {*own, *fusedaccum.functional.__all__, *fusedaccum.__all__} - {"__version__"}:
        assert re.search(rf"\b{name}\b", shown), f"docs/api.md does not name {name}"
    for name in re.findall(r"^::: (\S+)$", "\n".join(HOOKS.REFERENCE.findall(text)), re.M):
        module, _, last = name.rpartition(".")
        file = ROOT / f"{module.replace('.', '/')}.py"
        is_module = (ROOT / f"{name.replace('.', '/')}.py").is_file()
        # Read, not imported: some need a framework.
        assert is_module or re.search(rf"^(class|def) {last}\b", file.read_text("utf-8"), re.M), (
            name
        )


# --- code ---


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text("utf-8"), re.M | re.S
    )


class Model(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(x).float(), y)


def given(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (2,)) -> dict[str, Any]:
    """What a page has and does not show."""
    torch.manual_seed(0)
    data = [(torch.randn(n, 4).to(dtype), torch.randn(n, 1)) for n in 24 * sizes]
    model = Model().to(dtype)
    return {"torch": torch, "fusedaccum": fusedaccum, "model": model, "loader": data[:24]}


def run(code: str, page: str, names: dict[str, Any]) -> None:
    # The first scale of a GradScaler overflows some windows, which the two kinds of loops count
    # differently.
    code = code.replace('GradScaler("cuda")', 'GradScaler("cpu", init_scale=64.0)')
    exec(compile(code.replace('"cuda"', '"cpu"'), page, "exec"), names)


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str) -> None:
    names = given()
    for code in blocks(page):
        run(code, page, names)
    assert isinstance(names["opt"], fusedaccum.FusedAccumOptimizer)


def test_the_loops_before_and_after_do_the_same() -> None:
    """docs/migrating.md. Under autocast in fp16 the loops multiply by other numbers as they go."""
    cases = [
        (torch.float32, (2,), 1e-6),
        (torch.float32, (1, 3, 7), 1e-6),
        (torch.float32, (2,), 1e-3),
        (torch.bfloat16, (2,), 0.0),
    ]
    weights: list[torch.Tensor] = []
    case = -1
    for code in blocks("migrating.md"):
        kind, _, rest = code.partition("\n")
        case += kind == "# before"
        dtype, sizes, tolerance = cases[case]
        names = given(dtype, sizes)
        start = nn.utils.parameters_to_vector(names["model"].parameters()).clone()
        run(rest if kind.startswith("# ") else code, "migrating.md", names)
        end = nn.utils.parameters_to_vector(names["model"].parameters()).detach()
        if kind == "# before":
            weights = [end]
            assert not torch.equal(start, end)
        elif kind.startswith("# after"):
            torch.testing.assert_close(end, weights[0], rtol=tolerance, atol=tolerance)
    assert case == len(cases) - 1


def test_the_rule_of_the_page_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rule, training = blocks("add_a_rule.md")
    (tmp_path / "my_rules.py").write_text(rule, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = given()
    before = nn.utils.parameters_to_vector(names["model"].parameters()).detach().clone()
    run(training, "add_a_rule.md", names)
    try:
        assert "fused rule 'signed'" in capsys.readouterr().out
        after = nn.utils.parameters_to_vector(names["model"].parameters()).detach()
        # Six windows, each of which moves each element by the rate.
        assert float((after - before).abs().max()) == pytest.approx(6e-3, rel=1e-3)
    finally:
        fusedaccum.unregister_rules(names["Signed"])
        sys.modules.pop("my_rules", None)


def test_every_page_with_code_is_run_somewhere() -> None:
    """from_deepspeed.md and distributed.md run in processes: tests/distributed/test_docs.py."""
    here = {*RUN, "migrating.md", "add_a_rule.md"}
    elsewhere = {"loops.md", "from_deepspeed.md", "distributed.md"}
    # Pieces of frameworks' code; tests/integrations and the examples run the same.
    pieces = {"frameworks.md", "linear.md"}
    assert {path.name for path in DOCS if blocks(path.name)} == here | elsewhere | pieces


def unknown_commands(text: str) -> list[str]:
    """What a page tells to type and is not there: rules of the Makefile, modules, options."""
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    found = [
        f"make {name}"
        for names in re.findall(r"(?:`|^)make ([a-z -]+?)(?=[`,;]|  |$)", text, re.M)
        for name in names.split()
        if name not in rules
    ]
    for module, rest in re.findall(r"python -m ((?:fusedaccum|tests|benchmarks)[\w.]*)(.*)", text):
        path = ROOT / module.replace(".", "/")
        files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
        source = "".join(file.read_text("utf-8") for file in files)
        options = re.findall(r"--[a-z-]{2,}", re.split(r"`|  |#|-->", rest)[0])
        found += [f"{module} {name}" for name in options if f'"{name}"' not in source]
        found += [] if files else [module]
    return found


@pytest.mark.parametrize("source", ["README.md", *ORIGINS])
def test_commands_of_a_page_exist(source: str) -> None:
    """Other tests run them."""
    assert unknown_commands(HOOKS.as_page(source)) == []


def test_an_unknown_command_is_found() -> None:
    text = "`make test gone`, `python -m tests.gone`\n`python -m fusedaccum doctor --gone --json`"
    assert unknown_commands(text) == ["make gone", "tests.gone", "fusedaccum --gone"]


# --- gallery.md ---


def test_the_gallery_has_every_example() -> None:
    text = (ROOT / "docs" / "gallery.md").read_text("utf-8")
    outputs = dict(re.findall(r"^## (\w+)\n.*?^```text\n(.*?)\n```$", text, re.M | re.S))
    assert [*outputs] == [*gallery.EXAMPLES]
    assert {*outputs} == {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert all(gallery.cleaned(output) == output for output in outputs.values())


def test_times_of_a_busy_machine_are_left_out() -> None:
    said = (
        "a\r200 updates, in 3.1 s\n{'loss': '2', 'eval_runtime': '0.2', 'epoch': 0}\npicture: x\n"
    )
    assert gallery.cleaned(said) == "200 updates\n{'loss': '2', 'epoch': 0}"


# --- memory.md ---

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": torch.optim.SGD},
    "sgd_momentum": {"kind": torch.optim.SGD, "momentum": 0.9},
    "adam": {"kind": torch.optim.AdamW},
    "adam_amsgrad": {"kind": torch.optim.AdamW, "amsgrad": True},
}


@pytest.mark.parametrize("kept", readme_tables.KEPT)
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_parameter_takes_the_bytes_of_the_table(rule: str, kept: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kept[:4]]
    param = nn.Parameter(torch.zeros(1 << 16, dtype=dtype))
    options = dict(OPTIMIZERS[rule])
    inner = options.pop("kind")([param], lr=0.1, **options)
    master = "none" if "no master" in kept else None
    with LiveBytes([param]) as counted:
        opt = fusedaccum.FusedAccumOptimizer(inner, master_weights=master)
        for _ in range(2):
            param.sum().backward()
            opt.step()
            opt.zero_grad()
    n_states = len(readme_tables.RULES[rule].states)
    # Tables and sums take some bytes for each tensor.
    assert counted.live / param.numel() == pytest.approx(
        readme_tables.at_rest(n_states, kept), abs=0.1
    )
