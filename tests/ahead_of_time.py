"""Compile every kernel variant that the Triton backend can launch, for GPUs that are not there.

    python -m tests.ahead_of_time --target sm_90            a line for each variant
    python -m tests.ahead_of_time --target sm_90 --json     the same, for a program
    python -m tests.ahead_of_time --write                   kernels/REGISTERS.md, all targets

Nothing about a launch is repeated here. The backend runs its own operations on small CPU tensors
while recorders stand in for its kernels, so arguments, flags, block sizes and warps are those of a
real launch; each recorded launch is then compiled the way Triton compiles a launch, with a driver
that only names the target.

What is read from the result: registers and spills (NVIDIA: cuobjdump on the cubin; AMD: metadata),
and the accesses of the full-chunk path to tensors: gradients, accumulators, parameters, masters,
states. That path has no mask, so in PTX those are the accesses without a predicate; and because
tables and scalars are kernel arguments and tensors are addresses that were loaded from a table,
they are those whose address does not come from an argument. AMD assembly has no predicates: there
only 128-bit accesses are counted (the tail has none), for tensors wide enough to give each of a
wavefront's 64 threads 128 bits.

The process must not have TRITON_INTERPRET=1, which the tests have: they run this as a subprocess.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fusedaccum.backends import triton as backend_module
from fusedaccum.backends.keep import Keep
from fusedaccum.backends.operations import (
    GRAD_DTYPES,
    Add,
    Correction,
    Finalize,
    Step,
    StepTensor,
    SumOfSquares,
)
from fusedaccum.backends.scalars import UpdateScalars
from fusedaccum.backends.tables import CHUNK, VECTOR_BYTES
from fusedaccum.kernels import accumulate, norm, step
from fusedaccum.rules.builtin import RULES, Rule
from fusedaccum.window.slots import PARAM_DTYPES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
UNALIGNED_TARGETS = ("sm_90", "gfx942")
TABLE = Path(__file__).resolve().parent.parent / "kernels" / "REGISTERS.md"
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FP32_BYTES = torch.float32.itemsize


# --- which variants there are ---


@dataclass(frozen=True)
class Variant:
    """One launch, and the bytes per element of each tensor that it reads and writes."""

    name: str
    is_aligned: bool
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loads: tuple[int, ...] = ()
    stores: tuple[int, ...] = ()


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launches.append((self._kernel, args, kwargs))


def variants() -> list[Variant]:
    """All of them."""
    launches: list[Any] = []
    kernels = {
        name: _Recorder(value, launches)
        for name, value in vars(backend_module).items()
        if isinstance(value, triton.JITFunction)
    }
    backend = backend_module.TritonBackend(torch.device("cpu"))
    found = []
    with mock.patch.multiple(backend_module, **kernels):
        for operation in (_accumulate, _sum_of_squares, _finalize, _step):
            for name, is_aligned, loads, stores in operation(backend):
                ((kernel, args, kwargs),) = launches
                launches.clear()
                assert kwargs.get("IS_ALIGNED", True) == is_aligned, name
                name += "" if is_aligned else "-unaligned"
                found.append(Variant(name, is_aligned, kernel, args, kwargs, loads, stores))
    return found


# Name, alignment, and bytes per element of what is read and written, after each launch.
Launched = Iterator[tuple[str, bool, tuple[int, ...], tuple[int, ...]]]


def _tensor(dtype: torch.dtype, is_aligned: bool) -> Tensor:
    return torch.zeros(CHUNK + 1, dtype=dtype)[0 if is_aligned else 1 :]


def _accumulate(backend: Any) -> Launched:
    for dtype, first, (has_norm, has_control), is_aligned in itertools.product(
        GRAD_DTYPES,
        (True, False),
        # A linked GradScaler, whose numbers are read, needs the norm at every micro-batch.
        ((False, False), (True, False), (True, True)),
        (True, False),
    ):
        acc, grad = _tensor(torch.float32, is_aligned), _tensor(dtype, is_aligned)
        partials = torch.zeros(2) if has_norm else None
        control = torch.ones(2) if has_control else None
        backend.accumulate(Add([(acc, grad)], 1.0, first, partials, None, control))
        name = f"accumulate-{_DTYPE_NAMES[dtype]}-{'first' if first else 'later'}"
        name += ("-norm" if has_norm else "") + ("-control" if has_control else "")
        loads = (dtype.itemsize,) if first else (dtype.itemsize, _FP32_BYTES)
        yield name, is_aligned, loads, (_FP32_BYTES,)


def _sum_of_squares(backend: Any) -> Launched:
    for dtype, is_aligned in itertools.product(GRAD_DTYPES, (True, False)):
        backend.sum_of_squares(SumOfSquares([_tensor(dtype, is_aligned)], torch.zeros(2), [0]))
        yield f"sum_of_squares-{_DTYPE_NAMES[dtype]}", is_aligned, (dtype.itemsize,), ()


def _finalize(backend: Any) -> Launched:
    # A norm is there where clipping or skipping needs it; the functional API asks for neither.
    for rule, clip, skip in itertools.product(_one_rule_a_family(), (False, True), (False, True)):
        step = _one_tensor(rule, torch.float32, Keep.PARAM, True)
        hyper = [(1.0, *[0.5] * rule.family.n_hyper)]
        partials = torch.zeros(1) if clip or skip else None
        max_norm = 1.0 if clip else None
        backend.finalize(Finalize([step], hyper, Correction(), partials, max_norm, skip))
        flags = ("-clip" if clip else "") + ("-skip" if skip else "")
        yield f"finalize-{rule.family.name}{flags}", True, (), ()


def _step(backend: Any) -> Launched:
    for rule, dtype in itertools.product(RULES.values(), PARAM_DTYPES):
        for keep, is_aligned in itertools.product(_keeps(dtype), (True, False)):
            backend.step(_one_tensor(rule, dtype, keep, is_aligned))
            kept = (dtype.itemsize, *([keep.master_dtype.itemsize] if keep.master_dtype else ()))
            states = (_FP32_BYTES,) * len(rule.states)
            name = f"step-{rule.name}-{_DTYPE_NAMES[dtype]}-{keep.value}"
            yield name, is_aligned, (*kept, _FP32_BYTES, *states), (*kept, *states)


def _one_rule_a_family() -> list[Rule]:
    return list({rule.family: rule for rule in RULES.values()}.values())


def _keeps(dtype: torch.dtype) -> list[Keep]:
    found = []
    for keep in Keep:
        try:
            found.append(Keep.of(keep.value, dtype))
        except ValueError:
            continue  # not every dtype can be split
    return list(dict.fromkeys(found))


def _one_tensor(rule: Rule, dtype: torch.dtype, keep: Keep, is_aligned: bool) -> Step:
    """A step of one tensor."""
    param, acc = _tensor(dtype, is_aligned), _tensor(torch.float32, is_aligned)
    states = tuple(_tensor(torch.float32, is_aligned) for _ in rule.states)
    master = _tensor(keep.master_dtype, is_aligned) if keep.master_dtype else None
    tensor = StepTensor(param, acc, states, row=0, group=0, master=master, key=1)
    family = rule.family
    scalars = UpdateScalars(1, family.n_scalars, torch.device("cpu"), len(family.memory))
    return Step(rule, keep, [tensor], scalars)


# --- compiling ---


class _Driver:
    """All that Triton asks of a driver until a kernel is loaded."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target  # the key of the kernel's own cache

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@triton.jit
def _pointer_without_hint(address, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE))


