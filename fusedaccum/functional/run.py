"""One update rule over lists of tensors, for the functions of `functional`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import backends
from ..backends import Backend, StepBatch, UpdateRequest, UpdateScalars
from ..backends.operations import GRAD_DTYPES
from ..backends.tables import addresses
from ..backends.tensors import is_dense, laid_out_like, refuse_tensor, same_order
from ..kernels.layout import ScalarsRow
from ..rules.builtin import RULES

Lists = Mapping[str, Sequence[Tensor]]


class _Backends(threading.local):
    """A thread's backends. Their launch tables are rewritten from call to call, while the loops of
    another thread would read them."""

    def __init__(self) -> None:
        self.found: dict[tuple[str | None, torch.device], Backend] = {}


_backends = _Backends()


def backend_for(name: str | None, device: torch.device) -> Backend:
    """This thread's backend of a name and device, the same one each time: it keeps its tables."""
    key = name, device
    if key not in _backends.found:
        _backends.found[key] = backends.get(name, device)
    return _backends.found[key]


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


def check_shapes(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """As many tensors as the first list has, of the same shapes, on its device."""
    if len(tensors) != len(like):
        raise ValueError(f"{name} has {len(tensors)} tensors, expected {len(like)}")
    for i, (tensor, first) in enumerate(zip(tensors, like, strict=True)):
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(first.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}, expected {first.device}")


def check_written(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Tensors written in place: as many as the first list, same shapes and order in memory."""
    check_shapes(name, tensors, like)
    for i, (tensor, first) in enumerate(zip(tensors, like, strict=True)):
        if not is_dense(tensor) or not same_order(tensor, first):
            raise ValueError(
                f"{name}[{i}] has strides {tensor.stride()}; it is written in place, so it must "
                f"be dense and laid out as its partner {first.stride()}"
            )


def check_apart(written: Lists, read: Lists) -> None:
    """No tensor that is written shares memory with another one of the call.

    Otherwise an update would be applied twice, or read what it has written already. Tensors that
    are only read may share theirs. All are dense.
    """
    lists = {**written, **read}
    tensors = [tensor for members in lists.values() for tensor in members]
    n_written = sum(len(members) for members in written.values())
    starts = addresses(tensors)
    ends = starts + np.fromiter((t.nbytes for t in tensors), np.int64, len(tensors))
    order = np.lexsort((ends, starts))
    order = order[ends[order] > starts[order]]  # empty ones share nothing
    is_written = order < n_written
    # How far what came before reaches: anything, and what is written.
    reach = np.maximum.accumulate(np.append(0, ends[order]))[:-1]
    reach_written = np.maximum.accumulate(np.append(0, np.where(is_written, ends[order], 0)))[:-1]
    clash = starts[order] < np.where(is_written, reach, reach_written)
    if not clash.any():
        return
    position = int(np.argmax(clash))
    second = int(order[position])
    before = [int(i) for i in order[:position] if is_written[position] or i < n_written]
    first = next(i for i in before if ends[i] > starts[second])
    names = [f"{name}[{i}]" for name, members in lists.items() for i in range(len(members))]
    one, other = (names[i] for i in sorted((first, second)))
    raise ValueError(
        f"{one} and {other} share memory; {one} is written in place, so it must have memory of its "
        "own: pass each tensor once, and a clone() of what is shared"
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
    states: Lists,
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
    check_shapes("grads", grads, params)
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
    n_columns = ScalarsRow.OWN + rule.family.n_scalars
    scalars.scalars = torch.empty(n, n_columns, dtype=torch.float32, device=device)
    scalars.memory = torch.empty(n, 0, dtype=torch.float32, device=device)
    for name, numbers in (memory or {}).items():
        n_memory = len(rule.family.memory)
        _check_numbers(name, numbers, (n, n_memory) if n_memory > 1 else (n,), params[0])
        scalars.memory = numbers.view(n, n_memory)
    accs = [laid_out_like(g, p) for g, p in zip(grads, params, strict=True)]
    batches: dict[tuple[torch.dtype, str], StepBatch] = {}
    for i, param in enumerate(params):
        kind = "none" if masters is None else _master_kind(i, param, masters[i])
        batch = batches.setdefault((param.dtype, kind), StepBatch(rule, kind))
        batch.params.append(param)
        batch.accs.append(accs[i])
        batch.states.append(tuple(tensors[i] for tensors in states.values()))
        batch.rows.append(i)
        batch.groups.append(0)
        if masters is not None:
            batch.masters.append(masters[i])
    numbers_of = {name: [numbers] for name, numbers in (memory or {}).items()}
    own = {"params": params, **states, "masters": masters or [], "steps": [steps], **numbers_of}
    check_apart(own, {"grads": accs})
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
