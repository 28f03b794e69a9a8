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
        flat = [t.reshape(-1) for t in (plain, *coded)]
        pieces = zip(*(t.split(AT_ONCE) for t in flat), strict=True) if plain.numel() else ()
        owners = [self._decode(first, rest).int() for first, *rest in pieces]
        return torch.cat([torch.zeros(0, dtype=torch.int32), *owners]).reshape(plain.shape)

    def _decode(self, plain: Tensor, coded: Sequence[Tensor]) -> Tensor:
        number = torch.zeros(plain.shape, dtype=torch.int64)
        known, exact = _readable(plain)
        for place, probe in enumerate(coded):
            power, same = _power_of_two(plain, probe)
            exact &= same & (power >= 0) & (power < self.base)
            number += power.clamp(0, self.base - 1) * self.base**place
        numbers = sum(self.digits[place] * self.base**place for place in range(len(self.digits)))
        table = torch.full((self.base ** len(self.digits),), MIXED, dtype=torch.int64)
        table[numbers] = torch.arange(self.n_samples)
        owners = torch.where(exact, table[number], torch.tensor(MIXED))
        return torch.where(known, owners, torch.tensor(UNKNOWN))


def _readable(plain: Tensor) -> tuple[Tensor, Tensor]:
    real = _real(plain)
    smallest = torch.finfo(plain.dtype).tiny * 2.0**12
    known = real.abs() > smallest
    return _back(known, plain, any_part=True), torch.ones(plain.shape, dtype=torch.bool)


def _power_of_two(plain: Tensor, coded: Tensor) -> tuple[Tensor, Tensor]:
    """log2(coded / plain) and whether it is exact, per element; zero parts of complex numbers are passed over."""
    (m0, e0), (m1, e1) = torch.frexp(_real(plain)), torch.frexp(_real(coded))
    live = m0 != 0
    same = (m0 == m1) | ~live & (m1 == 0)
    power = torch.where(live, e1 - e0, torch.tensor(-(2**20), dtype=e0.dtype)).long()
    if plain.is_complex():
        other = torch.where(live, e1 - e0, torch.tensor(2**20, dtype=e0.dtype)).long()
        agree = power.amax(-1) == other.amin(-1)
        return power.amax(-1), same.all(-1) & agree
    return power, same


def _real(tensor: Tensor) -> Tensor:
    """On the CPU, in float64 (exact), with a last axis of two for complex numbers."""
    tensor = tensor.detach().resolve_conj().cpu()
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def _back(flags: Tensor, like: Tensor, *, any_part: bool) -> Tensor:
    if not like.is_complex():
        return flags
    return flags.any(-1) if any_part else flags.all(-1)


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
