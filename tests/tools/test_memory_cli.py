"""`python -m fusedaccum memory`: its numbers are those that can be counted, and it says what is
wrong. Several processes: tests/distributed/test_memory.py."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import footprint
from fusedaccum import FusedAccumOptimizer
from fusedaccum import __main__ as cli
from fusedaccum.bench import forms, memory, shapes
from fusedaccum.bench.memory import Request, rows, waiting
from fusedaccum.doctor.forms import Form, Wrapper
from fusedaccum.doctor.plan import OPTIMIZERS, Plan
from tests.commands import exit_status

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES: shapes.Shapes = [(256, 256)] * 4 + [(64,)]  # without padding between tensors
N = shapes.count(SIZES)
SMALL = 1 << 16  # bytes of tables and scalars, a quarter of one byte per parameter


def row(request: Request, form: str) -> dict[str, Any]:
    (found,) = (r for r in rows(request) if r["form"] == form)
    return found


def kept(kind: type[Form], optimizer: str, dtype: torch.dtype) -> int:
    """Counted: what a form keeps between two windows."""
    params = [torch.ones(size, dtype=dtype) for size in SIZES]
    grads = [torch.ones_like(param) for param in params]
    plan = Plan(optimizer, 2)
    return footprint(CPU, lambda: kind(params, plan), lambda form: form.window(grads))[1]


def test_another_optimizer_is_seen() -> None:
    """The negative control of the counting: a state more, or two bytes of master less."""
    counted = kept(Wrapper, "adamw", torch.bfloat16)
    assert counted - row(Request(SIZES, optimizer="sgd"), "fusedaccum")["kept"] > 4 * N
    plain = Request(SIZES, master_weights="none")
    assert counted - row(plain, "fusedaccum")["kept"] > 2 * N


# All optimizers in bf16, and all else with one: the number of states and the dtype are factors.
KEPT = [
    *(("fusedaccum", "bf16", optimizer) for optimizer in OPTIMIZERS),
    *(("native_fp32", "bf16", optimizer) for optimizer in OPTIMIZERS),
    ("fusedaccum", "fp16", "adamw"),
    ("fusedaccum", "fp32", "adamw"),
    ("native_fp32", "fp16", "adamw"),
    ("fp32 and autocast", "fp32", "adamw"),
    ("plain_bf16", "bf16", "adamw"),
    ("plain_bf16", "bf16", "sgd"),
]
KINDS: dict[str, type[Form]] = {
    "fusedaccum": Wrapper, "native_fp32": forms.Native, "fp32 and autocast": forms.Native,
    "plain_bf16": forms.Plain,
}  # fmt: skip


@pytest.mark.parametrize(("form", "dtype", "optimizer"), KEPT, ids=["-".join(k) for k in KEPT])
def test_what_is_kept(form: str, dtype: str, optimizer: str) -> None:
    request = Request(SIZES, optimizer=optimizer, dtype=DTYPES[dtype])
    counted = kept(KINDS[form], optimizer, DTYPES[dtype])
    assert 0 <= counted - row(request, form)["kept"] <= SMALL


@pytest.mark.parametrize(
    ("dtype", "masters"), [("bf16", "fp32"), ("bf16", "none"), ("fp16", "none"), ("bf16", None)]
)
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_masters_and_lion(dtype: str, masters: str | None, optimizer: str) -> None:
    request = Request(SIZES, optimizer=optimizer, dtype=DTYPES[dtype], master_weights=masters)
    kind: Any = torch.optim.AdamW
    if optimizer == "lion":
        kind = pytest.importorskip("lion_pytorch").Lion

    def build() -> tuple[list[Tensor], FusedAccumOptimizer]:
        params = [nn.Parameter(torch.ones(size, dtype=DTYPES[dtype])) for size in SIZES]
        return [*params], FusedAccumOptimizer(kind(params), 1, master_weights=masters)

    def use(built: tuple[list[Tensor], FusedAccumOptimizer]) -> None:
        for param in built[0]:
            param.sum().backward()
        built[1].step()

    counted = footprint(CPU, build, use)[1]
    assert 0 <= counted - row(request, "fusedaccum")["kept"] <= SMALL


class Net(nn.Module):
    """Matrices and hardly any activations; the last one is large."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        wide = nn.Linear(256, 1024, bias=False)
        layers = [nn.Linear(256, 256, bias=False) for _ in range(8)]
        self.layers = nn.Sequential(*layers, wide).to(dtype)

    def loss(self) -> Tensor:
        weight = next(self.parameters())
        return self.layers(weight.new_ones(1, 256)).float().square().mean()


NET = [(256, 256)] * 8 + [(1024, 256)]
GRADIENT = 256 * 256 * 2


def peak(make: Callable[[Net], Callable[[], None]], dtype: torch.dtype) -> int:
    """Counted: the most bytes in a window, beyond those that are kept."""

    def build() -> tuple[Net, Callable[[], None]]:
        net = Net(dtype)
        return net, make(net)

    _, lasting, most = footprint(CPU, build, lambda built: built[1]())
    return most - lasting


@pytest.mark.parametrize("bucket", [GRADIENT // 2, 3 * GRADIENT, 6 * GRADIENT, 9 * GRADIENT, None])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fresh_gradients(bucket: int | None, dtype: str) -> None:
    def make(net: Net) -> Callable[[], None]:
        mb = None if bucket is None else bucket / 2**20
        opt = FusedAccumOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), 2, bucket_cap_mb=mb)

        def window() -> None:
            for _ in range(2):
                net.loss().backward()
                opt.step()
                opt.zero_grad()

        return window

    request = Request(NET, dtype=DTYPES[dtype], bucket=bucket, device_type="cpu")
    assert 0 <= peak(make, DTYPES[dtype]) - waiting(request) <= SMALL


