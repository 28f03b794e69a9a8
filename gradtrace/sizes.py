"""What one traced step tells about the sizes of its factors, per op: what a plan is made of."""

from __future__ import annotations

from typing import Any

from gradtrace.adapters import is_joint
from gradtrace.contributions import Factored, Local
from gradtrace.factors import BatchedFactors, ElementFactors, LookupFactors
from gradtrace.gather import Gathered
from gradtrace.graph import Sizes
from gradtrace.ops import Op
from gradtrace.session import Session

_FORMS = {LookupFactors: "lookup", ElementFactors: "elements", BatchedFactors: "batched"}


class Sizing(Gathered):
    """Gathers like its parent, and notes the sizes of all factors by the number of their op.

    Rows are counted block by block once more, which matrices of patches make felt: for one batch, not for training.
    """

    def __init__(self, session: Session) -> None:
        kinds = session.settings.kinds
        super().__init__(session.parameters, session.edges, kinds, session.memory, session.is_global, session.is_known)
        self.by_op: dict[int, list[Sizes]] = {}

    def take(self, op: Op, part: Factored | Local, *rest: Any, owned: bool) -> None:
        value = part.operand.value
        names = [name for name in sorted(value.parameters) if name in self._parameters]
        if names:
            form, rows, activation, adjoint, dtype = self._of(part)
            joint, itself = is_joint(part.operand.adapter), value.moves == ()
            facts = value.moves is not None, rows, activation, adjoint, owned, dtype, joint, itself
            self.by_op.setdefault(op.number, []).extend(Sizes("", name, form, *facts) for name in names)
        super().take(op, part, *rest, owned=owned)

    def _of(self, part: Factored | Local) -> tuple[str, int, int | None, int | None, str]:
        """Form, rows, columns of A and of D, dtype."""
        if isinstance(part, Local):
            return ("local", *_local(part), str(part.adjoint.dtype).removeprefix("torch."))
        outer = self._outer(part) is not None
        kinds = (name for known, name in _FORMS.items() if isinstance(part.factors, known))
        form = "outer" if outer else next(kinds, "product")
        rows, activation, adjoint = 0, None, None
        for block in part.factors.blocks():
            rows, adjoint = rows + len(block.adjoint), block.adjoint.shape[1]
            activation = None if block.activation is None else block.activation.shape[1]
        if isinstance(part.factors, LookupFactors):
            activation = part.factors.height
        elif adjoint is None and isinstance(part.factors, ElementFactors):  # rows of several samples each
            rows = part.factors.adjoint.numel()
        return form, rows, activation, adjoint, str(part.factors.adjoint.dtype).removeprefix("torch.")


def _local(part: Local) -> tuple[int, None, int | None]:
    """One row per sample, positions side by side; no rows where the output has no single sample axis."""
    sizes = [size for size in part.owners.shape if size != 1]
    if len(sizes) != 1:
        return 0, None, None
    return sizes[0], None, part.adjoint.numel() // sizes[0]
