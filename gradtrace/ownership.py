"""Which sample owns each row of an adjoint: power-of-two codes and the layouts they reveal.

A backward pass is linear, and powers of two multiply exactly in floating point. So if the cotangent of sample n is
multiplied by 2^k(n), every adjoint element comes back bitwise 2^k times itself, where k is its owner's digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = -1  # a zero adjoint: nothing reached it, or nothing will
MIXED = -2  # fed by several samples
AT_ONCE = 2**20  # elements decoded together: what that takes is many times their size


@dataclass(frozen=True)
class Codes:
    """One code per sample: `digits` (probes, samples), each in [0, base)."""

    digits: Tensor
    base: int

    @property
    def n_samples(self) -> int:
        return int(self.digits.shape[1])

    @classmethod
    def draw(cls, n_samples: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Codes:
        """Distinct random codes; base 64, or 16 in float16, whose exponents are few."""
        base = 16 if dtype == torch.float16 else 64
        probes, room = 1, base
        while room < n_samples:
            probes, room = probes + 1, room * base
        numbers = torch.randperm(room, generator=generator)[:n_samples]
        digits = torch.stack([(numbers // base**place) % base for place in range(probes)])
        return cls(digits, base)

    def factor(self, probe: int) -> Tensor:
        """(samples,) the powers of two that multiply each sample's cotangent in `probe`; float64."""
        return torch.ldexp(torch.ones(self.n_samples, dtype=torch.float64), self.digits[probe])

    def decode(self, plain: Tensor, coded: Sequence[Tensor]) -> Tensor:
        """The owner of every element: a sample, UNKNOWN where the adjoint is zero, MIXED where no single power fits."""
        flat = [t.detach().cpu().resolve_conj().reshape(-1) for t in (plain, *coded)]
        pieces = zip(*(t.split(AT_ONCE) for t in flat), strict=True) if plain.numel() else ()
        table = self._table()
        owners = [self._decode(first, rest, table) for first, *rest in pieces]
        return torch.cat([torch.zeros(0, dtype=torch.int32), *owners]).reshape(plain.shape)

    def _decode(self, plain: Tensor, coded: Sequence[Tensor], table: Tensor) -> Tensor:
        number = torch.zeros(len(plain), dtype=torch.int32)
        exact = torch.ones(len(plain), dtype=torch.bool)
        for place, probe in enumerate(coded):
            power, same = _power_of_two(plain, probe)
            exact &= same & (power >= 0) & (power < self.base)
            number += power.clamp_(0, self.base - 1).int() * self.base**place
        owners = torch.where(exact, table[number], torch.tensor(MIXED, dtype=torch.int32))
        live = _live(plain)
        known = live.any(-1) if plain.is_complex() else live
        return torch.where(known, owners, torch.tensor(UNKNOWN, dtype=torch.int32))

    def _table(self) -> Tensor:
        """The sample of every number that the digits can make; MIXED for those that stand for nobody."""
        numbers = sum(self.digits[place] * self.base**place for place in range(len(self.digits)))
        table = torch.full((self.base ** len(self.digits),), MIXED, dtype=torch.int32)
        table[numbers] = torch.arange(self.n_samples, dtype=torch.int32)
        return table


# Per floating dtype: an integer of its size, and the number of bits of its mantissa.
_BITS = {
    torch.float64: (torch.int64, 52),
    torch.float32: (torch.int32, 23),
    torch.bfloat16: (torch.int16, 7),
    torch.float16: (torch.int16, 10),
}


