"""Contractions: products of a weight with other tensors, summed over what the output lacks; and their factors.

With one label per axis, G = the sum over all labels but the weight's of the adjoint times the other operands. The
others are dealt out between A and D, each contracted first. Labels in both A and D that the weight lacks are rows; of
the weight's own, those in A only are inputs, in D only outputs, in both independent products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from gradtrace.calls import OpCall, RowsCutError, cast_as_used, is_dense
from gradtrace.factors import BatchedFactors, Factors, OuterFactors

Term = tuple[Tensor, str]  # an operand and the labels of its axes


@dataclass(frozen=True)
class Split:
    """Which of the other operands make A, and which go with the adjoint into D; and what the labels are then."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    batch: str
    rows: str
    inputs: str
    outputs: str

    @property
    def rank(self) -> int:
        """The number of axes of A and D."""
        return 2 * len(self.batch + self.rows) + len(self.inputs + self.outputs)


@dataclass(frozen=True)
class Contraction:
    """The other operands, the axes of weight and output by label, and the number that multiplies the product.

    merged: the output's shape with an axis per label, where the op merges some (`kron`).
    """

    others: tuple[Term, ...]
    weight: Tensor
    w_axes: str
    y_axes: str
    scale: complex = 1
    merged: tuple[int, ...] | None = None

    def is_product(self) -> bool:
        """No axis of the weight is repeated, and all other operands are ordinary tensors, complex only if it is."""
        dense = all(is_dense(x) and (self.weight.is_complex() or not x.is_complex()) for x, _ in self.others)
        return dense and len(set(self.w_axes)) == len(self.w_axes)

    def sizes(self) -> dict[str, int]:
        """The length of every label; an operand's own may be one and is broadcast then."""
        found: dict[str, int] = {}
        for tensor, axes in (*self.others, (self.weight, self.w_axes)):
            for label, length in zip(axes, tensor.shape, strict=True):
                found[label] = length if found.get(label, 1) == 1 else found[label]
        return found

    def splits(self, own: str) -> Iterator[Split]:
        """Every way to deal out the operands, most to A first; `own`: the weight's labels, but those broadcast."""
        places = range(len(self.others))
        for count in range(len(places), 0, -1):
            for left in combinations(places, count):
                right = tuple(i for i in places if i not in left)
                a = "".join(self.others[i][1] for i in left)
                d = self.y_axes + "".join(self.others[i][1] for i in right)
                yield Split(
                    left,
                    right,
                    batch="".join(x for x in own if x in a and x in d),
                    rows="".join(x for x in dict.fromkeys(d) if x in a and x not in own),
                    inputs="".join(x for x in own if x in a and x not in d),
                    outputs="".join(x for x in own if x not in a),
                )


def factored(contraction: Contraction, call: OpCall, adjoint: Tensor) -> Factors:
    """A and D with the fewest axes whose rows have an owner each; RowsCutError where there are none."""
    c, sizes = contraction, contraction.sizes()
    call, adjoint = _unmerged(c, call, adjoint)
    assert call.owners is not None
    owned = {label for label, length in zip(c.y_axes, call.owners.shape, strict=True) if length != 1}
    loose = "".join(a for a, n in zip(c.w_axes, c.weight.shape, strict=True) if n == 1 != sizes[a])
    found = [s for s in c.splits("".join(a for a in c.w_axes if a not in loose)) if owned <= {*s.batch, *s.rows}]
    if not found:
        raise RowsCutError(call.name)
    split = found[0] if len(found) == 1 else min(found, key=lambda s: s.rank)
    return _factors(c, split, call, adjoint, sizes=sizes, loose=loose)


def _factors(c: Contraction, s: Split, call: OpCall, adjoint: Tensor, *, sizes: dict[str, int], loose: str) -> Factors:
    adjoint = adjoint * c.scale.conjugate() if c.scale != 1 else adjoint
    left = [(cast_as_used(x, adjoint), axes) for x, axes in (c.others[i] for i in s.left)]
    right = [(cast_as_used(x, adjoint).conj(), axes) for x, axes in (c.others[i] for i in s.right)]
    a = _arranged(left, (s.batch, s.rows, s.inputs), sizes)
    d = _arranged([(adjoint, c.y_axes), *right], (s.batch, s.rows, s.outputs), sizes)
    labels = s.batch + s.inputs + s.outputs + loose
    shape = tuple(1 if label in loose else sizes[label] for label in labels)
    order = tuple(labels.index(label) for label in c.w_axes)
    owners = _owners(c, s, call, sizes)
    if s.batch:
        return BatchedFactors(a, d, owners.reshape(a.shape[:2]), shape, order)
    return OuterFactors(a[0], d[0], owners, shape, order)


def _owners(c: Contraction, s: Split, call: OpCall, sizes: dict[str, int]) -> Tensor:
    """The owner of every row; it does not vary along labels that the output lacks."""
    along = s.batch + s.rows
    known = [label for label in along if label in c.y_axes]
    owners = call.owner_rows(tuple(map(c.y_axes.index, known)), tuple(sizes[label] for label in known))
    owners = owners.reshape([sizes[label] if label in known else 1 for label in along])
    return owners.expand([sizes[label] for label in along]).reshape(-1)


def _arranged(terms: Sequence[Term], want: tuple[str, str, str], sizes: dict[str, int]) -> Tensor:
    """The product of the terms as (batch, rows, columns), summed over the labels that are not wanted."""
    labels = "".join(want)
    alone = "".join(label for label in labels if not any(label in axes for _, axes in terms))
    if alone:  # the op sums them within the weight: all along them have the same adjoint
        terms = [*terms, (terms[0][0].new_ones([1] * len(alone)), alone)]
    tensor, axes = terms[0]
    if len(terms) == 1 and sorted(axes) == sorted(labels):
        made = tensor.permute([axes.index(label) for label in labels])
    else:
        made = torch.einsum(",".join(axes for _, axes in terms) + "->" + labels, [tensor for tensor, _ in terms])
    made = made.expand([sizes[label] for label in labels])
    return made.reshape([prod(sizes[label] for label in part) for part in want])


def _unmerged(c: Contraction, call: OpCall, adjoint: Tensor) -> tuple[OpCall, Tensor]:
    """The call's owners and its adjoint with an axis per label."""
    if c.merged is None:
        return call, adjoint
    assert call.owners is not None
    owners = call.owners.expand(adjoint.shape).reshape(c.merged)
    for axis, length in enumerate(owners.shape):
        first = owners.narrow(axis, 0, min(1, length))
        if bool((owners == first).all()):
            owners = first
    return replace(call, owners=owners), adjoint.reshape(c.merged)
