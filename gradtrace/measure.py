"""One batch: `trace`, the graph of a model's parameterized ops, and `spectra`, the group spectra of one loss.

Both run the model by `torch.func.functional_call` on substituted parameters and buffers: nothing of the user's changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradtrace.adapters import Adapter, registry
from gradtrace.errors import CaptureError
from gradtrace.finish import infos, judge, step_row
from gradtrace.graph import OpGraph
from gradtrace.graphing import graph_of
from gradtrace.inputs import Inputs
from gradtrace.probing import ATTEMPTS
from gradtrace.selection import checked_kinds, select
from gradtrace.session import Session
from gradtrace.settings import Settings
from gradtrace.shadow import any_loss
from gradtrace.sizes import Sizing
from gradtrace.standin import Standin
from gradtrace.store.rows import KINDS
from gradtrace.survey import Memory
from gradtrace.untouched import attributes_kept, random_state_kept

if TYPE_CHECKING:
    import xarray


def spectra(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    *,
    groups: Any = None,
    kinds: Sequence[str] = KINDS,
    keep: int | None = 64,
    parameters: str | Sequence[str] | None = None,
    sample_dim: int | None = None,
    coupling: str = "rows",
    adapters: Mapping[str, str] | Sequence[Adapter] | None = None,
) -> xarray.DataTree:
    """A tree with one node per parameter: group spectra of the gradient, activations and adjoints of one batch.

    inputs: a tensor, a tuple (positional), a mapping (keyword arguments), or `Inputs(args, kwargs)`.
    loss_fn: takes the model's output, returns a scalar. Spectra are of the raw sums as they would enter `p.grad`: with
        a mean loss over N samples they carry 1/N.
    groups: a mapping from grouping name to one label per sample (strings or integers), or one bare sequence.
    kinds: any of gradient, activation, adjoint. keep: how many of the largest singular values; None keeps all.
    parameters: globs of qualified names. sample_dim: the sample axis of the output, where its length leaves a doubt.
    coupling: "rows", the rows of the group (adds up to the gradient), or "loss", the gradient of the group's loss.
    adapters: by function name which adapter takes it, or the adapters to use instead of the installed ones.

    The model, its buffers, its gradients and the random state are left as they were.
    Raises `GradtraceError` subclasses that say what to do. *Source*: Baker, Calhoun & Plis 2024, arXiv:2406.11825.
    """
    from gradtrace.store.reading.tree import tree_of

    settings = Settings(checked_kinds(kinds), sample_dim, checked_coupling(coupling))
    session = traced(model, inputs, groups, parameters, settings, adapters, loss_fn)
    row = step_row(session, step=0, keep=checked_keep(keep))
    return tree_of(row, infos(session), attrs={"loss": row.loss, "coupling": coupling})


def trace(
    model: nn.Module,
    inputs: Any,
    *,
    groups: Any = None,
    parameters: str | Sequence[str] | None = None,
    sample_dim: int | None = None,
    adapters: Mapping[str, str] | Sequence[Adapter] | None = None,
) -> OpGraph:
    """The graph of the parameterized ops of one forward pass, and how each parameter will be measured.

    Without `groups` the samples are counted along `sample_dim` of the output, by default its first axis. The model, its
    buffers and the random state are left as they were. Every floating-point output counts as reaching the loss.
    """
    _, excluded = select(model, parameters)
    settings = Settings(KINDS, sample_dim)
    session = traced(model, inputs, groups, parameters, settings, adapters, any_loss, sized=True)
    return graph_of(session, excluded)


def traced(
    model: nn.Module,
    inputs: Any,
    groups: Any,
    parameters: str | Sequence[str] | None,
    settings: Settings,
    adapters: Mapping[str, str] | Sequence[Adapter] | None,
    loss_fn: Callable[[Any], Tensor],
    *,
    sized: bool = False,
) -> Session:
    """The judged session of one batch; `sized`: it also notes how large the factors of every op are."""
    select(model, parameters)
    known, given = registry(adapters), Inputs.of(inputs)

    def step(model: nn.Module) -> None:
        scalar(loss_fn(model(*given.args, **given.kwargs)), "loss_fn").backward()

    def attempt(memory: Memory) -> Session:
        with random_state_kept(), attributes_kept(model):
            standin = Standin(model, parameters)
            session = standin.session(settings, memory, known)
            if sized:
                session.gathered = Sizing(session)
            passed(session, groups, lambda: standin.applied(step))
        return session

    return settled(attempt)


def settled(attempt: Callable[[Memory], Session]) -> Session:
    """The judged session of the first pass in which nothing was taken for what it is not; `attempt` makes a pass."""
    memory = Memory()
    for _ in range(ATTEMPTS):
        before = len(memory.transparent)
        session = attempt(memory)
        judge(session)
        if not session.retrace:
            break
        memory.reconsider(before)
    return session


def passed(session: Session, groups: Any, work: Callable[[], None]) -> None:
    """Runs `work`, a forward and a backward pass over one batch, under the session's eyes."""
    try:
        session.begin_batch(groups)
        with torch.enable_grad(), session.watching():
            work()
    finally:
        session.close()


def scalar(loss: Any, function: str) -> Tensor:
    """`loss`, if it is a scalar tensor; `function` is who returned it."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise CaptureError(f"{function} must return a scalar tensor; it returned {shape}. Take its mean or sum.")
    return loss


def checked_coupling(coupling: str) -> str:
    """`coupling`, if it is one of the two definitions."""
    if coupling not in ("rows", "loss"):
        raise CaptureError(f"coupling={coupling!r} is neither 'rows' nor 'loss'.")
    return coupling


def checked_keep(keep: int | None) -> int | None:
    """`keep`, if it is a number of singular values or None."""
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise CaptureError(f"keep={keep!r} must be a whole number of singular values, 1 or more, or None for all.")
    return keep
