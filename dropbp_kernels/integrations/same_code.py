"""Forwards that are known by what Python made of their source: to the letter, or by what they call.

So a class is known by what it computes and not by its name. Models of transformers repeat each other's lines, and so do
those whose code comes with their weights; and a class that only bears a known name is not taken for it.
"""

import inspect
from collections.abc import Callable
from typing import Any

_TAKES_MORE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS  # other flags say where a function was written


def is_same_code(function: Any, known: Callable[..., Any]) -> bool:
    """Whether `function` has the statements of `known`; names of variables, annotations and docstring aside.

    False for what is no plain function, as what a decorator returns.
    """
    codes: list[Any] = [getattr(each, "__code__", None) for each in (function, known)]
    if None in codes or any(code.co_freevars for code in codes):
        return False
    ours, theirs = (
        (code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_flags & _TAKES_MORE)
        for code in codes
    )
    return ours == theirs and _constants(function) == _constants(known)


def calls(module: Any, name: str) -> bool | None:
    """Whether the forward of a model of transformers' own names the function or method `name`; None for other code."""
    forward: Any = inspect.unwrap(type(module).forward)
    return name in forward.__code__.co_names if forward.__module__.startswith("transformers.models.") else None


def _constants(function: Any) -> list[Any]:
    return [value for value in function.__code__.co_consts if value is not None and value != function.__doc__]
