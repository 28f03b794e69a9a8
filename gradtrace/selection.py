"""Which parameters of a model are traced, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradtrace.errors import CaptureError, SelectionError, nearest
from gradtrace.store.rows import KINDS


def select(model: nn.Module, patterns: str | Sequence[str] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The traced parameters by qualified name (of tied ones the first), and the excluded ones with the reason."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"The model must be a torch.nn.Module, not {type(model).__name__}; wrap the function in one."
        )
    named = dict(model.named_parameters())
    lazy = [name for name, p in named.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise CaptureError(f"Parameters {lazy[:5]} are not initialised yet; run one forward pass of the model first.")
    globs = ["*"] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in named) and (named or patterns is not None):
            raise SelectionError(f"parameters={glob!r} matches no parameter of this model. {nearest(glob, named)}")
    chosen: dict[str, Tensor] = {}
    excluded: dict[str, str] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            excluded[name] = "does not require a gradient"
        elif not any(fnmatchcase(name, glob) for glob in globs):
            excluded[name] = "left out by parameters="
        else:
            chosen[name] = parameter
    if not chosen:
        raise CaptureError(
            f"The model ({type(model).__name__}) has no trainable parameter to trace"
            + (f": {len(excluded)} are excluded ({next(iter(excluded.values()))})." if excluded else ".")
            + " Set requires_grad=True on what shall be trained."
        )
    return chosen, excluded


def checked_kinds(kinds: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds asked for, in their canonical order."""
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise SelectionError(f"There is no kind {kind!r}; the kinds are {', '.join(KINDS)}.")
    if not wanted:
        raise SelectionError(f"kinds= is empty; choose from {', '.join(KINDS)}.")
    return tuple(kind for kind in KINDS if kind in wanted)
