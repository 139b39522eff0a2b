"""How an instance is patched: it gets a subclass of its own class.

The subclass keeps the name and has the class as its ancestor, so wrappers that look for a class (FSDP, accelerate,
output recording) still find it; `state_dict` keys stay; and the patch is undone by giving the old class back.

No module has that subclass under its name, so a pickle could not find it. It is pickled as what made it instead, and
made anew where it is read: `torch.save(model)` works, and the loaded model is patched.
"""

import copyreg
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def subclass(original: Any, made_by: tuple[Any, ...], original_as: str = "_dropbp_original", **members: Any) -> Any:
    """A subclass of `original` in its name, with `members`; it holds `original` under the name `original_as`.

    made_by: the function of a module that calls this, and its further arguments: called with `original` and those, it
        returns this class again.
    """
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_dropbp_made_by": (made_by[0], (original, *made_by[1:])),
        original_as: original,
        **members,
    }
    metaclass: Any = type(original)
    return _pickled_by_maker(metaclass)(original.__name__, (original,), namespace)


@functools.cache
def _pickled_by_maker(metaclass: Any) -> Any:
    """A metaclass of classes that are pickled as what made them; copyreg knows objects by their class alone."""
    made = type(metaclass.__name__, (metaclass,), {})
    copyreg.pickle(made, lambda cls: vars(cls).get("_dropbp_made_by", cls.__qualname__))
    return made


def swap(module: nn.Module, make: Callable[..., Any], *args: Any) -> None:
    """Give `module` the class that `make` makes of its class and `args`.

    Where accelerate spreads a model over devices, a forward of its own calls the one that it found: that of the class.
    """
    old: Any = type(module)
    new = make(old, *args)
    found = vars(module).get("_old_forward")
    if getattr(found, "__func__", None) is old.forward:
        vars(module)["_old_forward"] = types.MethodType(new.forward, module)
    module.__class__ = new


def is_swapped(module: nn.Module, original_as: str = "_dropbp_original") -> bool:
    """Whether `module` is of a class that `subclass` made, or that another (`fully_shard`) made of such a one."""
    return hasattr(type(module), original_as)


def swap_back(module: nn.Module, original_as: str = "_dropbp_original") -> None:
    """Give `module` the class back that it had before; what somebody else made of its class meanwhile stays."""
    swap(module, _without, original_as)


@functools.cache
def _without(cls: Any, original_as: str) -> Any:
    if original_as in vars(cls):
        return vars(cls)[original_as]
    if not hasattr(cls, original_as):
        return cls
    # Checkpointed layers of transformers write a forward into every subclass: into this one a forward that calls ours.
    made = ("__dict__", "__weakref__", "forward")
    namespace = {name: value for name, value in vars(cls).items() if name not in made}
    return type(cls)(cls.__name__, tuple(_without(base, original_as) for base in cls.__bases__), namespace)


@contextmanager
def with_attribute(modules: Sequence[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Let `name` of each of `modules` be `value` for a while; then it is the instance's own again, or the class's."""
    before = [{name: vars(module)[name]} if name in vars(module) else {} for module in modules]
    for module in modules:
        vars(module)[name] = value
    try:
        yield
    finally:
        for module, found in zip(modules, before, strict=True):
            vars(module).pop(name)
            vars(module).update(found)


def class_as_built(module: nn.Module) -> Any:
    """The class that `module` had before FSDP2's fully_shard made one of its own."""
    cls = type(module)
    while any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        cls = cls.__bases__[-1]
    return cls


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers weights of `module`, or of something in it, for each use."""
    names = ("FSDPModule", "FullyShardedDataParallel")
    return any(cls.__name__ in names for child in module.modules() for cls in type(child).__mro__)