def report(target_name: str, only: str = "", has_hint: bool = True) -> dict[str, Any]:
    """Compile the variants whose name matches the pattern `only`, and look at each.

    Without the hint, every pointer loses its alignment: a control, before anything is compiled.
    """
    target = TARGETS[target_name]
    triton.runtime.driver.set_active(_Driver(target))
    if not has_hint:
        for module in (accumulate, norm, step):
            module.typed_pointer = _pointer_without_hint
    rows: dict[str, Any] = {}
    for variant in variants():
        # What unaligned tensors take differs by nothing between NVIDIA's generations.
        is_wanted = variant.is_aligned or target_name in UNALIGNED_TARGETS
        if is_wanted and re.search(only, variant.name):
            row = rows[variant.name] = {"kernel": variant.kernel.__name__, "error": None}
            row["is_aligned"] = variant.is_aligned
            try:
                compiled = variant.kernel.warmup(*variant.args, grid=(1,), **variant.kwargs)
            except Exception as error:  # of many kinds; the other variants still count
                row["error"] = f"{type(error).__name__}: {error}"
                continue
            row |= _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)
            row["faults"] = faults(variant, target, row["widths"])
    return {"triton": triton.__version__, "target": target_name, "variants": rows}


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "widths": ptx_widths(compiled.asm["ptx"]),
    }


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    registers, *spills = (int(re.findall(rf"\.{key}:\s*(\d+)", text)[-1]) for key in keys)
    accesses = re.findall(r"^\s*(?:global|buffer|flat)_(load|store)_dwordx4\b", text, re.M)
    return {
        "registers": registers,
        "spills": sum(spills),
        "widths": {f"{kind}s": [16] * accesses.count(kind) for kind in ("load", "store")},
    }


# --- the full-chunk path ---

_PREDICATE = r"(@!?%p\d+\s+)?"
_ACCESS = re.compile(_PREDICATE + r"(ld|st)\.global([.\w:]*)\s+(.*)$")
# What an instruction computes, and what from. A loaded value has no sources of its own: where it
# was loaded from is of no interest.
_COMPUTED = re.compile(_PREDICATE + r"(?!ld|st|atom|red)[a-z][\w.:]*\s+(\{[^}]*\}|[^,]+),(.*)$")
_REGISTER = re.compile(r"%[a-z]+\d+")


