"""Outputs of models of transformers: tuples, or dictionaries whose values are attributes too."""

from typing import Any

from torch import Tensor


def tensors_in(output: Any) -> dict[Any, Tensor]:
    """The tensors of an output by place or name, but for scalars."""
    items = enumerate(output) if type(output) is tuple else output.items()
    return {name: value for name, value in items if isinstance(value, Tensor) and value.dim() > 0}


def with_tensors(output: Any, new: dict[Any, Tensor]) -> Any:
    """The output with others in place of some of its tensors; a tuple is copied."""
    if type(output) is tuple:
        return tuple(new.get(place, value) for place, value in enumerate(output))
    for name, value in new.items():
        output[name] = value
    return output
