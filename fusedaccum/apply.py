"""One update rule over lists of tensors, for the functions of `functional`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import StepBatch, UpdateRequest, UpdateScalars
from .backends.base import GRAD_DTYPES
from .buffers import is_dense
from .engines import refuse_tensor
from .rules import RULES
from .tables import OWN

# One per name and device, so that its launch tables are found again.
backend_for = lru_cache(maxsize=None)(backends.get)


def check(name: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Tensors of an operation: allowed dtypes, one device."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a sequence of tensors, got one tensor: use [{name}]")
    for i, tensor in enumerate(tensors):
        refuse_tensor(f"{name}[{i}]", tensor)
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d) for d in dtypes)
            raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; allowed: {allowed}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name}[{i}] is on {tensor.device} and {name}[0] on {tensors[0].device}; "
                "call once per device"
            )


def check_written(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Tensors written in place: as many as the first list, same shapes and memory layout."""
    if len(tensors) != len(like):
        raise ValueError(f"{name} has {len(tensors)} tensors, expected {len(like)}")
    for i, (tensor, first) in enumerate(zip(tensors, like, strict=True)):
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(first.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}, expected {first.device}")
        same = tensor.stride() == first.stride() or tensor.is_contiguous() == first.is_contiguous()
        if not is_dense(tensor) or not same:
            raise ValueError(
                f"{name}[{i}] has strides {tensor.stride()}; it is written in place, so it must "
                f"be dense and laid out as its partner {first.stride()}"
            )


def _check_numbers(name: str, numbers: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A small tensor with a row per parameter, written in place by the kernels."""
    fits = numbers.dtype == torch.float32 and numbers.shape == shape and numbers.is_contiguous()
    if not fits or numbers.device != like.device:
        raise ValueError(
            f"{name} must be a contiguous float32 tensor of shape {shape} on {like.device}, a row "
            f"per parameter; got {numbers.dtype} of shape {tuple(numbers.shape)} on "
            f"{numbers.device}"
        )


def apply(
    rule_name: str,
    hyper: tuple[Any, ...],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    steps: Tensor,
    masters: Sequence[Tensor] | None,
    grad_scale: float,
    maximize: bool,
    backend: str | None,
    memory: Mapping[str, Tensor] | None = None,
) -> None:
    """Validate and run one rule.

    Args:
        rule_name: a key of `RULES`.
        hyper: as its family takes them.
        params, grads, steps, masters, grad_scale, maximize, backend: see `updates.adamw_`.
        states: in the rule's order, by the caller's names for them.
        memory: the family's numbers per tensor, by the caller's name for them, if it has any.
    """
    rule = RULES[rule_name]
    check("params", params, GRAD_DTYPES)
    check("grads", grads, (torch.float32,))
    check_written("params", params, params)
    check_written("grads", grads, params)
    for name, tensors in states.items():
        check(name, tensors, (torch.float32,))
        check_written(name, tensors, params)
    if masters is not None and len(masters) != len(params):
        raise ValueError(f"masters has {len(masters)} tensors, expected {len(params)}")
    n = len(params)
    if not n:
        return
    device = params[0].device
    _check_numbers("steps", steps, (n,), params[0])
    scalars = UpdateScalars(0, rule.family.n_scalars, device)
    scalars.steps = steps
    scalars.scalars = torch.empty(n, OWN + rule.family.n_scalars, device=device)
    scalars.memory = torch.empty(n, 0, device=device)
    for name, numbers in (memory or {}).items():
        n_memory = len(rule.family.memory)
        _check_numbers(name, numbers, (n, n_memory) if n_memory > 1 else (n,), params[0])
        scalars.memory = numbers.view(n, n_memory)
    batches: dict[tuple[torch.dtype, str], StepBatch] = {}
    for i, param in enumerate(params):
        kind = "none" if masters is None else _master_kind(i, param, masters[i])
        batch = batches.setdefault((param.dtype, kind), StepBatch(rule, kind))
        batch.params.append(param)
        batch.accs.append(grads[i])
        batch.states.append(tuple(tensors[i] for tensors in states.values()))
        batch.rows.append(i)
        batch.groups.append(0)
        if masters is not None:
            batch.masters.append(masters[i])
    row = (-1.0 if maximize else 1.0, *hyper)
    request = UpdateRequest(rule.family, [row], None, grad_scale, None, False)
    runner = backend_for(backend, device)
    runner.finalize(request, list(batches.values()), scalars)
    for batch in batches.values():
        runner.step(batch, scalars)
    torch.autograd.graph.increment_version(list(params))


def _master_kind(index: int, param: Tensor, master: Tensor) -> str:
    """How `master` keeps the precise value of `param`."""
    check_written(f"masters[{index}:]", [master], [param])
    if master.dtype == torch.int16 and param.dtype == torch.bfloat16:
        return "split"
    if master.dtype == torch.float32 and param.dtype != torch.float32:
        return "fp32"
    raise TypeError(
        f"masters[{index}] has dtype {master.dtype} for a {param.dtype} parameter; allowed: int16 "
        "remainders for bf16 parameters, float32 masters for bf16 and fp16 ones"
    )
