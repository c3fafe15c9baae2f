"""Compile every kernel variant that the Triton backend can launch, for GPUs that are not there.

    python -m tests.ahead_of_time --write                   kernels/REGISTERS.md, all targets
    python -m tests.ahead_of_time --check                   is it of today? a sample, compiled anew
    python -m tests.ahead_of_time --target sm_90 --only step-adam     some variants, a line for each

Nothing about a launch is repeated here. The backend runs its own operations on small CPU tensors
while recorders stand in for its kernels, so arguments, flags, block sizes and warps are those of a
real launch; each recorded launch is then compiled the way Triton compiles a launch, with a driver
that only names the target. Registers and spills are read from the result (NVIDIA: cuobjdump on the
cubin; AMD: metadata), and the accesses of the full-chunk path (`full_chunks.py`). What has to hold
is in `registers.py`.

The process must not have TRITON_INTERPRET=1, which the tests have: they run this as a subprocess.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from fusedaccum.kernels import accumulate, norm, step
from fusedaccum.kernels.layout import CHUNK, VECTOR_BYTES
from fusedaccum.rules.builtin import RULES
from fusedaccum.rules.rule import Rule
from fusedaccum.window.slots import PARAM_DTYPES
from tests import registers
from tests.full_chunks import faults, ptx_widths

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
UNALIGNED_TARGETS = ("sm_90", "gfx942")
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Rows = dict[str, dict[str, Any]]  # what was found of each variant, by name
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

    def describe(self) -> str:
        """All of the launch that decides what is compiled."""
        arguments = [
            *map(_describe, self.args),
            *(f"{k}={_describe(self.kwargs[k])}" for k in sorted(self.kwargs)),
        ]
        return f"{self.name}: {self.kernel.__name__}({', '.join(arguments)})"


def _describe(value: Any) -> str:
    """A tensor's type and alignment, a function's name, the value of all else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} at a multiple of {math.gcd(value.data_ptr(), VECTOR_BYTES)}"
    if isinstance(value, triton.JITFunction):
        return f"{value.__module__}.{value.__name__}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    return repr(value)


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launches.append((self._kernel, args, kwargs))


def variants(target_name: str) -> list[Variant]:
    """All that are compiled for a target."""
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
                assert bool(kwargs.get("VECTOR", 1)) == is_aligned, name
                name += "" if is_aligned else "-unaligned"
                # What unaligned tensors take differs by nothing between NVIDIA's generations.
                if is_aligned or target_name in UNALIGNED_TARGETS:
                    found.append(Variant(name, is_aligned, kernel, args, kwargs, loads, stores))
    return found


# Name, alignment, and bytes per element of what is read and written, after each launch.
Launched = Iterator[tuple[str, bool, tuple[int, ...], tuple[int, ...]]]


def zeros(dtype: torch.dtype, is_aligned: bool) -> Tensor:
    return torch.zeros(CHUNK + 1, dtype=dtype)[0 if is_aligned else 1 :]


def _accumulate(backend: Any) -> Launched:
    for dtype, first, (has_norm, has_control), is_aligned in itertools.product(
        GRAD_DTYPES,
        (True, False),
        # A linked GradScaler, whose numbers are read, needs the norm at every micro-batch.
        ((False, False), (True, False), (True, True)),
        (True, False),
    ):
        acc, grad = zeros(torch.float32, is_aligned), zeros(dtype, is_aligned)
        partials = torch.zeros(2) if has_norm else None
        control = torch.ones(2) if has_control else None
        backend.accumulate(Add([(acc, grad)], 1.0, first, partials, None, control))
        name = f"accumulate-{_DTYPE_NAMES[dtype]}-{'first' if first else 'later'}"
        name += ("-norm" if has_norm else "") + ("-control" if has_control else "")
        loads = (dtype.itemsize,) if first else (dtype.itemsize, _FP32_BYTES)
        yield name, is_aligned, loads, (_FP32_BYTES,)


def _sum_of_squares(backend: Any) -> Launched:
    for dtype, is_aligned in itertools.product(GRAD_DTYPES, (True, False)):
        backend.sum_of_squares(SumOfSquares([zeros(dtype, is_aligned)], torch.zeros(2), [0]))
        yield f"sum_of_squares-{_DTYPE_NAMES[dtype]}", is_aligned, (dtype.itemsize,), ()


def _finalize(backend: Any) -> Launched:
    # A norm is there where clipping or skipping needs it; the functional API asks for neither.
    for rule, clip, skip in itertools.product(_one_rule_a_family(), (False, True), (False, True)):
        step = one_tensor(rule, torch.float32, Keep.PARAM, True)
        hyper = [(1.0, *[0.5] * rule.family.n_hyper)]
        partials = torch.zeros(1) if clip or skip else None
        max_norm = 1.0 if clip else None
        backend.finalize(Finalize([step], hyper, Correction(), partials, max_norm, skip))
        flags = ("-clip" if clip else "") + ("-skip" if skip else "")
        yield f"finalize-{rule.family.name}{flags}", True, (), ()


