"""Sliding windows: which positions of a tensor a convolution's kernel meets, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.factors import squares_along

Piece = tuple[slice, ...]  # of the samples, and of the positions along every spatial axis


@dataclass(frozen=True)
class Window:
    """The kernel's size, stride and dilation per spatial axis, the padding before and after each, and the groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def spans(self) -> list[int]:
        """How far the kernel reaches along every axis."""
        return [gap * (size - 1) + 1 for gap, size in zip(self.dilation, self.kernel, strict=True)]

    def fits(self, sizes: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether torch's own kernels see these positions in a tensor of these sizes: padded alike at both ends."""
        ends = zip(sizes, self.padding, self.spans, self.stride, strict=True)
        seen = [(size + 2 * before - span) // step + 1 for size, (before, _), span, step in ends]
        return seen == list(positions) and all(before == after for before, after in self.padding)

    def padded(self, x: Tensor) -> Tensor:
        """(samples, channels, spatial...) with zeros around it."""
        if not any(any(pair) for pair in self.padding):
            return x
        return F.pad(x, [size for pair in reversed(self.padding) for size in pair])

    def patches(self, x: Tensor, piece: Piece, dtype: torch.dtype | None = None) -> Tensor:
        """(groups, rows, channels per group * kernel): what the kernel meets at the samples and positions of `piece`.

        x: (samples, channels, spatial...), padded. Rows are in the order of `rows`. They follow one another in memory,
        and columns come after one another: forming them takes a sixth of the time that it takes the other way about.
        """
        views, axes = x[piece[0]], len(self.kernel)
        for axis, (span, step, gap) in enumerate(zip(self.spans, self.stride, self.dilation, strict=True), start=2):
            start, stop = piece[axis - 1].start, piece[axis - 1].stop
            seen = views.narrow(axis, start * step, (stop - start - 1) * step + span)
            views = seen.unfold(axis, span, step)[..., ::gap]
        views = views.unflatten(1, (self.groups, x.shape[1] // self.groups))
        ordered = views.permute(1, 2, *range(3 + axes, 3 + 2 * axes), 0, *range(3, 3 + axes))
        columns = torch.empty(ordered.shape, dtype=dtype or x.dtype, device=x.device).copy_(ordered)
        return columns.flatten(axes + 2).flatten(1, axes + 1).transpose(1, 2)

    def convolved(self, x: Tensor, kernels: Tensor) -> Tensor:
        """(samples, k, positions...): x (samples, channels, spatial...) by kernels (k, channels, ...)."""
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return convolution(self.padded(x), kernels, stride=self.stride, dilation=self.dilation)

    def rows(self, y: Tensor) -> Tensor:
        """(groups, rows, channels per group): one row per sample and position of `y`."""
        split = y.unflatten(1, (self.groups, y.shape[1] // self.groups)).flatten(3)
        return split.permute(1, 2, 0, 3).flatten(2).transpose(1, 2)

    def row_norms(self, y: Tensor) -> Tensor:
        """(samples, groups * rows of each): the norm of every row of `rows`, without putting them in order first."""
        return self._channel_squares(y).sqrt().flatten(1).double()

    def _channel_squares(self, y: Tensor) -> Tensor:
        """(samples, groups, spatial...): squares summed over channels; a norm along them takes 30 times as long."""
        return squares_along(y.unflatten(1, (self.groups, y.shape[1] // self.groups)), 2)

    def patch_norms(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """(samples, groups * rows of each): the norm of every row of `patches` at all positions, without forming it.

        x: (samples, channels, spatial...), padded.
        """
        found = self._channel_squares(x)
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            length = (positions[axis - 2] - 1) * step + 1
            here = (slice(None),) * axis + (slice(None, None, step),)
            found = torch.stack([found.narrow(axis, gap * k, length)[here] for k in range(size)]).sum(0)
        return found.sqrt().flatten(1).double()


def pieces(sizes: Sequence[int], most: int) -> Iterator[Piece]:
    """Cuts a grid of samples and positions into blocks of at most `most` rows, in order; at least one row each."""
    if not sizes:
        yield ()
        return
    inner = prod(sizes[1:])
    if inner <= most or sizes[0] == 0:
        step = max(most // max(inner, 1), 1)
        for start in range(0, max(sizes[0], 1), step):
            yield (slice(start, min(start + step, sizes[0])), *(slice(0, size) for size in sizes[1:]))
    else:
        for place in range(sizes[0]):
            for rest in pieces(sizes[1:], most):
                yield (slice(place, place + 1), *rest)
