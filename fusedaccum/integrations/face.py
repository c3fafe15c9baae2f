"""An optimizer that shares everything with another one."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain
from multiprocessing.context import get_spawning_popen
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_map_only

from .dcp import WithOurNames
from .frameworks import is_asked_by, refuse_deepspeed, stood_before
from .linear import FusesLinear
from .measured import Measured

# What goes to a process that is being started, as long as its starter knows it.
_sent: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _wrapper(kind: type[Any]) -> type[Any]:
    """The class whose constructor takes the optimizer to wrap; a subclass may take parameters."""
    return next(k for k in kind.__mro__ if SharingOptimizer in k.__bases__)


def _rebuild(kind: Any, optimizer: Optimizer, options: Any, state: Any) -> Any:
    """What `__reduce__` asks for."""
    wrapper = kind.__new__(kind)
    _wrapper(kind).__init__(wrapper, optimizer, **options)
    wrapper.load_state_dict(state)
    return wrapper


class _HandedOn:
    """An attribute of a stand-in that is asked of, and set on, the optimizer behind it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, stand_in: Any, kind: Any = None) -> Any:
        return self if stand_in is None else getattr(stand_in.optimizer, self.name)

    def __set__(self, stand_in: Any, value: Any) -> None:
        setattr(stand_in.optimizer, self.name, value)

    def __delete__(self, stand_in: Any) -> None:
        delattr(stand_in.optimizer, self.name)


