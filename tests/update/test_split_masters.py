"""The two halves of a split master: every pair of them that a write from outside can leave.

The high half is the parameter, which anybody may write; the remainder is this library's. So every
high half can meet every remainder. What each pair means is spelled out here once more, in int64,
and the kernels, the compiled loop and ATen are held against it for all 2**16 high halves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedaccum import backends
from fusedaccum.backends import Finalize, Keep, Step, StepTensor, UpdateScalars, reference
from fusedaccum.kernels import _math
from fusedaccum.rules.builtin import RULES
from fusedaccum.update.masters import Master
from fusedaccum.window.buffers import Block
from fusedaccum.window.slots import Slot
from tests.cases import WithoutCompiler, forget_compiled
from tests.tolerances import equal_bits

CPU = torch.device("cpu")
REMAINDERS = [-0x8000, -0x7FFF, -12_345, -2, -1, 0, 1, 2, 777, 0x7FFE, 0x7FFF]
LARGEST = 0x7F800000  # inf: every larger magnitude is a NaN


@pytest.fixture(params=["triton", "compiled", "aten", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "aten":
        WithoutCompiler(monkeypatch)
    device = torch.device("cuda", 0) if request.param == "gpu" else CPU
    yield backends.get("triton" if request.param in ("triton", "gpu") else "torch", device)
    forget_compiled()


def all_pairs() -> tuple[Tensor, Tensor]:
    """Every high half with every one of the remainders."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    remainders = torch.tensor(REMAINDERS, dtype=torch.int16)
    return high.repeat(len(REMAINDERS)), remainders.repeat_interleave(len(high))


def is_nan(bits: Tensor) -> Tensor:
    return (bits & 0x7FFFFFFF) > LARGEST


def expected_bits(high: Tensor, remainder: Tensor) -> Tensor:
    """Bits of the master, in int64: the sum, or the high half alone where the sum is a NaN."""
    alone = (high.view(torch.int16).long() & 0xFFFF) << 16
    both = (alone + remainder.long()) & 0xFFFFFFFF
    return torch.where(is_nan(both), alone, both)


def bits_of(master: Tensor) -> Tensor:
    return master.view(torch.int32).long() & 0xFFFFFFFF


@triton.jit
def join_kernel(high_ptr, remainder_ptr, master_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    master = _math.join_master(tl.load(high_ptr + offsets), tl.load(remainder_ptr + offsets))
    tl.store(master_ptr + offsets, master)


def test_the_kernels_and_the_reference_join_every_pair_alike() -> None:
    high, remainder = all_pairs()
    expected = expected_bits(high, remainder)
    assert torch.equal(bits_of(reference.join_master(high, remainder)), expected)
    master = torch.empty(len(high))
    join_kernel[len(high) // 4096,](high, remainder, master, BLOCK=4096)
    assert torch.equal(bits_of(master), expected)


def test_only_a_nan_parameter_is_a_nan_master() -> None:
    high, remainder = all_pairs()
    assert torch.equal(reference.join_master(high, remainder).isnan(), high.isnan())


def test_a_master_is_within_half_a_step_of_the_parameter_that_shows() -> None:
    """It rounds to that parameter, to the bit; a zero's master is smaller than 2**-133."""
    high, remainder = all_pairs()
    numbers = ~high.isnan()
    master = reference.join_master(high, remainder)[numbers]
    assert equal_bits(reference.split_master(master)[0], high[numbers])
    assert (master[high[numbers] == 0].abs() < 2.0**-133).all()


def test_every_pair_that_splitting_makes_is_joined_exactly() -> None:
    """Zeros, subnormals, normals, what rounds to inf, and inf: all that an fp32 master can be."""
    exponents = torch.arange(2**8).repeat_interleave(2**8) << 23
    top = (torch.arange(2**8) << 15).repeat(2**8)  # 7 mantissa bits of the high half and the next
    for low in (0, 1, 2, 0x3FFF, 0x4000, 0x7FFE, 0x7FFF):
        magnitude = exponents + top + low
        bits = torch.cat([magnitude, magnitude + 2**31])
        bits = bits[~is_nan(bits)]
        master = torch.where(bits < 2**31, bits, bits - 2**32).int().view(torch.float32)
        assert equal_bits(reference.join_master(*reference.split_master(master)), master)


def test_a_step_that_moves_nothing_keeps_every_master(backend: Any) -> None:
    """Lion without a rate: the step alone, on each backend, with all pairs in its memory."""
    high, remainder = (t.to(backend.device) for t in all_pairs())
    rule = RULES["lion"]
    acc, exp_avg = (torch.zeros(len(high), device=backend.device) for _ in range(2))
    param, master = high.clone(), remainder.clone()
    tensors = [StepTensor(param, acc, (exp_avg,), row=0, group=0, master=master)]
    scalars = UpdateScalars(1, rule.family.n_scalars, backend.device)
    step = Step(rule, Keep.SPLIT, tensors, scalars)
    backend.finalize(Finalize([step], [(1.0, 0.0, 0.9, 0.99, 0.0)]))
    backend.step(step)
    bits = expected_bits(high, remainder)
    shown = torch.where(high.isnan(), torch.full_like(high, torch.nan), high)
    # A NaN has no remainder; neither has what came without a legitimate one.
    alone = (bits & 0xFFFF == 0) | high.isnan()
    kept = torch.where(alone, torch.zeros_like(remainder), remainder)
    assert equal_bits(param, shown)
    assert torch.equal(master, kept)


def test_without_the_guard_half_of_the_zeros_would_be_nan() -> None:
    """The negative control: what the plain sum of the halves makes of zeroed parameters."""
    high, remainder = all_pairs()
    plain = (high.float().view(torch.int32) + remainder.int()).view(torch.float32)
    zeros = high == 0
    assert torch.equal(plain[zeros].isnan(), remainder[zeros] < 0)


def test_a_checkpoint_s_master_under_parameters_that_were_written_since() -> None:
    """A written parameter keeps the loaded remainder, as after any write; what no master has counts
    as 0."""
    loaded = torch.tensor([1.001, 1.001, 1.001, float("nan"), 1e-41, 3.4e38])
    param = torch.tensor([1.0, 1.5, 0.0, 2.0, 0.0, float("inf")]).bfloat16()
    master = Master(Slot(param, Block([param]), 0, 0, 0, updater=0, is_own=True), Keep.SPLIT)
    master.refresh()
    assert master.tensor is not None
    master.tensor.fill_(99)
    master.loaded = loaded
    remainder = reference.split_master(loaded)[1]
    wanted = reference.precise(param, remainder)
    assert wanted[0] == loaded[0] and (wanted[1] - 1.5).abs() < 2**-8 and wanted[1] != 1.5
    before = master.precise()
    assert before is not None and equal_bits(before, wanted)
    master.refresh()
    after = master.precise()
    assert after is not None and equal_bits(after, wanted)
    assert equal_bits(master.tensor, remainder)