def _step(backend: Any) -> Launched:
    for rule, dtype in itertools.product(RULES.values(), PARAM_DTYPES):
        for keep, is_aligned in itertools.product(_keeps(dtype), (True, False)):
            backend.step(one_tensor(rule, dtype, keep, is_aligned))
            kept = (dtype.itemsize, *([keep.master_dtype.itemsize] if keep.master_dtype else ()))
            states = (_FP32_BYTES,) * len(rule.states)
            name = f"step-{rule.name}-{_DTYPE_NAMES[dtype]}-{keep.value}"
            yield name, is_aligned, (*kept, _FP32_BYTES, *states), (*kept, *states)


def _one_rule_a_family() -> list[Rule]:
    return list({rule.family: rule for rule in RULES.values()}.values())


def _keeps(dtype: torch.dtype) -> list[Keep]:
    """All that a parameter of a dtype can have."""
    found = {Keep.of("none", dtype), Keep.of("none", dtype, is_stochastic=True)}
    found |= {Keep.of(None, dtype), Keep.of("fp32", dtype)}
    return [keep for keep in Keep if keep in found]


def one_tensor(rule: Rule, dtype: torch.dtype, keep: Keep, is_aligned: bool) -> Step:
    """A step of one tensor."""
    param, acc = zeros(dtype, is_aligned), zeros(torch.float32, is_aligned)
    states = tuple(zeros(torch.float32, is_aligned) for _ in rule.states)
    master = zeros(keep.master_dtype, is_aligned) if keep.master_dtype else None
    tensor = StepTensor(param, acc, states, row=0, group=0, master=master, key=1)
    family = rule.family
    scalars = UpdateScalars(1, family.n_scalars, torch.device("cpu"), len(family.memory))
    return Step(rule, keep, [tensor], scalars)


# --- compiling ---


class Driver:
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
def _pointer_without_hint(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    return address.to(tl.pointer_type(DTYPE))


def report(target_name: str, wanted: Callable[[str], Any]) -> Rows:
    """Compile the variants whose name is `wanted`, and look at each."""
    target = TARGETS[target_name]
    triton.runtime.driver.set_active(Driver(target))
    rows: Rows = {}
    for variant in variants(target_name):
        if not wanted(variant.name):
            continue
        row = rows[variant.name] = {"is_aligned": variant.is_aligned, "error": None}
        try:
            compiled = variant.kernel.warmup(*variant.args, grid=(1,), **variant.kwargs)
        except Exception as error:  # of many kinds; the other variants still count
            row["error"] = f"{type(error).__name__}: {error}"
            continue
        row |= _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)
        widths = row.pop("widths")
        row["faults"] = faults(variant.kwargs, variant.loads, variant.stores, target, widths)
    return rows


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


# --- the commands ---


def _whole_report(target_name: str) -> Rows:
    return report(target_name, lambda name: True)


def _digest() -> str:
    # What unaligned tensors take is compiled for two targets only: their digest is of all.
    launches = [variant.describe() for variant in variants(UNALIGNED_TARGETS[0])]
    return registers.digest(launches)


def _write() -> list[str]:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = dict(zip(TARGETS, pool.map(_whole_report, TARGETS), strict=True))
    broken = [text for name in TARGETS for text in registers.broken_laws(name, reports[name])]
    if not broken:
        registers.write(_digest(), reports)
    return broken


def _check() -> list[str]:
    recorded = registers.read()
    if (today := _digest()) != recorded.digest:
        return [f"{registers.TABLE.name} is of other kernels or launches: {registers.WAY_OUT}"]
    broken = []
    for name in TARGETS:
        every = [variant.name for variant in variants(name)]
        sample = registers.sample(today, name, every)
        rows = report(name, sample.__contains__)
        broken += registers.broken_laws(name, rows) + registers.changed(name, rows, recorded, every)
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel variant without a GPU")
    does = parser.add_mutually_exclusive_group(required=True)
    does.add_argument("--write", action="store_true", help="compile for all targets, then write")
    does.add_argument("--check", action="store_true", help="compile a sample, compare")
    does.add_argument("--target", choices=TARGETS, help="compile for this one, print")
    parser.add_argument("--only", default="", metavar="PATTERN", help="variants of that name")
    parser.add_argument("--without-hint", action="store_true", help="a control: no alignment")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    if arguments.without_hint:
        for module in (accumulate, norm, step):
            module.typed_pointer = _pointer_without_hint
    if arguments.target:
        rows = report(arguments.target, re.compile(arguments.only).search)
        for name, row in rows.items():
            print(f"{name:44}", row["error"] or f"{row['registers']:4} {row['faults']}")
    elif broken := (_write() if arguments.write else _check()):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
