"""Bilinear layers: the weight multiplies the outer product of two inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from gradtrace.calls import OpCall, cast_as_used, is_dense
from gradtrace.factors import Factors, Norms, Rows, row_norms
from gradtrace.hosted import picked, places_of, sent

MOST_ELEMENTS = 2**18  # of a matrix of outer products that is formed at once


@dataclass(frozen=True)
class BilinearFactors(Factors):
    """G[o] = the sum over rows of d[o] x y^T. A has one row x y^T, flattened, per row of x and y; formed in blocks.

    left: (rows, in1), right: (rows, in2), adjoint: (rows, out), owners: (rows,).
    """

    left: Tensor
    right: Tensor
    adjoint: Tensor
    owners: Tensor

    def densify(self) -> Tensor:
        shape = (self.adjoint.shape[1], self.left.shape[1], self.right.shape[1])
        total = self.adjoint.new_zeros(shape[0], shape[1] * shape[2])
        for rows in self.blocks():
            assert rows.activation is not None
            total += rows.adjoint.T @ rows.activation.conj()
        return total.reshape(shape)

    def restrict(self, keep: Tensor) -> BilinearFactors:
        return self._some(places_of(keep[self.owners]))

    def _some(self, index: Tensor) -> BilinearFactors:
        names = ("left", "right", "adjoint", "owners")
        return replace(self, **{name: picked(getattr(self, name), index) for name in names})

    def weighted(self, weights: Tensor) -> BilinearFactors:
        weight = sent(weights[self.owners], self.adjoint.device).to(self.adjoint.real.dtype)
        return replace(self, adjoint=self.adjoint * weight[:, None])

    def rows(self) -> Rows:
        return self._rows(slice(None))

    def blocks(self) -> Iterator[Rows]:
        step = max(MOST_ELEMENTS // max(self.left.shape[1] * self.right.shape[1], 1), 1)
        for start in range(0, max(len(self.owners), 1), step):
            yield self._rows(slice(start, start + step))

    def _rows(self, some: slice) -> Rows:
        outer = (self.left[some, :, None] * self.right[some, None, :]).flatten(1)
        return Rows(outer, self.adjoint[some], self.owners[some])

    def norms(self) -> Norms:
        """Of every row: the norm of an outer product is the product of the norms."""
        return Norms(row_norms(self.left) * row_norms(self.right), row_norms(self.adjoint), self.owners)


class BilinearAdapter:
    """Factors of `bilinear(x, y, weight)`."""

    name = "bilinear"
    ops = "bilinear"

    def claims(self, call: OpCall) -> bool:
        both = is_dense(call.argument(0, "input1")) and is_dense(call.argument(1, "input2"))
        return call.name == "bilinear" and call.is_operand(2, "weight") and both

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """One row per position of the output."""
        left, right = (cast_as_used(call.argument(i, f"input{i + 1}"), adjoint) for i in (0, 1))
        shape = tuple(adjoint.shape[:-1])
        owners = call.owner_rows(tuple(range(len(shape))), shape)
        flat = [t.expand(*shape, t.shape[-1]).reshape(len(owners), t.shape[-1]) for t in (left, right, adjoint)]
        return BilinearFactors(flat[0], flat[1], flat[2], owners)
