"""Owners are read exactly from powers of two, in every dtype; whatever is no single power is told as mixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradtrace.ownership import MIXED, UNKNOWN, Codes

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(codes: Codes, plain: Tensor, owners: Tensor) -> list[Tensor]:
    """The adjoint in every probe, each element multiplied by its owner's power of two."""
    kind = plain.real.dtype if plain.is_complex() else plain.dtype
    return [plain * codes.factor(probe)[owners].to(kind) for probe in range(len(codes.digits))]


def drawn(dtype: torch.dtype, n_samples: int, size: int = 5000) -> tuple[Codes, Tensor, Tensor]:
    codes = Codes.draw(n_samples, generator(), dtype=dtype)
    owners = torch.randint(n_samples, (size,), generator=generator(1))
    kind = dtype if dtype in (torch.float64, *COMPLEX) else torch.float32
    plain = torch.randn(size, dtype=kind, generator=generator(2)).clamp(-1, 1) if not dtype.is_complex else (
        torch.randn(size, dtype=dtype, generator=generator(2))
    )  # fmt: skip
    return codes, plain.to(dtype), owners


@pytest.mark.parametrize("n_samples", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_every_owner_is_read(dtype: torch.dtype, n_samples: int) -> None:
    codes, plain, owners = drawn(dtype, n_samples)
    found = codes.decode(plain, coded(codes, plain, owners))
    readable = plain.abs() > 1.1 * torch.finfo(dtype).tiny * 2.0**12
    assert readable.any()
    assert torch.equal(found[readable].long(), owners[readable])


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_the_sum_of_two_samples_adjoints_is_nobodys(dtype: torch.dtype) -> None:
    codes, plain, owners = drawn(dtype, 7)
    other = (owners + 1) % 7
    half = plain / 2  # exact
    mixed = [a + b for a, b in zip(coded(codes, half, owners), coded(codes, half, other), strict=True)]
    found = codes.decode(plain, mixed)
    large = plain.abs() > max(1e-3, 1.1 * torch.finfo(dtype).tiny * 2.0**12)
    powers = [coded(codes, plain, torch.full_like(owners, sample))[0] for sample in range(7)]
    alone = [mixed[0][large] == one[large] for one in powers]
    readable = torch.stack(alone).any(0)
    assert readable.float().mean() < 0.5, "sums that happen to be a power of two are rare enough to be left out"
    assert bool((found[large][~readable] == MIXED).all())


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("spoil", ["one bit", "sign", "infinite", "nan", "smaller"])
def test_what_is_not_exact_is_mixed(dtype: torch.dtype, spoil: str) -> None:
    codes, plain, owners = drawn(dtype, 7, size=500)
    plain = plain.sign() * (0.3 + plain.abs())
    (probe,) = coded(codes, plain, owners)
    wrong = {
        "one bit": probe + probe * torch.finfo(dtype).eps,
        "sign": -probe,
        "infinite": torch.full_like(probe, float("inf")),
        "nan": torch.full_like(probe, float("nan")),
        "smaller": plain / 2,
    }[spoil]
    assert bool((codes.decode(plain, [wrong]) == MIXED).all())


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_zeros_belong_to_nobody_yet(dtype: torch.dtype) -> None:
    codes = Codes.draw(5, generator(), dtype=dtype)
    zeros = torch.zeros(3, 2, dtype=dtype)
    found = codes.decode(zeros, [zeros])
    assert found.shape == (3, 2)
    assert bool((found == UNKNOWN).all())


def test_one_part_of_a_complex_number_is_enough() -> None:
    codes = Codes.draw(5, generator())
    plain = torch.complex(torch.tensor([0.0, 1.5, 1.5, 1.5]), torch.tensor([0.7, 0.0, 0.7, 1e-40]))
    owners = torch.tensor([3, 1, 4, 2])
    assert codes.decode(plain, coded(codes, plain, owners)).tolist() == owners.tolist()
    torn = torch.complex(plain.real * codes.factor(0)[0].float(), plain.imag * codes.factor(0)[1].float())
    assert codes.decode(plain, [torn])[2] == MIXED
