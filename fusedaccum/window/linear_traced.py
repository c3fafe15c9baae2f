"""The same layers under torch.compile, whose graphs have no room for what happens in between.

The weight gradient is an operator of its own in the backward's graph. It is registered as one with
effects, as it gives nothing back: another operator without results would be dropped. What it does
is decided as it runs, so that windows and their weights compile nothing anew. The graph has no
gradient of the weight: what needs one raises.
"""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.private import is_wanted, transform
from .products import HOOK, Products
from .slots import Slot

KEY = "_fusedaccum_products"  # of a module's `__dict__`
_modules: WeakSet[nn.Module] = WeakSet()  # that were ever swapped
_at: dict[int, weakref.ref[nn.Module]] = {}  # one of them, by its weight's address


def remember(module: nn.Module) -> None:
    """A module is swapped."""
    register()
    _modules.add(module)


def _slot(weight: Tensor) -> tuple[Slot, Products]:
    """Where the gradient of a graph's weight goes, and what takes it there.

    A checkpoint hands back another tensor object of the same memory.

    Raises:
        RuntimeError: for a weight of nobody.
    """
    address = weight.data_ptr()
    for is_new in (False, True):
        if is_new:
            _at.clear()
            for each in _modules:
                param = each._parameters.get("weight")
                if param is not None:
                    _at[param.data_ptr()] = weakref.ref(each)
        ref = _at.get(address)
        module = None if ref is None else ref()
        param = None if module is None else module._parameters.get("weight")
        if param is None or param.data_ptr() != address or param.shape != weight.shape:
            continue
        products = vars(module).get(KEY, lambda: None)()
        slot = None if products is None else products.slot_of(param)
        if slot is not None and slot.node is not None and slot.difference() is None:
            return slot, products
    raise RuntimeError(
        f"the backward() of a compiled graph has a weight of shape {tuple(weight.shape)} whose "
        "gradient fuse_linear_wgrad() was to take, and no accumulator for it: the module was "
        "unfused, its parameter replaced, or saved tensors were moved to another memory, since "
        "or as the forward ran. Nothing was updated. Run the forward again, or call "
        "unfuse_linear_wgrad() before"
    )


def _linear_wgrad(dy: Tensor, x: Tensor, weight: Tensor, is_transposed: bool) -> None:
    """Add the gradient of a weight, in a backward.

    Args:
        dy: [tokens, out].
        x: [tokens, in].
        weight: [out, in], or [in, out] where `is_transposed`.
    """
    slot, products = _slot(weight)
    try:
        if not is_wanted(slot.node):
            return
    except RuntimeError:
        raise RuntimeError(_NO_GRADIENT.format("torch.autograd.grad() was asked for")) from None
    a, b = (x.t(), dy) if is_transposed else (dy.t(), x)
    with torch.no_grad():
        reason = products.refuses(slot, a.dtype)
        if reason == HOOK:
            raise RuntimeError(_NO_GRADIENT.format("a hook waits for"))
        if reason is not None:  # what the device lacks
            products.ordinary[reason] += 1
            a, b = a.float(), b.float()
        products.add(slot, a, b)


_NO_GRADIENT = (
    "{} the gradient of the weight of a fused Linear in a compiled model, whose graph has no such "
    "gradient. Call unfuse_linear_wgrad() first, or do not compile the model"
)


def _register() -> tuple[Any, str | None]:
    """The operator, or why this torch cannot have it."""
    try:
        from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

        tags = (torch.Tag.cudagraph_unsafe,)
        name = "fusedaccum::linear_wgrad"
        made = torch.library.custom_op(name, _linear_wgrad, mutates_args=(), tags=tags)
        made.register_fake(lambda dy, x, weight, is_transposed: None)
        op = torch.ops.fusedaccum.linear_wgrad
        _register_effectful_op(op.default, _EffectType.ORDERED)
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return None, f"torch {torch.__version__} has no operators with effects ({error})"
    return op, None


OP: Any = None
WHY_NOT: str | None = "no layer is fused"


def register() -> None:
    """Make the operator, once, as a layer is fused: torch takes two seconds to import for it."""
    global OP, WHY_NOT
    if OP is None:
        OP, WHY_NOT = _register()
        torch.compiler.assume_constant_result(_is_transformed)  # guards look at it


class TracedLinear(torch.autograd.Function):
    """`F.linear` in a graph, with `OP` in its backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.is_transposed = bias is not None, is_transposed
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        return F.linear(x, w.t() if is_transposed else w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            w = weight.to(dy.dtype)
            dx = (dy @ (w.t() if ctx.is_transposed else w)).view(x.shape)
        OP(rows, x.reshape(-1, x.shape[-1]), weight, ctx.is_transposed)
        bias = rows.sum(0).to(weight.dtype) if ctx.has_bias else None
        return dx, None, bias, None


def _is_transformed() -> bool:
    """Whether a transform of functorch is around, an export, or compiled autograd, which the first
    gradient that arrives refuses.

    It is asked as Python and not traced: torch 2.11's Dynamo takes `is_exporting()` for true.
    """
    has_transform = transform() is not None
    is_exporting = torch.compiler.is_exporting()
    return has_transform or is_exporting or bool(torch._dynamo.config.compiled_autograd)


def traced_forward(module: Any, x: Tensor, is_transposed: bool) -> Tensor | None:
    """The forward of a swapped module, as it is traced; None where it is the stock one."""
    weight, bias = module.weight, module.bias
    if (
        WHY_NOT is not None
        or not hasattr(module, KEY)
        or _is_transformed()
        or not torch.is_grad_enabled()
        or not weight.requires_grad
        or type(weight) is not nn.Parameter
    ):
        return None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.dtype:
        return None
    y: Tensor = TracedLinear.apply(x, weight, bias, is_transposed)  # type: ignore[no-untyped-call]
    return y
