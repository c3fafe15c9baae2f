"""The sizes that are measured: shapes of the parameters of known models, and awkward ones.

Every function returns a list of shapes; `SHAPES` names them for the command line.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedaccum.bench.shapes import PRESETS, Shapes
from fusedaccum.bench.shapes import count as count
from fusedaccum.doctor.judge import random as random


def gpt2_small() -> Shapes:
    """GPT-2, 124,439,808 parameters in 148 tensors; the head is the token embedding."""
    return PRESETS["gpt2"]


def llama_1b() -> Shapes:
    """TinyLlama, 1,100,048,384 parameters in 201 tensors; grouped key/value heads, head untied."""
    return PRESETS["llama-1b"]


def lora_500() -> Shapes:
    """500 low-rank matrices, 32,768,000 parameters: many tensors, little in each."""
    return [(16, 4096)] * 500


def flat_64mi() -> Shapes:
    """One tensor of 67,108,864 elements: the memory rate, without any overhead per tensor."""
    return [(64 << 20,)]


def odd() -> Shapes:
    """One element, primes, a chunk of 8192 and its neighbours, and one that takes all threads.

    That one comes first: torch.compile's loop for any size gets threads only if the first size it
    sees is worth them (without, it took twice as long on 2 cores).
    """
    return [(524309,), (1031, 257), (1,), (3,), (17,), (127, 129), (8191,), (8192,), (8193,)]


def unaligned() -> Shapes:
    """64 tensors of 1 Mi elements, whose gradients start one element into their memory."""
    return [(1 << 20,)] * 64


def tiny() -> Shapes:
    """For a dry run, where kernels are interpreted."""
    return [(1,), (17,), (3, 31), (8193,)]


SHAPES: dict[str, Callable[[], Shapes]] = {
    function.__name__: function
    for function in (
        *(gpt2_small, llama_1b, lora_500),
        *(flat_64mi, odd, unaligned, tiny),
    )
}
# Where a gradient of these shapes starts in its memory, in elements.
OFFSETS = {"unaligned": 1}


def gradients(
    shape: str, dtype: torch.dtype, device: torch.device, *, seed: int = 2
) -> list[Tensor]:
    """Gradients for the shapes of that name, placed as `OFFSETS` says."""
    return random(SHAPES[shape](), dtype, device, seed=seed, offset=OFFSETS.get(shape, 0))
