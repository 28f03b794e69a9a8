"""A shadow forward pass, for graphs that cannot be probed: reentrant checkpoints are passed by, nothing is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from gradtrace.bypass import Bypass
from gradtrace.errors import CaptureError
from gradtrace.untouched import attributes_kept, hooks_quiet, random_state_kept
from gradtrace.values import FIXED, tensors_in

if TYPE_CHECKING:
    from gradtrace.session import Session


@contextmanager
def shadow_pass(session: Session) -> Iterator[tuple[Session, GradientEdge]]:
    """A session that saw the same forward calls again, and the edge of a scalar that every output reaches.

    What it finds out in the block about owners goes to `session`.
    """
    parameters = {name: p.detach().requires_grad_() for name, p in session.parameters.items()}
    buffers = {name: b.detach().clone() for name, b in session.model.named_buffers()}
    state = {**{n: p.detach() for n, p in session.model.named_parameters()}, **parameters, **buffers}
    shadow = session.twin(parameters)
    shadow.capture.bypass = Bypass()
    for buffer in buffers.values():
        shadow.capture.flow.provenance[buffer] = FIXED
    entries = list(session.modules.entries)
    with random_state_kept(), attributes_kept(session.model), hooks_quiet(session.model):
        with torch.enable_grad(), shadow.watching():
            root = any_loss([_rerun(state, *entry) for entry in entries])
        with torch.no_grad(), shadow.capture.silence():
            yield shadow, get_gradient_edge(root)
    for op in shadow.seen:
        for i in range(len(op.outputs)):
            if (op.number, i) in shadow.owners:
                session.owners_by_key[op.key, i] = shadow.owners[op.number, i]
    session.owner_residuals |= shadow.owner_residuals
    shadow.close()


def any_loss(outputs: Any) -> Tensor:
    """A scalar that every output reaches, with a gradient that is not constant."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors_in(outputs) if t.requires_grad]
    if not parts:
        raise CaptureError("No output of the model requires a gradient: is it run under torch.no_grad(), or detached?")
    return torch.stack([t.double().square().sum() + t.double().sum() for t in parts]).sum()


def _rerun(state: dict[str, Tensor], module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    prefix = f"{name}." if name else ""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return functional_call(module, own, args, dict(kwargs))
