"""What gradtrace promises to leave alone: everything a model is and holds, and the random state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


@dataclass(frozen=True)
class Snapshot:
    """Facts about a model by name, each comparable with `same`."""

    facts: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The model's tensors, hooks and attributes, and the random state."""
        facts: dict[str, Any] = {"random state": torch.get_rng_state().clone()}
        facts.update(_of_tensors(model))
        for name, module in model.named_modules():
            facts.update(_of_module(name or "model", module))
        # A model whose own forward keeps a value with a graph can be neither pickled nor copied, whoever calls it.
        graph = any(isinstance(v, Tensor) and not v.is_leaf for m in model.modules() for v in vars(m).values())
        facts["pickles"] = graph or _works(lambda: pickle.dumps(model))
        facts["deep-copies"] = graph or _works(lambda: copy.deepcopy(model))
        return cls(facts)

    def changes_since(self, before: Snapshot) -> list[str]:
        """Names of the facts that are not what they were."""
        names = [*before.facts, *(name for name in self.facts if name not in before.facts)]
        return [name for name in names if not same(before.facts.get(name), self.facts.get(name))]


def same(a: Any, b: Any) -> bool:
    """Equality; bitwise for tensors, NaN equal to itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.layout != b.layout or a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = (t.detach().to_dense().contiguous() for t in (a, b))
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return type(a) is type(b) and bool(a == b)


def _of_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"parameter {name}", parameter.detach().clone()
        yield f"gradient of {name}", None if parameter.grad is None else parameter.grad.detach().clone()
        yield f"hooks of {name}", (len(parameter._backward_hooks or ()), _post_hooks(parameter))
        yield f"requires_grad of {name}", parameter.requires_grad
        yield f"attributes of {name}", sorted(vars(parameter))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", buffer.detach().clone()


def _of_module(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield f"class of {name}", type(module).__qualname__
    yield f"mode of {name}", module.training
    yield f"attributes of {name}", sorted(vars(module))
    for kind in HOOKS:
        yield f"{kind} of {name}", len(getattr(module, kind))
    for key, value in vars(module).items():
        if isinstance(value, int | float | str | bool | tuple):
            yield f"{name}.{key}", value


def _post_hooks(parameter: Tensor) -> int:
    return len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())


def _works(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except Exception:
        return False
    return True