def _real(tensor: Tensor) -> Tensor:
    """With a last axis of two for complex numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _live(tensor: Tensor) -> Tensor:
    """Where a number is large enough to be read; smaller ones may have lost digits below the smallest normal one."""
    real = _real(tensor)
    return real.abs() > torch.finfo(real.dtype).tiny * 2.0**12


def _power_of_two(plain: Tensor, coded: Tensor) -> tuple[Tensor, Tensor]:
    """log2(coded / plain) and whether it is exact, per element.

    The bits of a float are sign, exponent and mantissa: times 2^k adds k to the exponent and changes nothing else, so
    the difference of the bits is k behind as many zeros as the mantissa has bits. Of a complex number both parts are
    asked, and a part that cannot be read is passed over.
    """
    real = _real(plain)
    kind, mantissa = _BITS[real.dtype]
    before, after = real.contiguous().view(kind), _real(coded).contiguous().view(kind)
    power = (after - before) >> mantissa
    exact = (after - before == power << mantissa) & (after ^ before >= 0) & _real(coded).isfinite()
    if not plain.is_complex():
        return power, exact
    live = _live(plain)
    lowest, highest = (torch.where(live, power, torch.full_like(power, fill)) for fill in (2**20, -(2**20)))
    highest = highest.amax(-1)
    return highest, (exact | ~live).all(-1) & (highest == lowest.amin(-1))


@dataclass(frozen=True)
class Layout:
    """owner = (index along `axis` // stride) % samples, where the axis has length outer * samples * stride.

    `outer` or `stride` is None where it is whatever the axis' length asks for (a varying number of windows, say).
    """

    axis: int
    outer: int | None
    stride: int | None

    def owners(self, shape: Sequence[int], n_samples: int) -> Tensor | None:
        """Owners broadcastable to `shape`, or None when the layout does not fit that shape."""
        if self.axis >= len(shape) or n_samples == 0 or shape[self.axis] % n_samples:
            return None
        length = shape[self.axis]
        stride = length // n_samples // self.outer if self.stride is None and self.outer else self.stride
        if (
            not stride
            or length % (n_samples * stride)
            or (self.outer and self.stride and length != self.outer * n_samples * stride)
        ):
            return None
        index = (torch.arange(length) // stride) % n_samples
        return index.reshape([-1 if a == self.axis else 1 for a in range(len(shape))])

    def __str__(self) -> str:
        if self.outer == 1 and self.stride is None:
            return f"axis {self.axis}"
        return f"axis {self.axis}, outer {self.outer or 'any'}, stride {self.stride or 'any'}"


def layouts_of(owners: Tensor, n_samples: int) -> list[Layout]:
    """Every layout that explains all the known owners; the simplest first."""
    found = []
    for axis, length in enumerate(owners.shape):
        if length == 0 or length % n_samples:
            continue
        along = _along(owners, axis)
        if along is None:
            continue
        for stride in _divisors(length // n_samples):
            index = (torch.arange(length) // stride) % n_samples
            if bool(((along == index) | (along == UNKNOWN)).all()):
                found.append(_general(axis, length // n_samples // stride, stride))
    return found


def _general(axis: int, outer: int, stride: int) -> Layout:
    if outer == 1:
        return Layout(axis, 1, None)
    return Layout(axis, None, 1) if stride == 1 else Layout(axis, outer, stride)


def _along(owners: Tensor, axis: int) -> Tensor | None:
    """The owner per index of `axis`; None when owners differ across the other axes."""
    flat = owners.movedim(axis, 0).reshape(owners.shape[axis], -1)
    if flat.shape[1] == 0:
        return None
    top = flat.amax(1)
    fits = (flat == top[:, None]) | (flat == UNKNOWN)
    return top if bool(fits.all()) else None


def _divisors(number: int) -> list[int]:
    return [d for d in range(number, 0, -1) if number % d == 0]


def compact(owners: Tensor) -> Tensor:
    """The same owners with every axis along which they do not vary (zeros aside) reduced to size one."""
    for axis in reversed(range(owners.dim())):
        if owners.shape[axis] <= 1:
            continue
        top = owners.amax(axis, keepdim=True)
        if bool(((owners == top) | (owners == UNKNOWN)).all()):
            owners = top
    return owners
