"""One update rule over lists of tensors, for the functions of `functional`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend, Correction, Finalize, Keep, Step, StepTensor, UpdateScalars
from ..backends.operations import GRAD_DTYPES
from ..backends.tensors import is_dense, laid_out_like, refuse_tensor, same_order, sharing
from ..kernels.layout import ScalarsRow
from ..rules.builtin import RULES
from ..rules.rule import Family
from .numbers import check_number

Tensors = Sequence[Tensor]
Lists = Mapping[str, Tensors]


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
    """Tensors of an operation: a sequence, allowed dtypes, one device."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a sequence of tensors, got one tensor: use [{name}]")
    if isinstance(tensors, Mapping) or not hasattr(tensors, "__getitem__"):
        raise TypeError(
            f"{name} must be a sequence of tensors, got a {type(tensors).__name__}: give a list, "
            "list(model.parameters()) say"
        )
    for i, tensor in enumerate(tensors):
        _check_tensor(f"{name}[{i}]", tensor)
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d) for d in dtypes)
            raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; allowed: {allowed}")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name}[{i}] is on {tensor.device} and {name}[0] on {tensors[0].device}; "
                "call once per device"
            )


def _check_tensor(name: str, tensor: object) -> None:
    """One member of a list is a tensor whose memory a kernel can read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {tensor!r:.60}: leave a parameter that has none (no "
            "gradient, say) out of all lists of the call"
        )
    refuse_tensor(name, tensor)


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
    found = sharing(tensors, n_written)
    if found is None:
        return
    names = [f"{name}[{i}]" for name, members in lists.items() for i in range(len(members))]
    one, other = (names[i] for i in found)
    raise ValueError(
        f"{one} and {other} share memory; {one} is written in place, so it must have memory of its "
        "own: pass each tensor once, and a clone() of what is shared"
    )


def _check_numbers(name: str, numbers: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A small tensor with a row per parameter, written in place by the kernels."""
    if not isinstance(numbers, Tensor):
        raise TypeError(
            f"{name} must be one float32 tensor of shape {shape}, a row per parameter; got "
            f"{numbers!r:.60}"
        )
    fits = numbers.dtype == torch.float32 and numbers.shape == shape and numbers.is_contiguous()
    if not fits or numbers.device != like.device:
        raise ValueError(
            f"{name} must be a contiguous float32 tensor of shape {shape} on {like.device}, a row "
            f"per parameter; got {numbers.dtype} of shape {tuple(numbers.shape)} on "
            f"{numbers.device}"
        )


@dataclass(frozen=True)
class Operands:
    """The tensors of one update, by the names that its caller has for them.

    Attributes:
        params, grads, steps: see `updates.adamw_`.
        states: in the rule's order.
        memory: the family's numbers per tensor, if it has any.
    """

    params: Tensors
    grads: Tensors
    states: Lists
    steps: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


class Common(TypedDict, total=False):
    """The keywords of `apply`, which all updates share."""

    maximize: bool
    """As in torch (default: False)."""
    masters: Tensors | None
    """See `adamw_` (default: None)."""
    grad_scale: float
    """Normalisation, unscale or clip factor, applied in registers (default: 1)."""
    backend: str | None
    """None (automatic, the default), "triton" or "torch"."""


def apply(
    rule_name: str,
    hyper: tuple[Any, ...],
    operands: Operands,
    *,
    maximize: bool = False,
    masters: Tensors | None = None,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Validate and run one rule.

    Args:
        rule_name: a key of `RULES`.
        hyper: as its family takes them.
        operands: what is read and written.
        maximize, masters, grad_scale, backend: see `updates.adamw_`.
    """
    rule, params = RULES[rule_name], operands.params
    check("params", params, GRAD_DTYPES)
    check("grads", operands.grads, (torch.float32,))
    check_written("params", params, params)
    for value in (*hyper, grad_scale):
        check_number(f"{rule_name}: a hyper-parameter (or grad_scale)", value)
    check_shapes("grads", operands.grads, params)
    for name, tensors in operands.states.items():
        check(name, tensors, (torch.float32,))
        check_written(name, tensors, params)
    if masters is not None and len(masters) != len(params):
        raise ValueError(f"masters has {len(masters)} tensors, expected {len(params)}")
    if not params:
        return
    scalars = _scalars(rule.family, operands)
    accs = [laid_out_like(g, p) for g, p in zip(operands.grads, params, strict=True)]
    tensors_of: dict[tuple[torch.dtype, Keep], list[StepTensor]] = {}
    for i, (param, acc) in enumerate(zip(params, accs, strict=True)):
        master = None if masters is None else masters[i]
        keep = Keep.PARAM if masters is None else _keep(i, param, masters[i])
        states = tuple(tensors[i] for tensors in operands.states.values())
        tensor = StepTensor(param, acc, states, row=i, group=0, master=master)
        tensors_of.setdefault((param.dtype, keep), []).append(tensor)
    numbers = {name: [tensor] for name, tensor in operands.memory.items()}
    own = {"params": params, **operands.states, "masters": masters or [], "steps": [operands.steps]}
    check_apart(own | numbers, {"grads": accs})
    updates = [Step(rule, keep, tensors, scalars) for (_, keep), tensors in tensors_of.items()]
    row = (-1.0 if maximize else 1.0, *hyper)
    runner = backend_for(backend, params[0].device)
    runner.finalize(Finalize(updates, [row], Correction(grad_scale)))
    for update in updates:
        runner.step(update)
    torch.autograd.graph.increment_version([*chain(*own.values(), *numbers.values())])


def _scalars(family: Family, operands: Operands) -> UpdateScalars:
    """The numbers of an update, those of the caller among them."""
    n, like = len(operands.params), operands.params[0]
    _check_numbers("steps", operands.steps, (n,), like)
    scalars = UpdateScalars(0, family.n_scalars, like.device)
    scalars.steps = operands.steps
    n_columns = ScalarsRow.OWN + family.n_scalars
    scalars.scalars = torch.empty(n, n_columns, dtype=torch.float32, device=like.device)
    scalars.memory = torch.empty(n, 0, dtype=torch.float32, device=like.device)
    for name, numbers in operands.memory.items():
        n_memory = len(family.memory)
        _check_numbers(name, numbers, (n, n_memory) if n_memory > 1 else (n,), like)
        scalars.memory = numbers.view(n, n_memory)
    return scalars


def _keep(index: int, param: Tensor, master: Tensor) -> Keep:
    """How `master` keeps the precise value of `param`."""
    _check_tensor(f"masters[{index}]", master)
    check_written(f"masters[{index}:]", [master], [param])
    if master.dtype == torch.int16 and param.dtype == torch.bfloat16:
        return Keep.SPLIT
    if master.dtype == torch.float32 and param.dtype != torch.float32:
        return Keep.FP32
    raise TypeError(
        f"masters[{index}] has dtype {master.dtype} for a {param.dtype} parameter; allowed: int16 "
        "remainders for bf16 parameters, float32 masters for bf16 and fp16 ones"
    )