def test_fresh_gradients_of_plain_bf16() -> None:
    def make(net: Net) -> Callable[[], None]:
        opt = torch.optim.SGD(net.parameters(), lr=0.1)

        def window() -> None:
            opt.zero_grad(set_to_none=False)
            for _ in range(2):
                net.loss().backward()
            opt.step()

        return window

    expected = row(Request(NET), "plain_bf16")["waiting"]
    assert expected == 1024 * 256 * 2
    assert 0 <= peak(make, torch.bfloat16) - expected <= SMALL


def test_fresh_gradients_where_nothing_is_known_but_a_number() -> None:
    huge, tiny = ([(n,)] for n in (1 << 30, 1000))
    found = [
        waiting(Request(sizes, has_shapes=False, device_type=device))
        for sizes in (huge, tiny)
        for device in ("cuda", "cpu")
    ]
    assert found == [128 << 20, 64 << 20, 2000, 2000]


@pytest.mark.parametrize("name", shapes.PRESETS)
def test_presets_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    common = {"num_key_value_heads": 8, "num_attention_heads": 32, "tie_word_embeddings": False}
    config = {
        "gpt2": lambda: transformers.GPT2Config(),
        "llama-1b": lambda: transformers.LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            **{**common, "num_key_value_heads": 4},
        ),
        "llama-8b": lambda: transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            **common,
        ),
    }[name]()  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shapes.PRESETS[name] == [tuple(p.shape) for p in model.parameters()]


# --- the command ---


def test_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--model", "gpt2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpt2: 124,439,808 parameters in bfloat16, all trained, adamw; one process"
    kept_of = {" ".join(line.split()[:-5]): line.split()[-1] for line in lines[4:8]}
    assert kept_of == {
        "fusedaccum": "16.00", "native_fp32": "18.00", "fp32 and autocast": "16.00",
        "plain_bf16": "8.00",
    }  # fmt: skip
    assert "DDP's buckets" not in lines[3]
    assert any("activations" in line for line in lines)
    assert lines[-1].startswith("free here: cpu ")


def test_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (command, shown), *_ = re.findall(r"```\n\$ python -m fusedaccum (.*?)\n(.*?)```", text, re.S)
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out.startswith(shown)


def test_json_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=33, n_positions=8)
    config.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--dtype", "fp32", "--optimizer", "lion", "--json"]
    assert exit_status("memory", *options, "--processes", "2") == 0
    report = json.loads(capsys.readouterr().out)
    n = shapes.count(shapes.gpt(16, 33, 8, 2))
    assert (report["n_params"], report["processes"], report["engine"]) == (n, 2, "ddp")
    ours, amp, plain = report["rows"]
    assert ours["bytes"] == {
        "parameters": 4 * n, "gradients": 4 * n, "masters": 0, "states": 4 * n,
        "DDP's buckets": 4 * n,
    }  # fmt: skip
    assert (amp["form"], amp["bytes"]) == ("fp32 and autocast", ours["bytes"])
    assert plain["kept"] == 8 * n and plain["peak"] == 8 * n + 2 * 16 * 64
    assert ours["peak"] == ours["kept"] + 4 * n


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1.1B", 1_100_000_000), ("124M", 124_000_000), ("7e9", 7 * 10**9), (" 3k ", 3000),
     ("1_000", 1000), ("12,345", 12345), ("0.5t", 5 * 10**11),
     ("1.5k", 1500)],
)  # fmt: skip
def test_counts_are_parsed(text: str, expected: int) -> None:
    assert memory.parse_count(text) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --model --params is required"),
        (["--model", "gpt2", "--params", "3"], "not allowed with argument"),
        (["--model", "gpt5"], "--model got 'gpt5'; allowed are gpt2, llama-1b, llama-8b, a folder"),
        (["--params", "many"], "--params got 'many'; a whole number of parameters from 1 on"),
        (["--params", "0"], "--params got '0'; a whole number"),
        (["--params", "1.5"], "--params got '1.5'; a whole number"),
        (["--model", ""], "--model got ''; allowed are gpt2"),
        (["--params", "1.1G"], "1.1B, 124M or 7e9"),
        (["--params", "3", "--processes", "0"], "got 0; 1 or more"),
        (["--params", "3", "--engine", "zero1"], "--engine got 'zero1' with --processes 1"),
        (["--params", "3", "--engine", "zero3"], "invalid choice: 'zero3'"),
        (["--params", "3", "--optimizer", "muon"], "invalid choice: 'muon'"),
        (["--params", "3", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["--params", "3", "--dtype", "fp16", "--master-weights", "split"],
         'master_weights="split" needs bfloat16'),
    ],
)  # fmt: skip
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("memory", *options) == 2
    assert message in capsys.readouterr().err


def test_a_config_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["memory", "--model", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "pip install transformers, or use --params 1.1B" in message


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """`python -m fusedaccum memory ... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fusedaccum", "memory", "--params", "7"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        (">&-", 0, ""),
        ("> /dev/full", 1, "fusedaccum memory: cannot write: No space left on device\n"),
    ],
    ids=["closed", "full"],
)
def test_output_that_goes_nowhere(target: str, status: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m fusedaccum memory --params 7 --json {target}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_number_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("memory", "--params", "7", "--processes", "x") == 2
    assert "--processes: got 'x'; an int from 1 on" in capsys.readouterr().err
    assert exit_status("bench", "--seconds", "soon") == 2
    assert "--seconds: got 'soon'; a number above 0" in capsys.readouterr().err
