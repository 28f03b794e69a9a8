"""Entering composite functions.

`F.multi_head_attention_forward` and its like are Python: a torch-function mode sees the whole call, and calling it
again under the mode would recurse. A copy of the function whose globals answer "no" to `has_torch_function*` runs the
same lines and lets the calls inside be seen one by one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

_ASKED = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def enterable(function: Callable[..., Any]) -> bool:
    """Whether `function` is a Python composite of torch's own that can be entered."""
    return (
        isinstance(function, types.FunctionType)
        and (function.__module__ or "").startswith("torch.")
        and any(name in function.__globals__ for name in _ASKED)
        and any(name in function.__code__.co_names for name in _ASKED)
    )


@functools.lru_cache(maxsize=256)
def entered(function: types.FunctionType) -> Callable[..., Any]:
    """The same function, asking no mode before it runs."""
    names = dict(function.__globals__)
    names.update(dict.fromkeys(_ASKED, lambda *_: False))
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
