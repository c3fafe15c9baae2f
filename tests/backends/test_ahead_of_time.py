"""Every kernel variant compiles for every target, without a GPU, and the result is as it should be:
128-bit accesses, no spills, the registers that `kernels/REGISTERS.md` lists.

`tests/ahead_of_time.py` compiles, in a process of its own, and says how it reads the result. All
variants are compiled for all targets, on all cores: about 50 s of one core for each target.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which is only there on Linux")

from tests.ahead_of_time import TABLE, TARGETS, UNALIGNED_TARGETS, faults, ptx_widths

ROOT = Path(__file__).resolve().parents[2]
# ptxas may park a few values that a whole kernel needs, to fit one more block on a multiprocessor.
# In a variant for unaligned tensors that is left to it: four words.
MAX_UNALIGNED_SPILL = 16
# One program an update: two words of local memory are nothing.
FINALIZE_SPILL = 8
# The same, two words, in a few variants of rules that are rarely used. Not to grow.
KNOWN_SPILLS = {
    ("sm_80", "step-adadelta-bf16-fp32"): 8,
    ("sm_100", "step-adadelta-bf16-stochastic"): 8,
    ("sm_120", "step-adadelta-bf16-stochastic"): 8,
    ("sm_120", "step-rmsprop_centered_momentum-bf16-none"): 8,
    ("sm_120", "step-rmsprop_centered_momentum-fp16-none"): 8,
}


def compile_variants(*arguments: str) -> dict[str, Any]:
    """What `python -m tests.ahead_of_time --json` prints."""
    # Settings of whoever runs the tests (another ptxas, no optimisation) must not matter.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    with tempfile.TemporaryDirectory() as cache:
        run = subprocess.run(
            [sys.executable, "-m", "tests.ahead_of_time", "--json", *arguments],
            cwd=ROOT,
            env=environment | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A report for each target. The first pytest-xdist worker compiles, the others wait for it."""
    import fcntl  # not on Windows, where nothing of this module runs

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "ahead_of_time.json", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = list(pool.map(lambda name: compile_variants("--target", name), TARGETS))
            text = json.dumps({report["target"]: report for report in made})
            file.write(text)
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


