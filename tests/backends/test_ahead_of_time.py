"""Every kernel variant compiles for every target, without a GPU, and the result is as it should be:
128-bit accesses, no spills, the registers that `kernels/REGISTERS.md` lists.

That file has the digest of a source all of which was compiled and found so. Here it has to be
today's source, and a sample is compiled anew.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which is only there on Linux")

from tests import registers
from tests.ahead_of_time import TARGETS
from tests.commands import run_compiling
from tests.full_chunks import faults, ptx_widths

ROOT = Path(__file__).resolve().parents[2]


def ahead_of_time(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m tests.ahead_of_time`, with nothing in Triton's cache."""
    return run_compiling(cache, "tests.ahead_of_time", *arguments)


def test_the_table_is_of_this_source_and_a_sample_compiles_to_it(tmp_path: Path) -> None:
    run = ahead_of_time(tmp_path, "--check")
    assert run.returncode == 0, run.stderr


def test_kernels_without_the_hint_would_not_pass(tmp_path: Path) -> None:
    only = "^(accumulate-bf16-later-norm|sum_of_squares-bf16|step-adam-bf16-split)$"
    run = ahead_of_time(tmp_path, "--target", "sm_90", "--only", only, "--without-hint")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert all(re.search(r" \d+ \['loads of \[16", line) for line in lines), run.stdout


def test_every_kernel_is_in_the_table_and_in_each_sample() -> None:
    sources = "".join(p.read_text(encoding="utf-8") for p in registers.TABLE.parent.glob("*.py"))
    kernels = set(re.findall(r"^def (\w+)_kernel\(", sources, re.M))
    recorded = registers.read()
    assert set(recorded.registers) == set(TARGETS)
    for target, listed in recorded.registers.items():
        assert kernels and {name.split("-")[0] for name in listed} == kernels
        sample = registers.sample(recorded.digest, target, list(listed))
        assert {name.split("-")[0] for name in sample} == kernels


def test_the_table_is_made_with_the_version_that_ci_installs() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"triton=={registers.read().triton}\n" in constraints


# --- the laws themselves ---

GOOD = {"error": None, "is_aligned": True, "spills": 0, "faults": [], "registers": 40}


@pytest.mark.parametrize(
    ("name", "row", "is_broken"),
    [
        ("step-adam-bf16-none", GOOD, False),
        ("step-adam-bf16-none", {"error": "CompilationError: no"}, True),
        ("step-adam-bf16-none", GOOD | {"spills": 4}, True),
        ("step-adam-bf16-none", GOOD | {"faults": ["loads of [16] bits"]}, True),
        ("step-adadelta-bf16-fp32", GOOD | {"spills": 8}, False),
        ("step-adadelta-bf16-fp32", GOOD | {"spills": 12}, True),
        ("finalize-adam", GOOD | {"spills": 8}, False),
        ("finalize-adam", GOOD | {"spills": 12}, True),
        ("step-adam-bf16-none-unaligned", GOOD | {"is_aligned": False}, True),
    ],
)
def test_a_broken_law_is_found(name: str, row: dict[str, object], is_broken: bool) -> None:
    assert bool(registers.broken_laws("sm_80", {name: row})) is is_broken


def test_an_unaligned_variant_may_spill_four_words() -> None:
    row = GOOD | {"is_aligned": False, "faults": ["loads of [16] bits"], "spills": 16}
    assert registers.broken_laws("sm_90", {"step-adam-bf16-none-unaligned": row}) == []
    row["spills"] = 20
    assert len(registers.broken_laws("sm_90", {"step-adam-bf16-none-unaligned": row})) == 1


def test_other_registers_and_other_variants_are_found() -> None:
    recorded = registers.read()
    name, number = next(iter(recorded.registers["sm_90"].items()))
    names = list(recorded.registers["sm_90"])
    good = {name: GOOD | {"registers": number}}
    assert registers.changed("sm_90", good, recorded, names) == []
    assert len(registers.changed("sm_90", good, recorded, [*names, "step-new-fp32-none"])) == 1
    assert len(registers.changed("sm_90", good, recorded, names[1:])) == 1
    other = {name: GOOD | {"registers": number + 1}}
    expected = int(recorded.triton == registers.triton.__version__)
    assert len(registers.changed("sm_90", other, recorded, names)) == expected


def test_comments_and_docstrings_do_not_count_for_the_digest_and_all_else_does() -> None:
    text = "X = 1\n\ndef f(a):\n    return a + X\n"
    said = '"""Text."""\nX = 1  # one\n\ndef f(a):\n    """More."""\n    return (a + X)\n'
    assert registers.tree(said) == registers.tree(text)
    for other in ("a - X", "a + Y", "a + (X + a)", "None"):
        assert registers.tree(text.replace("a + X", other)) != registers.tree(text)
    assert registers.digest(["a"]) != registers.digest(["b"])


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
    return faults(kwargs, (4,), (4,), TARGETS["sm_90"], ptx_widths(ptx))


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