class HandedOver:
    """What GradScaler sets on an optimizer for one step(); `vars()` keeps it, and step() finds it.

    It is not to be read here: GradScaler would multiply its scale with what an interrupted step()
    has left.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, kind: type | None = None) -> Any:
        if wrapper is None:
            return self
        raise AttributeError(self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        vars(wrapper)[self._name] = value

    def __delete__(self, wrapper: Any) -> None:
        vars(wrapper).pop(self._name, None)


class _Exchange(list[dict[str, Any]]):
    """Param groups for a loop that puts other parameters into each; then `taken` is called."""

    def __init__(self, groups: list[dict[str, Any]], taken: Callable[[], None]) -> None:
        super().__init__(groups)
        self._taken = taken

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from super().__iter__()
        self._taken()


class SharingOptimizer(FusesLinear, Measured, Optimizer):
    """Shows the wrapped optimizer's `param_groups`, `state`, `defaults` and hooks as its own.

    They are looked up each time: torch's `load_state_dict` replaces them on the wrapped one.
    `Optimizer.__init__` is not called, since everything it makes is the wrapped optimizer's.
    """

    optimizer: Optimizer
    # The settings that may be assigned.
    _changeable: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a class that only looks like ours hand on what it does not do itself.

        Lightning puts an object before the optimizer and derives its class from the optimizer's
        too, for `isinstance`. Our methods would run on that object, and what they set would stay
        there, unseen by the optimizer. Such a class is known by its property `optimizer`, an
        attribute that our constructor sets.

        It is the last that Fabric's setup() does, and all of it that the optimizer sees. The model
        has been moved and converted then, and a loop may run its first backward before it zeroes.
        """
        super().__init_subclass__(**kwargs)
        if not isinstance(inspect.getattr_static(cls, "optimizer", None), property):
            return
        for base in cls.__mro__:
            if base is not cls and issubclass(base, (SharingOptimizer, FusesLinear, Measured)):
                for name in vars(base):
                    is_first = next(c for c in cls.__mro__ if name in vars(c)) is base
                    if is_first and (name == "__repr__" or not name.startswith("__")):
                        setattr(cls, name, _HandedOn(name))
        behind = stood_before()
        if isinstance(behind, SharingOptimizer):
            behind._follow_model()

    def _follow_model(self) -> None:
        """A framework may have moved or converted the parameters."""

    def _take_parameters(self) -> None:
        """Others are in the param groups."""

    def __reduce__(self) -> Any:
        """Pickle and deepcopy: the wrapped optimizer wrapped anew, with its state."""
        # The constructor keeps each of its options under its own name.
        _, *names = inspect.signature(_wrapper(type(self))).parameters
        options = {name: getattr(self, name) for name in names}
        if options.get("process_group") is not None:
            raise TypeError(
                "a FusedAccumOptimizer with process_group= cannot be copied or pickled, as the "
                "group cannot: save its state_dict(), and load that into a new one"
            )
        # States are views of flat buffers, each of which would take all of its buffer along.
        state = tree_map_only(Tensor, torch.Tensor.clone, self.state_dict())
        bare = copy.copy(self.optimizer)
        bare.state = defaultdict(dict)
        starting = get_spawning_popen()
        if starting is not None:  # what is shared with a new process has to live until it has it
            _sent[starting] = state
        return _rebuild, (type(self), bare, options, state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What it puts into an optimizer's attributes belongs into those of the wrapped one.

        People call it to start afresh: `opt.__setstate__({"state": defaultdict(dict)})`.
        """
        self.optimizer.__setstate__(state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own list."""
        refuse_deepspeed(getattr(self, "gradient_accumulation_steps", None))
        if is_asked_by("fsdp2_switch_optimizer_parameters"):  # Accelerate's prepare()
            return _Exchange(self.optimizer.param_groups, self._take_parameters)
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's own dict. States are fp32 views of flat buffers."""
        if is_asked_by("_unflatten_optim_state_dict"):  # torch.distributed.checkpoint
            return WithOurNames(self.optimizer.state)  # type: ignore[return-value]
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's own dict."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what only the wrapped optimizer has there, where its step() reads it.

        Raises:
            AttributeError: for another optimizer to wrap, and for nearly the name of a setting.
        """
        inner = vars(self).get("optimizer")
        if inner is not None and name == "optimizer":
            raise AttributeError(
                f"optimizer is fixed by the constructor: it is a {type(inner).__name__}, got a "
                f"{type(value).__name__}. Call detach(), and wrap the other one"
            )
        if inner is None or name in vars(self) or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif name in vars(inner):
            setattr(inner, name, value)
        else:
            # Attributes of others are welcome: frameworks have theirs, and so has a subclass.
            is_ours = SharingOptimizer in type(self).__bases__ and not name.startswith("_")
            for near in get_close_matches(name, self._changeable, 1, 0.75) if is_ours else ():
                raise AttributeError(
                    f"{name}={value!r} would change nothing: {type(self).__name__} has no such "
                    f"setting. Did you mean {near}? Give an attribute of your own another name"
                )
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Hook dicts, and whatever a subclass has; asked only for what is not ours.
        if name == "optimizer":
            raise AttributeError(name)
        try:
            return getattr(self.optimizer, name)
        except AttributeError as error:
            if error.obj is not self.optimizer or error.name != name:
                raise  # of something that it asks for in turn
            both = f"neither {type(self).__name__} nor {type(self.optimizer).__name__} has an"
            # From name and obj Python makes its "Did you mean", of our names and not of theirs.
            raise AttributeError(f"{both} attribute {name!r}", name=name, obj=self) from None


class OwnStep:
    """A hook that refuses step() of the wrapped optimizer itself, which knows no window.

    Args:
        is_allowed: whether the step() that begins is the wrapper's doing, or nobody wraps it now.
    """

    def __init__(self, is_allowed: Callable[[], bool]) -> None:
        self._is_allowed = is_allowed

    def __call__(self, stepped: Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(stepped, SharingOptimizer) or self._is_allowed():
            return
        raise RuntimeError(
            f"step() was called on the {type(stepped).__name__} inside a FusedAccumOptimizer, for "
            "which p.grad is an unfinished sum and not a gradient; nothing was updated. Call "
            "step() and zero_grad() of the FusedAccumOptimizer, or its detach() first to go on "
            "without it"
        )


@contextmanager
def step_hooks(face: SharingOptimizer) -> Iterator[bool]:
    """What torch does around a step(): a profiler record, and the hooks of both kinds.

    Yields:
        Whether there was one before.
    """
    with torch.autograd.profiler.record_function(f"Optimizer.step#{type(face).__name__}.step"):
        before = (
            torch_optimizer._global_optimizer_pre_hooks,
            face.optimizer._optimizer_step_pre_hooks,
        )
        for hook in chain.from_iterable(hooks.values() for hooks in before):
            hook(face, (face,), {})
        yield any(not isinstance(h, OwnStep) for hooks in before for h in hooks.values())
        after = (
            face.optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        for hook in chain.from_iterable(hooks.values() for hooks in after):
            hook(face, (face,), {})
    # A scheduler made on the wrapped optimizer looks here for whether step() was called.
    face.optimizer._opt_called = True  # type: ignore[attr-defined]
