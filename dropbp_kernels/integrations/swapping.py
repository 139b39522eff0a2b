"""How an instance is patched: it gets a subclass of its own class.

The subclass keeps the name and has the class as its ancestor, so wrappers that look for a class (FSDP, accelerate,
output recording) still find it; `state_dict` keys stay; and the patch is undone by giving the old class back.
"""

from typing import Any

from torch import nn


def subclass(original: Any, original_as: str = "_dropbp_original", **members: Any) -> Any:
    """A subclass of `original` in its name, with `members`; it holds `original` under the name `original_as`."""
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        original_as: original,
        **members,
    }
    return type(original.__name__, (original,), namespace)


def is_swapped(module: nn.Module, original_as: str = "_dropbp_original") -> bool:
    """Whether `module` is of a class that `subclass` made."""
    return original_as in vars(type(module))


def swap_back(module: nn.Module, original_as: str = "_dropbp_original") -> None:
    """Give `module` the class back that it had before."""
    module.__class__ = vars(type(module))[original_as]
