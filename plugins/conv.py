"""Convolutions in one to three dimensions, transposed ones included.

A convolution is a product with the matrix of its patches: one row per sample and position, one column per channel and
place in the kernel. For a transposed one, rows are the *input's* positions, A is the input as it stands, and D holds
the patches of the output's adjoint, so that A^T D is the weight's matrix there too. Groups of channels are independent
products side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from gradtrace_plugins.correlation import Correlation
from gradtrace_plugins.window import Window, pieces
from torch import Tensor

from gradtrace.calls import OpCall, RowsCutError, cast_as_used, is_dense
from gradtrace.factors import Factors, Norms, OuterFactors, Rows
from gradtrace.hosted import picked, places_of, sent
from gradtrace.sources import ChannelSource, Source

MOST_ELEMENTS = 2**18  # of a matrix of patches that is formed at once
FEW_CHANNELS = 16  # of an output, for which a product with as few columns costs as much as the gradient
MOST_SLICED = 2**21  # of an adjoint that are put together at once, by sample
_AXES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}


@dataclass(frozen=True)
class ConvFactors(Factors):
    """The gradient of a convolution's weight, by the convolution's own weight gradient; patches only in blocks.

    patched: (samples, channels, spatial...), the tensor that patches are taken of: the input, or, of a transposed
    convolution, the output's adjoint. plain: (samples, channels, positions...), the other one, with one row per
    position. owners: (samples, 1 or positions...), whose row it is. shape: the weight's, whose first axis is the
    channels of `plain`.
    """

    patched: Tensor
    plain: Tensor
    owners: Tensor
    window: Window
    shape: tuple[int, ...]
    transposed: bool
    kept: Tensor | None = None  # shaped as owners: which rows are left, where not all of a sample's are

    @property
    def adjoint(self) -> Tensor:  # type: ignore[override]
        """The output's adjoint, as it came."""
        return self.patched if self.transposed else self.plain

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.plain.shape[2:])

    @property
    def _by_sample(self) -> bool:
        return self.owners.numel() == len(self.owners)

    def densify(self) -> Tensor:
        fits = self.window.fits(self.patched.shape[2:], self.positions)
        if self._by_sample and fits and not self.plain.is_complex() and self.plain.numel():
            return self._weight_gradient()
        total = self.plain.new_zeros(self.shape).flatten(1)
        for rows in self._grouped_blocks(MOST_ELEMENTS):
            total += _matrix(rows, transposed=self.transposed)
        return total.reshape(self.shape)

    def by_cell(self, cells: Tensor) -> dict[int, Tensor]:
        """Some samples at a time: what is copied of them stays small. Cells below zero are nobody's."""
        if not self._by_sample or not self.plain.numel():
            return super().by_cell(cells)
        of_sample = cells[self.owners.flatten()]
        step = max(1, MOST_SLICED // self.plain[0].numel())
        found = {}
        for cell in torch.unique(of_sample[of_sample >= 0]).tolist():
            parts = [self._of(some).densify() for some in places_of(of_sample == cell).split(step)]
            found[cell] = sum(parts[1:], parts[0])
        return found

    def times(self, probes: Tensor) -> Tensor | None:
        """D^T (A V), where A V is a convolution with few channels."""
        if self.transposed or self.window.groups > 1 or self.kept is not None or self.plain.is_complex():
            return None
        if self.shape[0] <= FEW_CHANNELS:
            return None
        kernels = probes.T.reshape(-1, *self.shape[1:])
        found = probes.new_zeros(self.shape[0], len(kernels))
        step = max(1, MOST_ELEMENTS // max(self.patched[:1].numel(), 1))
        for patched, plain in zip(self.patched.split(step), self.plain.split(step), strict=True):
            seen = self.window.convolved(patched, kernels)
            found += (plain.flatten(2) @ seen.flatten(2).transpose(1, 2)).sum(0)  # einsum takes five times as long
        return found

    def _weight_gradient(self) -> Tensor:
        """What autograd itself would run: the roles of input and adjoint swap in a transposed convolution."""
        w = self.window
        padding, zeros = [before for before, _ in w.padding], [0] * len(w.kernel)
        weight = self.plain.new_empty(1).expand(self.shape)
        _, gradient, _ = torch.ops.aten.convolution_backward(
            self.plain, self.patched, weight, None, w.stride, padding, w.dilation, False, zeros, w.groups,
            [False, True, False],
        )  # fmt: skip
        return gradient

    def restrict(self, keep: Tensor) -> ConvFactors:
        kept = keep[self.owners]
        samples = places_of(kept.flatten(1).any(1))
        some = self if len(samples) == len(kept) else self._of(samples)
        if self._by_sample:
            return some
        return replace(some, kept=keep[some.owners])

    def _of(self, samples: Tensor) -> ConvFactors:
        names = ("patched", "plain", "owners") if self.kept is None else ("patched", "plain", "owners", "kept")
        return replace(self, **{name: picked(getattr(self, name), samples) for name in names})

    def weighted(self, weights: Tensor) -> ConvFactors:
        adjoint = self.adjoint
        factor = sent(weights[self.owners], adjoint.device).to(adjoint.real.dtype)
        return replace(self, **{"patched" if self.transposed else "plain": adjoint * factor.unsqueeze(1)})

    def rows(self) -> Rows:
        """All rows at once, group after group of channels."""
        (rows,) = self._grouped_blocks(sys.maxsize)
        return _side_by_side(rows)

    def blocks(self) -> Iterator[Rows]:
        """The rows, with at most MOST_ELEMENTS in a matrix of patches (one row's, where that is more)."""
        yield from map(_side_by_side, self._grouped_blocks(MOST_ELEMENTS))

    def _grouped_blocks(self, most: int) -> Iterator[Rows]:
        """The same with an axis of groups first: (groups, rows, ...)."""
        padded, sizes = self.window.padded(self.patched), (len(self.plain), *self.positions)
        width = self.patched.shape[1] * prod(self.window.kernel)
        for piece in pieces(sizes, max(most // width, 1)):
            patches = self.window.patches(padded, piece)
            plain = self.window.rows(self.plain[piece[0], :, *piece[1:]])
            owners = self._each_row(self.owners)[piece].flatten()
            if self.kept is not None:
                here = places_of(self._each_row(self.kept)[piece].flatten())
                there = sent(here, plain.device)
                patches, plain, owners = patches.index_select(1, there), plain.index_select(1, there), owners[here]
            activation, adjoint = (plain, patches) if self.transposed else (patches, plain)
            yield Rows(activation, adjoint, owners.expand(self.window.groups, -1))

    def _each_row(self, owners: Tensor) -> Tensor:
        return owners.expand(len(self.plain), *self.positions)

    def _each_norm(self, owners: Tensor) -> Tensor:
        rows = self._each_row(owners).flatten(1)
        return rows.unsqueeze(1).expand(-1, self.window.groups, -1).flatten()

    def source(self, kind: str) -> Source | None:
        if not self._by_sample or self.kept is not None:
            return None
        owners = self.owners.flatten()
        if (kind == "adjoint") == self.transposed:
            return PatchSource(self.patched, owners, self.window, self.positions)
        return ChannelSource(self.plain, owners, self.window.groups)

    def norms(self) -> Norms:
        """Of every row, without patches."""
        plain = self.window.row_norms(self.plain)
        patches = self.window.patch_norms(self.window.padded(self.patched), self.positions)
        owners = self.owners.flatten()
        if not self._by_sample or self.kept is not None:
            plain, patches, owners = plain.flatten(), patches.flatten(), self._each_norm(self.owners)
        if self.kept is not None:
            here = places_of(self._each_norm(self.kept))
            plain, patches, owners = picked(plain, here), picked(patches, here), owners[here]
        activation, adjoint = (plain, patches) if self.transposed else (patches, plain)
        return Norms(activation, adjoint, owners)


@dataclass(frozen=True)
class PatchSource(Source):
    """The rows of patches of `values` (samples, channels, spatial...), at all positions."""

    window: Window
    positions: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.values.shape[1] // self.window.groups * prod(self.window.kernel)

    @property
    def height(self) -> int:
        return self.window.groups * prod(self.positions)

    def blocks(self, units: Tensor) -> Iterator[Tensor]:
        for some in units.split(max(self.most_rows // max(self.height, 1), 1)):
            padded = self.window.padded(picked(self.values, some))
            for piece in pieces((len(some), *self.positions), max(self.most_rows // self.window.groups, 1)):
                yield from self.window.patches(padded, piece, self.wide)

    def square(self, units: Tensor) -> Tensor:
        sizes = tuple(self.values.shape[2:])
        correlation = Correlation(self.window, self.values.shape[1], sizes, self.positions)
        if self.values.is_complex() or not correlation.is_cheaper(len(units)):
            return super().square(units)
        return correlation.gram(picked(self.values, units))

    @property
    def key(self) -> Hashable:
        return super().key, self.window, self.positions


class ConvAdapter:
    """Factors of convolutions: as rows of patches while they are few, else by the convolution's own weight gradient."""

    name = "conv"
    ops = "conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d"

    def claims(self, call: OpCall) -> bool:
        known = call.name in _AXES or call.name in _TRANSPOSED
        return known and call.is_operand(1, "weight") and is_dense(call.argument(0, "input"))

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """One row per sample and position: of the output, or of a transposed convolution's input."""
        transposed = call.name in _TRANSPOSED
        axes = _TRANSPOSED[call.name] if transposed else _AXES[call.name]
        window = _window(call, axes, transposed=transposed)
        x, owners = cast_as_used(call.argument(0, "input"), adjoint), call.owners
        assert owners is not None
        if x.dim() == axes + 1:  # one sample without a batch axis
            x, adjoint, owners = x[None], adjoint[None], owners[None]
        if owners.shape[1] != 1 or (transposed and any(size != 1 for size in owners.shape[2:])):
            raise RowsCutError(call.name)
        owners = owners.squeeze(1).expand(len(x), *owners.shape[2:])
        patched, plain = (adjoint, x) if transposed else (x, adjoint)
        found = ConvFactors(patched, plain, owners, window, tuple(call.weight.shape), transposed)
        return _few_rows(found) or found


def _few_rows(factors: ConvFactors) -> OuterFactors | None:
    """The patches themselves, where they have no more rows than the weight's matrix has sides: no larger than it."""
    count, (height, *rest) = prod(factors.positions) * len(factors.plain), factors.shape
    if factors.window.groups > 1 or count > min(height, prod(rest)):
        return None
    rows = factors.rows()
    assert rows.activation is not None
    if factors.transposed:
        shape, order = factors.shape, tuple(range(len(factors.shape)))
    else:
        shape, order = (*rest, height), (len(rest), *range(len(rest)))
    return OuterFactors(rows.activation, rows.adjoint, rows.owners, shape, order)


def _side_by_side(rows: Rows) -> Rows:
    """The rows of all groups of channels below one another."""
    assert rows.activation is not None
    return Rows(rows.activation.flatten(0, 1), rows.adjoint.flatten(0, 1), rows.owners.flatten())


def _matrix(rows: Rows, *, transposed: bool) -> Tensor:
    """The weight's matrix that one block of rows adds up to, its groups below one another."""
    assert rows.activation is not None
    a, d = rows.activation, rows.adjoint
    product = a.mH @ d if transposed else d.transpose(1, 2) @ a.conj()
    return product.flatten(0, 1)


def _window(call: OpCall, axes: int, *, transposed: bool) -> Window:
    kernel = tuple(call.weight.shape[2:])
    stride = _each(call.argument(3, "stride", 1), axes)
    dilation = _each(call.argument(7 if transposed else 5, "dilation", 1), axes)
    given = call.argument(4, "padding", 0)
    if given == "same":
        spans = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        padding = tuple((span // 2, span - span // 2) for span in spans)
    else:
        padding = tuple((size, size) for size in _each(0 if given == "valid" else given, axes))
    return Window(kernel, stride, padding, dilation, call.argument(6, "groups", 1))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One number per spatial axis."""
    numbers: Sequence[int] = value if isinstance(value, Sequence) else (value,)
    return tuple(numbers) * axes if len(numbers) == 1 else tuple(numbers)
