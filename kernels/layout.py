"""The numbers that the kernels share with those who fill their tables and with the C loops.

Plain numbers: Triton need not be there. A kernel takes them as `tl.constexpr(layout.CHUNK)`, the
tables of `fusedaccum/backends/` as they are, and the C source as enums.
"""

# Elements per program. Large enough that the table costs nothing (20 bytes for at least 48 KiB of
# traffic), small enough that a LoRA matrix of 16 x 4096 still makes 8 programs.
CHUNK = 8192
# Every address that takes the aligned path is a multiple of this many bytes: one 128-bit access.
VECTOR_BYTES = 16

# What torch.nn.utils.clip_grad_norm_ adds to the norm before it divides.
CLIP_EPS = 1e-6

# Half of the last place of a bf16 in the bits of an fp32: adding it rounds to nearest.
ROUND_HALF = 0x8000
# The high half of the NaN that bf16 and fp32 share. A NaN whose low half is set (0x7FFFFFFF is what
# NVIDIA GPUs produce) would otherwise round up into the sign bit and show as -0.0.
QUIET_NAN_HIGH = 0x7FC0

# The hash of stochastic rounding: lowbias32's multipliers, and SplitMix's increment, 2**32 / phi.
# `fusedaccum/backends/rounding.py` says more.
MIX_FIRST = 0x7FEB352D
MIX_SECOND = 0x846CA68B
GOLDEN = 0x9E3779B9


class AccumulateRow:
    """Columns of `accumulate_kernel`'s table, one row a tensor."""

    GRAD, ACC, NUMEL, PARTIAL, COLUMNS = range(5)


class SquaresRow:
    """Columns of `sum_of_squares_kernel`'s table, one row a tensor."""

    DATA, NUMEL, PARTIAL, COLUMNS = range(4)


class StepRow:
    """Columns of `step_kernel`'s table, one row a tensor; the states' addresses follow.

    MASTER is 0 where there is none. TENSOR is the row of the tensor's scalars. KEY is its random
    key, read where parameters are rounded at random.
    """

    PARAM, MASTER, ACC, NUMEL, TENSOR, KEY, STATES = range(7)


class ScalarsRow:
    """Columns of an update's scalars, one row a tensor; the rule's own follow from OWN on."""

    COEF, STEP, OWN = range(3)
