"""What the lines of a walk call."""

import contextlib
import copy  # noqa: F401
import functools
import io
import pickle  # noqa: F401

import torch
import torch.utils.checkpoint

from fusedaccum import FusedAccumOptimizer  # noqa: F401

with contextlib.suppress(ImportError):  # missing on a GPU machine that is taken as it is
    import lion_pytorch  # noqa: F401

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def fill(shape, dtype, seed):
    """Eighths from -15/8 to 15/8: every dtype holds them, and fp32 their sums, exactly."""
    return _eighths(torch.Size(shape).numel(), seed).to(dtype, copy=True).reshape(shape)


@functools.lru_cache(1000)
def _eighths(n, seed):
    return ((torch.arange(n) * 7 + seed * 13) % 31 - 15) / 8


def parameter(shape, dtype, seed, layout="contiguous", frozen=False):
    """A parameter whose memory is laid out so."""
    values = fill(shape, dtype, seed)
    if layout == "transposed":
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    return torch.nn.Parameter(values, requires_grad=not frozen)


def gradient(p, seed, bad=None):
    """What a backward gives `p`; `bad` stands in its first place. All the same from seed 31 on."""
    values = (
        fill(p.shape, p.dtype, seed)
        if seed < 31
        else torch.full(p.shape, seed / 8 - 4, dtype=p.dtype)
    )
    if bad is not None and values.numel():
        values.view(-1)[0] = bad
    return values


def backward(p, seeds, bad=None):
    """A backward whose gradients are known: that of p[i] is made from seeds[i]."""
    used = {i: seed for i, seed in seeds.items() if p[i].requires_grad}
    if used:
        sum(term(p[i], seed, bad) for i, seed in used.items()).backward()


def term(p, seed, bad=None):
    """Has that gradient; from seed 31 on it arrives as one number, expanded."""
    if seed > 30 and bad is None:
        return p.sum().float() * (seed / 8 - 4)
    return (p * gradient(p.detach(), seed, bad)).sum().float()


def reentrant_backward(p, seeds):
    """Each gradient arrives twice, the first time inside a checkpoint's own backward."""
    used = {i: seed for i, seed in seeds.items() if p[i].requires_grad}
    if used:
        start = torch.zeros((), requires_grad=True)

        def inside(x):
            return x + sum(term(p[i], seed) for i, seed in used.items())

        outside = sum(term(p[i], seed) for i, seed in used.items())
        (outside + torch.utils.checkpoint.checkpoint(inside, start, use_reentrant=True)).backward()


class Breaks(torch.autograd.Function):
    """The backward raises here."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("half-way")


def broken_backward(p, seeds):
    """A backward that raises when the gradients of `seeds` are there and others are not."""
    start = Breaks.apply(torch.zeros((), requires_grad=True))  # first made, last reached
    parts = [term(p[i], seed) for i, seed in seeds.items()]
    with contextlib.suppress(MemoryError):
        (start + sum(parts)).backward()


def values_of(p):
    """Copies of the parameters."""
    return [x.detach().clone() for x in p]


def restore(p, values):
    """Write them back."""
    with torch.no_grad():
        for x, value in zip(p, values, strict=True):
            x.copy_(value)


def through_a_file(state):
    """Saved and loaded, as torch.load does it without trust."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(p):
    """New parameters with the same values, as a new process makes them from a checkpoint."""
    return [torch.nn.Parameter(x.detach().clone(), requires_grad=x.requires_grad) for x in p]


class Sub(torch.optim.SGD):
    """A user's subclass, which keeps its own step()."""


def zero_grad(p, set_to_none=True):
    """model.zero_grad()"""
    torch.nn.ParameterList(p).zero_grad(set_to_none=set_to_none)