@pytest.fixture(params=TARGETS)
def report(request: pytest.FixtureRequest, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return reports[request.param]


def compiled(report: dict[str, Any], *, aligned: bool) -> dict[str, dict[str, Any]]:
    """The variants that compiled, by name."""
    return {
        name: row
        for name, row in report["variants"].items()
        if row["is_aligned"] == aligned and row["error"] is None
    }


def read_table() -> tuple[str, dict[str, dict[str, int]]]:
    """REGISTERS.md: Triton's version, and registers by target and variant."""
    text = TABLE.read_text(encoding="utf-8")
    version = re.search(r"^Triton (\S+)$", text, re.M)
    assert version, f"{TABLE.name} has no line 'Triton <version>'"
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return version[1], {
        target: {row[0]: int(row[column]) for row in rows}
        for column, target in enumerate(header[1:], start=1)
    }


def test_every_variant_compiles(report: dict[str, Any]) -> None:
    errors = {name: row["error"] for name, row in report["variants"].items() if row["error"]}
    assert not errors, f"{len(errors)} do not: {', '.join(errors)}\n{next(iter(errors.values()))}"


def test_every_kernel_is_among_the_variants(report: dict[str, Any]) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in TABLE.parent.glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", sources, re.M))
    assert kernels and {row["kernel"] for row in report["variants"].values()} == kernels


def test_nothing_spills(report: dict[str, Any]) -> None:
    aligned, unaligned = compiled(report, aligned=True), compiled(report, aligned=False)
    assert aligned and bool(unaligned) is (report["target"] in UNALIGNED_TARGETS)
    allowed = {**dict.fromkeys(aligned, 0), **dict.fromkeys(unaligned, MAX_UNALIGNED_SPILL)}
    allowed |= {name: FINALIZE_SPILL for name in aligned if name.startswith("finalize-")}
    allowed |= {name: n for (target, name), n in KNOWN_SPILLS.items() if target == report["target"]}
    rows = {**aligned, **unaligned}
    too_much = {name: row["spills"] for name, row in rows.items() if row["spills"] > allowed[name]}
    assert too_much == {}, "bytes of local memory a thread"


def test_the_full_chunk_path_moves_128_bits_at_a_time(report: dict[str, Any]) -> None:
    found = {n: row["faults"] for n, row in compiled(report, aligned=True).items() if row["faults"]}
    assert found == {}


def test_unaligned_variants_would_not_pass_as_aligned(report: dict[str, Any]) -> None:
    rows = compiled(report, aligned=False)
    assert rows or report["target"] not in UNALIGNED_TARGETS
    assert [name for name, row in rows.items() if not row["faults"]] == []


def test_kernels_without_the_hint_would_not_pass() -> None:
    only = "^(accumulate-bf16-later-norm|sum_of_squares-bf16|step-adam-bf16-split)$"
    rows = compile_variants("--target", "sm_90", "--only", only, "--without-hint")["variants"]
    assert len(rows) == 3 and not any(row["error"] for row in rows.values())
    assert all(row["faults"][0].startswith("loads of [16") for row in rows.values())


def test_registers_are_those_of_the_table(report: dict[str, Any]) -> None:
    version, table = read_table()
    if version != report["triton"]:
        pytest.skip(f"{TABLE.name} is made with Triton {version}, this is {report['triton']}")
    rows = compiled(report, aligned=True)
    now = {name: row["registers"] for name, row in rows.items()}
    listed = table[report["target"]]
    changed = {
        name: f"listed {listed.get(name)}, now {now.get(name)}"
        for name in {**listed, **now}
        if listed.get(name) != now.get(name)
    }
    assert changed == {}, "python -m tests.ahead_of_time --write, and say why in the commit"


def test_the_table_is_made_with_the_version_that_ci_installs() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"triton=={read_table()[0]}\n" in constraints


# --- the reading of PTX itself ---

# Block scale of a loop over one fp32 tensor, with what a kernel has around it: arguments, a table
# whose row is itself loaded, a pointer that the loop moves, and the tail under a predicate.
PTX = """
    ld.param.b64    %rd1, [kernel_param_0];
    ld.param.b64    %rd2, [kernel_param_1];
    ld.global.b32 { %r1 }, [ %rd2 + 0 ];
    mad.wide.s32    %rd3, %r1, 32, %rd1;
    mov.u64 %rd4, 0x0;
    ld.global.b64 { %rd4 }, [ %rd3 + 0 ];           // an address
    mov.u32         %r2, %tid.x;
    mul.wide.u32    %rd5, %r2, 16;
    add.s64         %rd6, %rd4, %rd5;
$L__BB0_2:
    ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd6 + 0 ];
    st.global.v4.b32 [ %rd6 + 0 ], { %r3, %r4, %r5, %r6 };
    add.s64         %rd6, %rd6, 2048;
    @%p1 bra        $L__BB0_2;
    @%p2 ld.global.b32 { %r7 }, [ %rd6 + 0 ];
    @!%p2 st.global.b32 [ %rd6 + 0 ], { %r7 };
    st.global.b32 [ %rd2 + 4 ], { %r7 };
"""


def found_in(ptx: str, block: int = 512) -> list[str]:
    kwargs = {"BLOCK": block, "CHUNK": 2 * block, "num_warps": 4}
    variant: Any = SimpleNamespace(kwargs=kwargs, loads=(4,), stores=(4,))
    return faults(variant, TARGETS["sm_90"], ptx_widths(ptx))


def test_tables_scalars_and_the_tail_do_not_count() -> None:
    assert ptx_widths(PTX) == {"loads": [16], "stores": [16]}
    assert found_in(PTX) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("    ld.global.v4", "    @%p3 ld.global.v4", id="load-behind-a-predicate"),
        pytest.param("    st.global.v4", "    @%p3 st.global.v4", id="store-behind-a-predicate"),
        pytest.param("ld.global.v4.b32", "ld.global.v2.b32", id="narrow-load"),
        pytest.param("st.global.v4.b32", "st.global.L1::evict_last.b32", id="narrow-store"),
        pytest.param("@!%p2 st", "st", id="store-of-the-tail-without-a-predicate"),
    ],
)
def test_a_wrong_access_is_found(old: str, new: str) -> None:
    assert old in PTX
    assert found_in(PTX.replace(old, new)) != []


def test_wider_accesses_and_unrolled_loops_pass_missing_ones_do_not() -> None:
    assert found_in(PTX.replace(".global.v4.b32", ".global.v4.b64"), block=1024) == []
    assert found_in(PTX, block=256) == []
    assert found_in(PTX, block=128) != []  # four blocks at once, of a chunk of two
    assert found_in(PTX, block=1024) != []
