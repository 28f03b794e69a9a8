"""Singular values of matrices as they stand, in double precision.

What was computed in double precision is decomposed itself. What has single precision or less goes by a Gram matrix: see
`gradtrace.decompose.gram`.
"""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from gradtrace.decompose import lapack


def is_exact(dtype: torch.dtype) -> bool:
    """Whether half the digits of double precision are not enough for values of this dtype."""
    return dtype in (torch.float64, torch.complex128)


def double_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this one are decomposed."""
    return torch.complex128 if dtype.is_complex else torch.float64


def double(values: Tensor) -> Tensor:
    """The same values in double precision."""
    return values.to(double_of(values.dtype))


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite; no copy, and one pass over them unless their sum is not finite."""
    if cmath.isfinite(values.sum().item()):
        return True
    real = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return all(map(math.isfinite, torch.stack(torch.aminmax(real)).tolist()))  # a NaN anywhere is both


def singular_values(matrices: Tensor) -> Tensor:
    """(..., min(p, q)) of matrices (..., p, q), descending, in float64."""
    wide = double(matrices)
    if min(wide.shape[-2:]) == 1:
        return torch.linalg.vector_norm(wide, dim=(-2, -1))[..., None]
    return lapack.singular_values(wide)


def roots(grams: Tensor) -> Tensor:
    """(..., n) singular values of matrices, descending, from the lower halves of their Gram matrices (..., n, n)."""
    return lapack.eigenvalues(grams).clamp_min(0).sqrt().flip(-1)
