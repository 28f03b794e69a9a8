"""The Gram matrix of all patches of a tensor, without the patches: from how its channels correlate.

Patches that overlap repeat the same products. Were there a patch at every position that meets the tensor at all, an
entry of their Gram matrix would depend on the distance between two places of the kernel alone: it would be the
correlation of two channels at that lag. Of 27 x 27 pairs of places of a kernel of 3 x 3 x 3, 125 distances are left, of
which half are mirror images. Patches that overhang further than the padding are taken away again; they are few, and
most of their numbers are zero.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from gradtrace_plugins.window import Window
from torch import Tensor

from gradtrace.sources import squared

SLOWER = 1.5  # products of few channels take so much longer than Gram matrices of as many operations
CALL = 5e5  # operations that take as long as a small product does
FORMED = 30  # and as forming one number of a patch
MOST_NUMBERS = 2**17  # of a tensor that is correlated at once: every lag reads it again


@dataclass(frozen=True)
class Overhang:
    """Positions along one axis, and the places of the kernel that can meet the tensor there.

    start: in the tensor with as many zeros around it as the kernel reaches, where the first place of the first of them
    lies. count: of positions. places: from the first to behind the last.
    """

    start: int
    count: int
    places: tuple[int, int]

    @property
    def width(self) -> int:
        return self.places[1] - self.places[0]


@dataclass(frozen=True)
class Correlation:
    """How the Gram matrix of patches is made for one window, and what that takes.

    sizes: of the tensor's spatial axes. channels: of one group.
    """

    window: Window
    channels: int
    sizes: tuple[int, ...]
    positions: tuple[int, ...]

    def is_cheaper(self, samples: int) -> bool:
        """Whether it can be made so, with fewer operations than from the patches."""
        w, reach = self.window, [size - 1 for size in self.window.kernel]
        plain = w.groups == 1 and set(w.stride) == set(w.dilation) == {1}
        if not plain or any(max(pair) > r for pair, r in zip(w.padding, reach, strict=True)):
            return False
        of_lags = 2 * len(self._lags) * self.channels**2 * prod(self._spaced)
        of_one = SLOWER * of_lags + sum(map(self._cost, self._outside))
        calls = (len(self._lags) + len(self._outside)) * CALL
        return calls + samples * of_one < samples * self._cost(self._taken)

    def gram(self, x: Tensor) -> Tensor:
        """(channels * kernel, channels * kernel) of all patches of x (samples, channels, spatial...), in float64."""
        step = max(MOST_NUMBERS // (self.channels * prod(self._spaced)), 1)
        total, places = self._assembled(sum(map(self._correlated, x.split(step)))), self.window.kernel
        whole = total.view(self.channels, *places, self.channels, *places)
        wide = F.pad(x, [size - 1 for size in reversed(places) for _ in "ab"])
        for region in self._outside:
            some = (slice(None), *(slice(*axis.places) for axis in region))
            whole[some + some] -= self._of_region(wide, region)
        return total

    # ------------------------------------------------------------------ lags

    @cached_property
    def _spaced(self) -> list[int]:
        """The sizes with so many zeros behind that no lag reaches from one row into the next."""
        return [size + kernel - 1 for size, kernel in zip(self.sizes, self.window.kernel, strict=True)]

    @property
    def _lags(self) -> list[tuple[int, ...]]:
        return _half_of_lags(self.window.kernel)

    def _offset(self, lag: Sequence[int]) -> int:
        offset = 0
        for step, size in zip(lag, self._spaced, strict=True):
            offset = offset * size + step
        return offset

    def _correlated(self, x: Tensor) -> Tensor:
        """(lags, channels, channels): products of every two channels, summed over all of x, at every lag."""
        offsets = [self._offset(lag) for lag in self._lags]
        rows = x.new_zeros(self.channels, len(x) * prod(self._spaced) + max(offsets), dtype=torch.float64)
        length = rows.shape[1] - max(offsets)
        inside = rows[:, :length].view(self.channels, len(x), *self._spaced)
        inside[(slice(None), slice(None), *map(slice, self.sizes))] = x.transpose(0, 1)
        # torch's product: numpy's keeps others from running meanwhile where there are few channels
        return torch.stack([rows[:, :length] @ rows[:, o : o + length].T for o in offsets])

    def _assembled(self, correlated: Tensor) -> Tensor:
        """The Gram matrix of patches at every position that meets the tensor at all."""
        both = torch.cat([correlated, correlated.transpose(1, 2)])
        pairs = both[_lag_of_pairs(self.window.kernel)]
        return pairs.permute(2, 0, 3, 1).reshape(self.channels * len(pairs), -1)

    # ------------------------------------------------------------------ overhanging patches

    @cached_property
    def _taken(self) -> tuple[Overhang, ...]:
        """The positions that the window takes."""
        axes = zip(self.window.kernel, self.window.padding, self.positions, strict=True)
        return tuple(Overhang(kernel - 1 - before, count, (0, kernel)) for kernel, (before, _), count in axes)

    @cached_property
    def _outside(self) -> list[tuple[Overhang, ...]]:
        """The regions of positions that the window does not take, though they meet the tensor."""
        choices = []
        for taken, kernel, (before, after) in zip(self._taken, self.window.kernel, self.window.padding, strict=True):
            low = Overhang(0, kernel - 1 - before, (before + 1, kernel))
            high = Overhang(taken.start + taken.count, kernel - 1 - after, (0, kernel - 1 - after))
            choices.append([axis for axis in (low, taken, high) if axis.count])
        return [region for region in itertools.product(*choices) if region != self._taken]

    def _cost(self, region: Sequence[Overhang]) -> float:
        """Operations of forming a region's patches of one sample, and of their Gram matrix."""
        width = self.channels * prod(axis.width for axis in region)
        return float(prod(axis.count for axis in region) * width * (width + FORMED))

    def _of_region(self, wide: Tensor, region: Sequence[Overhang]) -> Tensor:
        """(channels, places..., channels, places...), the Gram matrix of a region's patches."""
        views, axes = wide, len(region)
        for number, axis in enumerate(region, start=2):
            seen = views.narrow(number, axis.start + axis.places[0], axis.count + axis.width - 1)
            views = seen.unfold(number, axis.width, 1)
        ordered = views.permute(1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes))
        columns = torch.empty(ordered.shape, dtype=torch.float64).copy_(ordered)
        sizes = columns.shape[: 1 + axes]
        return squared(columns.reshape(prod(sizes), -1).T).view(*sizes, *sizes)


@functools.cache
def _half_of_lags(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The distances between two places of a kernel; one of each two that mirror each other."""
    every = itertools.product(*(range(1 - size, size) for size in kernel))
    return [lag for lag in every if lag >= tuple(0 for _ in lag)]


@functools.cache
def _lag_of_pairs(kernel: tuple[int, ...]) -> Tensor:
    """(places, places) the number of the lag from one place to the other; of mirror images that of the lag, further on
    by as many as there are."""
    number = {lag: place for place, lag in enumerate(_half_of_lags(kernel))}
    mirrored = {tuple(-step for step in lag): place + len(number) for lag, place in number.items()}
    places = list(itertools.product(*map(range, kernel)))
    lags = (tuple(b - a for a, b in zip(one, other, strict=True)) for one, other in itertools.product(places, places))
    return torch.tensor([(mirrored | number)[lag] for lag in lags]).view(len(places), len(places))