def ptx_widths(ptx: str) -> dict[str, list[int]]:
    """Bytes of each load and of each store that goes to a tensor and has no predicate."""
    from_arguments: set[str] = set()
    sources: dict[str, set[str]] = {}
    found = []
    for line in (raw.split("//")[0].strip() for raw in ptx.splitlines()):
        access = _ACCESS.match(line)
        if access:
            predicate, kind, modifiers, operands = access.groups()
            address = re.search(r"\[\s*(%\w+)", operands)
            assert address, f"no address in {line!r}"
            if not predicate:
                found.append((kind, _width(modifiers), address[1]))
        elif line.startswith("ld.param"):
            from_arguments.update(_REGISTER.findall(line))
        elif computed := _COMPUTED.match(line):
            for register in _REGISTER.findall(computed[2]):
                sources.setdefault(register, set()).update(_REGISTER.findall(computed[3]))
    widths: dict[str, list[int]] = {"loads": [], "stores": []}
    for kind, width, address in found:
        if not from_arguments & _origins(address, sources):
            widths["loads" if kind == "ld" else "stores"].append(width)
    return widths


def _width(modifiers: str) -> int:
    """Bytes of an access: `.v4.b32` is 16."""
    vector = re.search(r"\.v(\d)", modifiers)
    bits = re.search(r"\.[bfsu](\d+)$", modifiers)
    assert bits, f"unknown access {modifiers!r}"
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def _origins(register: str, sources: dict[str, set[str]]) -> set[str]:
    """`register` and all that it is computed from. A loop makes this a graph with circles."""
    seen, queue = {register}, [register]
    while queue:
        new = sources.get(queue.pop(), set()) - seen
        seen |= new
        queue.extend(new)
    return seen


def faults(variant: Variant, target: GPUTarget, widths: dict[str, list[int]]) -> list[str]:
    """What is wrong with the widths (bytes) of the full-chunk path's loads and stores.

    Every access has to be 128 bits or more, and together they have to be the bytes that a thread
    moves in one block, or in several where the compiler has unrolled the loop: an access that went
    elsewhere (behind a predicate, say) is missing.
    """
    found, unrolled = [], set()
    threads = variant.kwargs["num_warps"] * target.warp_size
    for kind, itemsizes in (("loads", variant.loads), ("stores", variant.stores)):
        shares = [variant.kwargs["BLOCK"] * itemsize // threads for itemsize in itemsizes]
        if target.backend == "hip":
            shares = [share for share in shares if share >= VECTOR_BYTES]
        narrow = sorted({8 * width for width in widths[kind] if width < VECTOR_BYTES})
        if narrow:
            found.append(f"{kind} of {narrow} bits")
        expected, moved = sum(shares), sum(widths[kind])
        if expected:
            unrolled.add(moved / expected)
        elif moved:
            found.append(f"{moved} bytes in {kind}, expected none")
    blocks = variant.kwargs.get("CHUNK", 0) // variant.kwargs["BLOCK"]
    if unrolled and not (len(unrolled) == 1 and unrolled <= set(range(1, blocks + 1))):
        found.append(f"loads and stores of {sorted(unrolled)} blocks, expected the same few")
    return found


# --- the table ---


def write_table(reports: list[dict[str, Any]]) -> str:
    """The text of REGISTERS.md."""
    lines = [
        "# Registers of every kernel variant",
        "",
        "Per thread, as the compiler allots them: registers on NVIDIA, VGPRs on AMD (gfx942), for",
        "tensors at aligned addresses. Made by `python -m tests.ahead_of_time --write`, no GPU;",
        "`tests/backends/test_ahead_of_time.py` compares. A commit that changes a number says why.",
        "",
        f"Triton {reports[0]['triton']}",
        "",
        "| variant | " + " | ".join(r["target"] for r in reports) + " |",
        "|---|" + "--:|" * len(reports),
    ]
    for name, row in reports[0]["variants"].items():
        if row["is_aligned"]:
            for r in reports:
                error = r["variants"][name]["error"]
                assert not error, f"{name} does not compile for {r['target']}: {error}"
            cells = [str(r["variants"][name]["registers"]) for r in reports]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel variant without a GPU")
    parser.add_argument("--target", choices=TARGETS, help="compile for this one and report")
    parser.add_argument("--only", default="", metavar="PATTERN", help="variants of that name")
    parser.add_argument("--without-hint", action="store_true", help="a control: no alignment")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.add_argument("--write", action="store_true", help=f"compile for all, write {TABLE.name}")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    if arguments.write:
        text = write_table([report(target) for target in TARGETS])
        TABLE.write_text(text, encoding="utf-8")
    elif arguments.target:
        result = report(arguments.target, arguments.only, not arguments.without_hint)
        if arguments.json:
            print(json.dumps(result, indent=1))
        else:
            for name, row in result["variants"].items():
                print(f"{name:44}", row["error"] or f"{row['registers']:4} {row['faults']}")
    else:
        parser.error("give --target or --write")


if __name__ == "__main__":
    main()
